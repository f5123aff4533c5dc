"""What is kept of every side of a layer: mergeable arrays, one table that says how.

`FIELDS` and `SIDES` drive everything: initial values, merging, checkpoints, files and their
validation. Every array has the heads as its leading axis (KV heads for k and v, query heads for q).
g is the gradient of the log likelihood at x (`passes`), nats per unit of x.

Merging. Integers and maxima are exact in any order and grouping. A float64 sum of m chunk results
c_i is within (m - 1) 2^-53 sum|c_i| of the exact sum, whatever the order (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd ed., eq. 4.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

from turboq.errors import TurboqError
from turboq_calibrate.observe.histogram import FloatBins

VERSION = 2  # of the meaning of these statistics; older ones are refused
CHANNEL_BINS = FloatBins(low=-16, high=16)
NORM_BINS = FloatBins(low=-16, high=24, signed=False)

# Which kinds of fields every side has. `_before`: before the rotary embedding, in layers with one.
SIDES: dict[str, tuple[str, ...]] = {
    "k": ("sums", "histograms", "gradients"),
    "k_before": ("sums", "histograms", "gradients"),
    "v": ("sums", "histograms", "gradients"),
    "q": ("sums", "histograms"),
    "q_before": ("sums",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatField:
    """One statistic: shape per head (D channels, C and N bins), type, how two parts merge."""

    name: str
    kind: str
    shape: tuple[str, ...]
    dtype: str
    reduce: str
    meaning: str


def _field(name: str, kind: str, shape: str, dtype: str, reduce: str, meaning: str) -> StatField:
    return StatField(
        name=name, kind=kind, shape=tuple(shape), dtype=dtype, reduce=reduce, meaning=meaning
    )


FIELDS = (
    _field("count", "sums", "", "int64", "sum", "vectors seen"),
    _field("sum", "sums", "D", "float64", "sum", "sum of x"),
    _field("second", "sums", "DD", "float64", "sum", "sum of x x^T, not centred"),
    _field("absmax", "histograms", "D", "float64", "max", "largest |x| of every channel"),
    _field("channels", "histograms", "DC", "int64", "sum", "channels over CHANNEL_BINS"),
    _field("norms", "histograms", "N", "int64", "sum", "|x| over NORM_BINS"),
    _field("fisher", "gradients", "DD", "float64", "sum", "sum of g g^T"),
    _field("energy", "gradients", "", "float64", "sum", "sum of |g|^2"),
    _field("weighted_sum", "gradients", "D", "float64", "sum", "sum of |g|^2 x"),
    _field("weighted_second", "gradients", "DD", "float64", "sum", "sum of |g|^2 x x^T"),
)
BY_NAME = {f.name: f for f in FIELDS}

Arrays = dict[str, np.ndarray]


def fields_of(side: str) -> tuple[StatField, ...]:
    """The fields that a side has."""
    return tuple(f for f in FIELDS if f.kind in SIDES[side])


def shape_of(field: StatField, heads: int, dim: int) -> tuple[int, ...]:
    """Full shape of a field."""
    sizes = {"D": dim, "C": CHANNEL_BINS.size, "N": NORM_BINS.size}
    return (heads, *(sizes[axis] for axis in field.shape))


def zeros(side: str, heads: int, dim: int) -> Arrays:
    """The neutral start of every sum and maximum."""
    return {f.name: np.zeros(shape_of(f, heads, dim), f.dtype) for f in fields_of(side)}


REDUCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add,
    "max": np.maximum,
}


def merge_arrays(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Arrays:
    """Field by field, by the rule in the table.

    Raises:
      TurboqError: different fields or shapes.
    """
    if a.keys() != b.keys():
        raise TurboqError(f"cannot merge statistics: fields {sorted(a)} and {sorted(b)} differ")
    for name in a:
        if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            raise TurboqError(
                f"cannot merge statistics: {name!r} is {a[name].dtype}{list(a[name].shape)} and "
                f"{b[name].dtype}{list(b[name].shape)}"
            )
    return {name: REDUCE[BY_NAME[name].reduce](a[name], b[name]) for name in a}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideStatistics:
    """Statistics of one side of one layer, all heads: host arrays by field name."""

    arrays: Arrays

    @property
    def heads(self) -> int:
        return self.arrays["sum"].shape[0]

    @property
    def dim(self) -> int:
        return self.arrays["sum"].shape[1]

    @property
    def count(self) -> Int[np.ndarray, "K"]:
        return self.arrays["count"]

    @property
    def absmax(self) -> Float[np.ndarray, "K D"]:
        return self.arrays["absmax"]

    @property
    def mean(self) -> Float[np.ndarray, "K D"]:
        """sum / count, float64 (zero for a head that was never seen)."""
        return self.arrays["sum"] / np.maximum(self.count, 1)[:, None]

    @property
    def second_moment(self) -> Float[np.ndarray, "K D D"]:
        """E[x x^T]."""
        return self.arrays["second"] / np.maximum(self.count, 1)[:, None, None]

    @property
    def covariance(self) -> Float[np.ndarray, "K D D"]:
        """E[x x^T] - mean mean^T.

        The subtraction costs 2^-52 (1 + (mean/std)^2) of a channel's variance; the float32 chunk
        sums (see `reduce`) were centred first and lose nothing to a large mean.
        """
        return _centred(self.second_moment, self.mean)

    @property
    def rms(self) -> Float[np.ndarray, "K"]:
        """sqrt(tr(covariance) / D): root mean square coordinate after the mean is removed."""
        # Rounding can leave a variance of a constant head a little below zero.
        variance = np.trace(self.covariance, axis1=1, axis2=2) / self.dim
        floor = 2.0**-50 * np.trace(self.second_moment, axis1=1, axis2=2) / self.dim
        return np.sqrt(np.where(variance > floor, variance, 0.0))

    @property
    def metric(self) -> Float[np.ndarray, "K D D"]:
        """1/2 E[g g^T]: nats per token and squared unit of x."""
        return self.arrays["fisher"] / (2 * np.maximum(self.count, 1))[:, None, None]

    @property
    def weighted_mean(self) -> Float[np.ndarray, "K D"]:
        """E[|g|^2 x] / E[|g|^2]; the plain mean of a head whose gradients are all zero."""
        energy, felt = self._energy
        return np.where(felt[:, None], self.arrays["weighted_sum"] / energy[:, None], self.mean)

    @property
    def weighted_covariance(self) -> Float[np.ndarray, "K D D"]:
        """Covariance about `weighted_mean` with every token counted by |g|^2 over its mean."""
        energy, felt = self._energy
        second = self.arrays["weighted_second"] / energy[:, None, None]
        weighted = _centred(second, self.weighted_mean)
        return np.where(felt[:, None, None], weighted, self.covariance)

    @property
    def _energy(self) -> tuple[np.ndarray, np.ndarray]:
        felt = self.arrays["energy"] > 0
        return np.where(felt, self.arrays["energy"], 1.0), felt

    def quantile(self, q: float) -> Float[np.ndarray, "K D"]:
        """Per-channel quantile, to CHANNEL_BINS.relative_error (1/17) for 2^-16 <= |x| < 2^16."""
        return CHANNEL_BINS.quantile(self.arrays["channels"], q)

    def norm_quantile(self, q: float) -> Float[np.ndarray, "K"]:
        """Quantile of |x|, to NORM_BINS.relative_error (1/17)."""
        return NORM_BINS.quantile(self.arrays["norms"], q)


def _centred(second: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return second - mean[:, :, None] * mean[:, None, :]


def merge_sides(a: SideStatistics, b: SideStatistics) -> SideStatistics:
    """Statistics of the union of two disjoint sets of tokens (module docstring: error bound)."""
    return SideStatistics(arrays=merge_arrays(a.arrays, b.arrays))
