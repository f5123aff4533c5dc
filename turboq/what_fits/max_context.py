"""What fits: the longest context for a memory."""

from __future__ import annotations

from collections.abc import Sequence

from turboq.cache import accounting
from turboq.cache.layer import KVLayer
from turboq.numbers.packing import PAGE


def max_context(layers: Sequence[KVLayer], *, nbytes: int, batch: int = 1) -> int:
    """Longest context, in tokens, that `batch` sequences can each have within `nbytes` bytes.

    Everything that `accounting.residency` counts is in it (whole pages, exact tokens, fitted
    arrays, static tables), so it is a multiple of the page of 256 tokens:

        256 floor((nbytes - fixed) / bytes of one page of all sequences), at least 0

    Raises:
      ValueError: `nbytes` is negative or `batch` is not positive.
    """
    if nbytes < 0 or batch < 1:
        raise ValueError(f"{nbytes=} must be 0 or more, {batch=} 1 or more")
    page = batch * PAGE * accounting.bits_per_token(layers) // 8
    fixed = accounting.residency(layers, context=PAGE, batch=batch).total - page
    return max((nbytes - fixed) // page, 0) * PAGE
