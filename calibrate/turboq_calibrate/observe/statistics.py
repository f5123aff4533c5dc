"""What calibration keeps of q, k and v: mergeable arrays per layer, one table that says how.

`FIELDS` drives everything: initial values, merging, checkpoints, files and their validation. Every
array has the heads as its leading axis (KV heads for k and v, query heads for q).

Merging. Integers and maxima are exact in any order and grouping. A float64 sum of m chunk results
c_i is within (m - 1) 2^-53 sum|c_i| of the exact sum, whatever the order (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd ed., eq. 4.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Float, Int

from turboq.errors import TurboqError
from turboq.numbers.rotation import Rotation
from turboq_calibrate.observe.histogram import CodeBins, FloatBins

VERSION = 1  # of the meaning of these statistics; older ones are refused
CHANNEL_BINS = FloatBins(low=-16, high=16)
NORM_BINS = FloatBins(low=-16, high=24, signed=False)
CODE_BINS = CodeBins()
SIDES = ("k", "v", "q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatField:
    """One statistic of one side (k, v or q): shape per head, type, how two parts merge."""

    name: str
    sweep: int  # 1: moments; 2: needs the mean of sweep 1
    shape: tuple[str, ...]  # after the heads: D channels, C/N/S bins
    dtype: str
    reduce: str
    meaning: str


FIELDS = (
    StatField(name="count", sweep=1, shape=(), dtype="int64", reduce="sum", meaning="vectors seen"),
    StatField(name="sum", sweep=1, shape=("D",), dtype="float64", reduce="sum", meaning="sum of x"),
    StatField(
        name="second",
        sweep=1,
        shape=("D", "D"),
        dtype="float64",
        reduce="sum",
        meaning="sum of x x^T, not centred",
    ),
    StatField(
        name="absmax",
        sweep=1,
        shape=("D",),
        dtype="float64",
        reduce="max",
        meaning="largest |x| of every channel",
    ),
    StatField(
        name="channels",
        sweep=1,
        shape=("D", "C"),
        dtype="int64",
        reduce="sum",
        meaning="histogram of every channel over CHANNEL_BINS",
    ),
    StatField(
        name="norms",
        sweep=1,
        shape=("N",),
        dtype="int64",
        reduce="sum",
        meaning="histogram of |x| over NORM_BINS",
    ),
    StatField(
        name="center",
        sweep=2,
        shape=("D",),
        dtype="float32",
        reduce="equal",
        meaning="mean that sweep 2 removed",
    ),
    StatField(
        name="scale",
        sweep=2,
        shape=(),
        dtype="float32",
        reduce="equal",
        meaning="root mean square coordinate of x - center that sweep 2 divided by",
    ),
    StatField(
        name="centered_norms",
        sweep=2,
        shape=("N",),
        dtype="int64",
        reduce="sum",
        meaning="histogram of |x - center| over NORM_BINS",
    ),
    StatField(
        name="vector_counts",
        sweep=2,
        shape=("S",),
        dtype="int64",
        reduce="sum",
        meaning="histogram of y / rms(y), y = R (x - center), over CODE_BINS",
    ),
    StatField(
        name="vector_moments",
        sweep=2,
        shape=("S",),
        dtype="int64",
        reduce="sum",
        meaning="first moments of vector_counts",
    ),
    StatField(
        name="head_counts",
        sweep=2,
        shape=("S",),
        dtype="int64",
        reduce="sum",
        meaning="histogram of y / scale over CODE_BINS",
    ),
    StatField(
        name="head_moments",
        sweep=2,
        shape=("S",),
        dtype="int64",
        reduce="sum",
        meaning="first moments of head_counts",
    ),
    StatField(
        name="head_clipped",
        sweep=2,
        shape=(),
        dtype="int64",
        reduce="sum",
        meaning="coordinates of head_counts beyond CODE_BINS.limit",
    ),
)
BY_NAME = {f.name: f for f in FIELDS}

Arrays = dict[str, np.ndarray]


def fields_of(side: str, sweep: int | None = None) -> tuple[StatField, ...]:
    """Fields of a side; queries are never stored, so they have sweep 1 only."""
    return tuple(
        f
        for f in FIELDS
        if (sweep is None or f.sweep == sweep) and not (side == "q" and f.sweep == 2)
    )


def shape_of(field: StatField, heads: int, dim: int) -> tuple[int, ...]:
    """Full shape of a field."""
    sizes = {"D": dim, "C": CHANNEL_BINS.size, "N": NORM_BINS.size, "S": CODE_BINS.size}
    return (heads, *(sizes[axis] for axis in field.shape))


def zeros(side: str, sweep: int, heads: int, dim: int) -> Arrays:
    """The neutral start of every sum and maximum of one sweep ("equal" fields: not yet known)."""
    return {
        f.name: np.zeros(shape_of(f, heads, dim), f.dtype)
        for f in fields_of(side, sweep)
        if f.reduce != "equal"
    }


def _equal(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not np.array_equal(a, b):
        raise TurboqError(
            f"cannot merge statistics with different {name!r}: both parts must use the mean and "
            f"scale of the merged first sweep"
        )
    return a


REDUCE: dict[str, Callable[[str, np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": lambda name, a, b: a + b,
    "max": lambda name, a, b: np.maximum(a, b),
    "equal": _equal,
}


def merge_arrays(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Arrays:
    """Field by field, by the rule in the table.

    Raises:
      TurboqError: different fields or shapes, or different values of an "equal" field.
    """
    if a.keys() != b.keys():
        raise TurboqError(f"cannot merge statistics: fields {sorted(a)} and {sorted(b)} differ")
    for name in a:
        if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            raise TurboqError(
                f"cannot merge statistics: {name!r} is {a[name].dtype}{list(a[name].shape)} and "
                f"{b[name].dtype}{list(b[name].shape)}"
            )
    return {name: REDUCE[BY_NAME[name].reduce](name, a[name], b[name]) for name in a}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SideStatistics:
    """Statistics of k, v or q of one layer, all heads: host arrays by field name.

    `rotation` is the R of sweep 2 (None before it, and for queries).
    """

    arrays: Arrays
    rotation: Rotation | None = dataclasses.field(default=None, metadata={"static": True})

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
        sums (see `reduce.moments`) were centred first and lose nothing to a large mean.
        """
        mean = self.mean
        return self.second_moment - mean[:, :, None] * mean[:, None, :]

    @property
    def rms(self) -> Float[np.ndarray, "K"]:
        """sqrt(tr(covariance) / D): root mean square coordinate after the mean is removed."""
        # Rounding can leave a variance of a constant head a little below zero.
        variance = np.trace(self.covariance, axis1=1, axis2=2) / self.dim
        floor = 2.0**-50 * np.trace(self.second_moment, axis1=1, axis2=2) / self.dim
        return np.sqrt(np.where(variance > floor, variance, 0.0))

    def quantile(self, q: float) -> Float[np.ndarray, "K D"]:
        """Per-channel quantile, to CHANNEL_BINS.relative_error (1/17) for 2^-16 <= |x| < 2^16."""
        return CHANNEL_BINS.quantile(self.arrays["channels"], q)

    def norm_quantile(self, q: float, *, centered: bool = False) -> Float[np.ndarray, "K"]:
        """Quantile of |x|, or of |x - center|, to NORM_BINS.relative_error (1/17)."""
        return NORM_BINS.quantile(self.arrays["centered_norms" if centered else "norms"], q)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one layer."""

    k: SideStatistics
    v: SideStatistics
    q: SideStatistics


def merge_sides(a: SideStatistics, b: SideStatistics) -> SideStatistics:
    """Statistics of the union of two disjoint sets of tokens (module docstring: error bound)."""
    if a.rotation != b.rotation:
        raise TurboqError(f"cannot merge statistics over {a.rotation} and {b.rotation}")
    return SideStatistics(arrays=merge_arrays(a.arrays, b.arrays), rotation=a.rotation)


def merge(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """`merge_sides` of k, v and q."""
    return LayerStatistics(
        k=merge_sides(a.k, b.k), v=merge_sides(a.v, b.v), q=merge_sides(a.q, b.q)
    )
