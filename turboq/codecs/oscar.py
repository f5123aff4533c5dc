"""OSCAR-like: a rotation fitted to what attention does with K and V, clipping, INT2 per token.

    C = E V E^T (eigh, ascending),  y = P H E^T x,  |y_j| clipped at the row's own quantile,
    then asymmetric integers per token and group of channels (`turboq.codecs.affine`)

C is the second moment of the queries for K, sum of q q^T over the query heads of the KV head; for V
it is V^T S^T S V with S the attention weights, that is the second moment of attention *outputs*
(`score_weighted_moment`), or the plain one of V. H is the unsigned Hadamard, P the bit-reversal of
the order of falling eigenvalues.

What the description leaves open and is chosen here: one transform per KV head (the first release
had one per layer); second moments, no mean removed; at D = 2^k m with odd m > 1, where OSCAR is not
defined, H is that of `numbers.rotation` and P reverses the bits of the index over m; scale and
minimum in float16 instead of scale and zero point; codes nearest for the stored scale. P changes
which channels share a group and nothing else: with one group per token it has no effect.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs.affine import TokenAffine
from turboq.codecs.base import Arrays, Stored
from turboq.codecs.observed import Observed
from turboq.numbers import rotation as rotations

SINKS, RECENT = 64, 256  # OSCAR's exact tokens, for the plan's TokenPolicy
CLIP_PERCENT = {"k": 96, "v": 92}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oscar(TokenAffine):
    """x_hat = T^T y_hat with T [D, D] orthogonal from `fit_oscar`; INT2 unless `bits` says else.

    `clip_percent` p: entries beyond the (p D / 100)-th smallest |y| (counted from zero, rounded
    down, at most D - 1) are set to it, K 96 and V 92 in OSCAR, 100 for no clipping. A vector with
    fewer than (100 - p) % non-zero entries after T therefore decodes to zero.

    All-in bits per channel at D = 64, 128, 256 with one group: bits + 0.5, 0.25, 0.125; OSCAR's
    group of 128 at D = 256: bits + 0.25. Static transform, dynamic scales. Kernels read
    it as `int_affine`. Exact tokens (`SINKS`, `RECENT`) are the plan's.

    Arrays of one head, float32: transform [D, D], rows are the new axes.
    """

    name: ClassVar[str] = "oscar"
    source: ClassVar[str] = "OSCAR (arXiv 2605.17757) section 3"
    needs: ClassVar[tuple[str, ...]] = ("moments",)

    bits: int = 2
    clip_percent: int = 96

    def __post_init__(self):
        super().__post_init__()
        if type(self.clip_percent) is not int or not 50 <= self.clip_percent <= 100:
            raise ValueError(f"{self.clip_percent=} must be 50..100 (100: no clipping)")
        if self.rotation != "identity" or self.rotation_block:
            raise ValueError(f"{self.rotation=} must be 'identity': the fitted transform applies")

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"transform": (self.dim, self.dim)}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        """From the queries where they were observed (keys), else from the vectors themselves."""
        own = seen.covariance + seen.mean[:, :, None] * seen.mean[:, None, :]
        return fit_oscar(own if seen.queries is None else seen.queries)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        if self.clip_percent < 100:
            ordered = jnp.sort(jnp.abs(y), axis=-1)
            limit = ordered[..., self.clip_percent * self.dim // 100, None]
            y = jnp.clip(y, -limit, limit)
        return super().quantize(arrays, y)


def fit_oscar(second_moment: np.ndarray) -> dict[str, np.ndarray]:
    """{"transform": [..., D, D] float32} for second moments [..., D, D] of q (for K) or v (for V).

    Leading axes are heads. T = (E H P)^T with E the eigenvectors in ascending order.

    Raises:
      ValueError: not square, not finite or not symmetric.
    """
    c = np.asarray(second_moment, np.float64)
    if c.ndim < 2 or c.shape[-1] != c.shape[-2]:
        raise ValueError(f"second_moment {c.shape=} must be [..., D, D]")
    if not np.all(np.isfinite(c)):
        raise ValueError("second_moment must be finite: NaN or Inf found")
    mirrored = np.swapaxes(c, -1, -2)
    if not np.allclose(c, mirrored, rtol=1e-4, atol=1e-5 * np.max(np.abs(c), initial=0.0)):
        raise ValueError("second_moment must be symmetric")
    vectors = np.linalg.eigh((c + mirrored) / 2)[1]
    dim = c.shape[-1]
    matrix = vectors @ rotations.hadamard_matrix(dim).T
    order = np.empty(dim, np.int64)
    # Falling eigenvalues: the columns backwards (by Hadamard's symmetry, the same as signs of E).
    order[bit_reversal(dim)] = np.arange(dim)[::-1]
    return {"transform": np.swapaxes(matrix[..., order], -1, -2).astype(np.float32)}


def bit_reversal(dim: int) -> np.ndarray:
    """Permutation [D] that reverses the k bits of a in i = a m + c, D = 2^k m with odd m."""
    odd = dim // (dim & -dim)
    k = (dim // odd).bit_length() - 1
    a, c = np.divmod(np.arange(dim), odd)
    reverse = sum(((a >> bit) & 1) << (k - 1 - bit) for bit in range(k)) + 0 * a
    return reverse * odd + c


def score_weighted_moment(
    weights: Float[np.ndarray, "T S"], v: Float[np.ndarray, "S D"]
) -> Float[np.ndarray, "D D"]:
    """V^T S^T S V / T in float64: the second moment of one head's outputs; add over heads."""
    out = np.asarray(weights, np.float64) @ np.asarray(v, np.float64)
    return out.T @ out / len(out)
