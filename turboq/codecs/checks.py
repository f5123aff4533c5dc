"""Validation that codecs share: of what was chosen (`check_*`) and of what was stored."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from turboq.codecs.base import Stored
from turboq.errors import TurboqError
from turboq.numbers.rotation import MAX_DIM

DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
DTYPES = tuple(DTYPE_BITS)


def check_dim(dim: int) -> None:
    """Raises ValueError unless dim is a multiple of 8 in 8..8192 (whole bytes at any bits)."""
    if type(dim) is not int or dim % 8 or not 8 <= dim <= MAX_DIM:
        raise ValueError(f"{dim=} must be a multiple of 8 from 8 to {MAX_DIM}")


def check_bits(bits: int) -> None:
    """Raises ValueError unless bits is an integer in 1..8."""
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"{bits=} must be 1..8")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_finite_stored(stored: Stored, where: str = "stored fields") -> None:
    """Reports overflow: a scale beyond its dtype is stored as inf, never clamped.

    float16 scales hold root-mean-squares from 6e-5 (with fewer digits from 6e-8, below which they
    round to zero) to 65504; other vectors need scale_dtype bfloat16 or float32. NaN or Inf inputs
    also end here, because they make the scale NaN. Reads the arrays on the host: not under jit.

    Raises:
      TurboqError: names the field, how many entries are not finite, and the fix.
    """
    for name, values in stored.items():
        if not jnp.issubdtype(values.dtype, jnp.floating):
            continue
        bad = int(jnp.sum(~jnp.isfinite(values)))
        if bad:
            raise TurboqError(
                f"{where}: {bad} of {values.size} entries of {name!r} ({values.dtype}) are not"
                " finite: the input has NaN or Inf, or needs a wider scale_dtype"
            )
