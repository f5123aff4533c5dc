"""What fits: the longest context for a memory."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence

from turboq.cache import accounting
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE
from turboq.what_fits.budget import largest


def max_context(layers: Sequence[KVLayer], *, nbytes: int, batch: int = 1) -> int:
    """Longest context, in tokens, that `batch` sequences can each have within `nbytes` bytes.

    Everything that `accounting.residency` counts is in it (whole pages, exact tokens, fitted
    arrays, static tables), so it is a multiple of the page of 256 tokens: found by bisection of
    that sum, which only windows keep from being a straight line.

    Raises:
      ValueError: `nbytes` is negative or `batch` is not positive.
      TurboqError: every layer has a window, and all windows fit: there is no longest context.

    Examples:
      >>> from turboq import Exact, TokenPolicy, TurboQuantMSE, max_context, uniform_layer
      >>> def layers(codec):
      ...     return [uniform_layer(kv_heads=8, k=codec, v=codec, policy=TokenPolicy())] * 32
      >>> max_context(layers(Exact(dim=128)), nbytes=4 << 30)
      32768
      >>> max_context(layers(TurboQuantMSE(dim=128, bits=3)), nbytes=4 << 30)
      167680
    """
    if nbytes < 0 or batch < 1:
        raise ValueError(f"{nbytes=} must be 0 or more, {batch=} 1 or more")
    pages = largest(
        lambda n: accounting.residency(layers, context=n * PAGE, batch=batch).total <= nbytes
    )
    if pages is None:
        raise TurboqError(f"every layer has a window, and {nbytes} bytes hold all of them")
    return pages * PAGE
