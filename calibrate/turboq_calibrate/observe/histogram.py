"""Mergeable histograms: integer counts over fixed bins, accumulated by one flat scatter.

`FloatBins` follow the floating-point format (every octave in equal parts), so quantiles have one
relative error at every magnitude. Counts are integers, so merges are exact in any order; chunks are
counted in int32 on the device and added in int64 on the host (a float32 counter stops at 2^24).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

INT32_LIMIT = 2**31 - 1


def scatter(index: Int[Array, "N R"], size: int) -> Int[Array, "R S"]:
    """out[r, s] = how many index[:, r] are s.

    One scatter into a flat array: all rows (heads, channels) at once.

    Raises:
      ValueError: R * size does not fit the flat int32 index.
    """
    rows = index.shape[1]
    if rows * size > INT32_LIMIT:
        raise ValueError(f"{rows=} times {size=} bins must stay below 2^31: use smaller chunks")
    flat = index + jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * size, index.shape)
    out = jnp.zeros(rows * size, jnp.int32)
    # Callers clip their indices, so the scatter needs no bounds test of its own.
    out = out.at[flat.reshape(-1)].add(1, mode="promise_in_bounds")
    return out.reshape(rows, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatBins:
    """2^mantissa_bits equal bins in every octave [2^e, 2^(e+1)), low <= e < high, and their mirror.

    The index is read off the float32 bit pattern. Magnitudes below 2^low share the zero bin;
    those from 2^high on share the last one. Signed order: most negative first.
    """

    low: int
    high: int
    mantissa_bits: int = 3
    signed: bool = True

    def __post_init__(self):
        if not -126 <= self.low < self.high <= 127 or not 0 <= self.mantissa_bits <= 8:
            raise ValueError(f"{self} needs -126 <= low < high <= 127, mantissa_bits in 0..8")

    @property
    def positive(self) -> int:
        """Regular bins of one sign."""
        return (self.high - self.low) << self.mantissa_bits

    @property
    def size(self) -> int:
        side = self.positive + 1
        return 2 * side + 1 if self.signed else side + 1

    @property
    def relative_error(self) -> float:
        """Largest |x_hat - x| / |x| of a quantile with 2^low <= |x| < 2^high: 1 / (2^(m+1) + 1)."""
        return 1 / (2 ** (self.mantissa_bits + 1) + 1)

    def index(self, x: Float[Array, "*n"]) -> Int[Array, "*n"]:
        """Bin of every value; NaN and infinity land in an outermost bin."""
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        first = ((self.low + 127) << self.mantissa_bits) - 1
        magnitude = (bits & 0x7FFFFFFF) >> (23 - self.mantissa_bits)
        magnitude = jnp.clip(magnitude - first, 0, self.positive + 1)
        if not self.signed:
            return magnitude
        return jnp.where(bits < 0, -magnitude, magnitude) + self.positive + 1

    @functools.cached_property
    def values(self) -> Float[np.ndarray, "S"]:
        """One value per bin: the harmonic mean of its edges, which has the least relative error."""
        step = np.arange(self.positive + 1)
        octave, part = np.divmod(step, 1 << self.mantissa_bits)
        edges = 2.0 ** (octave + self.low) * (1 + part / (1 << self.mantissa_bits))
        middle = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])
        magnitude = np.concatenate([[0.0], middle, [edges[-1]]])
        return np.concatenate([-magnitude[:0:-1], magnitude]) if self.signed else magnitude

    def quantile(self, counts: Int[np.ndarray, "*n S"], q: float) -> Float[np.ndarray, "*n"]:
        """The value of rank max(1, ceil(q * n)), to `relative_error`; NaN without counts."""
        if not 0 <= q <= 1:
            raise ValueError(f"{q=} must be between 0 and 1")
        cumulative = np.cumsum(counts, axis=-1, dtype=np.int64)
        total = cumulative[..., -1]
        rank = np.maximum(np.ceil(q * total).astype(np.int64), 1)
        bin_of_rank = np.argmax(cumulative >= rank[..., None], axis=-1)
        return np.where(total > 0, self.values[bin_of_rank], np.nan)
