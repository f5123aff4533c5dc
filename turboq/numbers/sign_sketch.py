"""One-bit sign sketch of a residual (QJL) and its unbiased inner product.

    z = sign(S r) in {-1, +1}^D,  gamma = |r|,  <y, r>  ~=  a gamma <S y, z>

    gaussian    S_ij iid N(0, 1)   a = sqrt(pi/2) / D            QJL, arXiv 2406.03482;
                                                                 TurboQuant 2504.19874, Alg. 2
    orthogonal  S Haar             a = sqrt(pi) Gamma((D+1)/2) / (D Gamma(D/2)) = 1 / (D E|X|)
                                   with X one coordinate of a uniform point of the sphere

Both are unbiased over S. Variances (`numbers.distortion.sketch_variance`): the orthogonal one is
(pi/2 - 1) / (pi/2), about a third, of the Gaussian one for a query orthogonal to r.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import special

from turboq.numbers.rotation import check_dim_and_seed, haar_matrix, product, random_normals

KINDS = ("gaussian", "orthogonal")


@functools.lru_cache(maxsize=32)
def _matrix(kind: str, dim: int, seed: int) -> np.ndarray:
    matrix = random_normals(seed, f"sketch_{kind}", (dim, dim))
    if kind == "orthogonal":
        matrix = haar_matrix(matrix)
    matrix.setflags(write=False)
    return matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketch:
    """A square sign sketch of R^dim, a constant of its description.

    Raises:
      ValueError: unknown kind, dim or seed out of range.
    """

    kind: str = "gaussian"
    dim: int
    seed: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind=} must be one of {KINDS}")
        check_dim_and_seed(self.dim, self.seed)

    @property
    def matrix(self) -> np.ndarray:
        """S [D, D], float64, read-only, cached; independent of the rotation of the same seed."""
        return _matrix(self.kind, self.dim, self.seed)

    @property
    def constant(self) -> float:
        """a of the module docstring: E[a gamma <S y, 2 signs - 1>] = <y, r>."""
        if self.kind == "gaussian":
            return float(np.sqrt(np.pi / 2) / self.dim)
        ratio = special.gammaln((self.dim + 1) / 2) - special.gammaln(self.dim / 2)
        return float(np.sqrt(np.pi) * np.exp(ratio) / self.dim)

    def apply(self, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """S y over the last axis."""
        return product(y, self.matrix.T)

    def encode(self, r: Float[Array, "*n D"]) -> tuple[UInt8[Array, "*n D"], Float[Array, "*n"]]:
        """(signs, gamma): signs 1 where S r >= 0, else 0; gamma = |r|, zero for r = 0."""
        signs = (self.apply(r) >= 0).astype(jnp.uint8)
        return signs, jnp.sqrt(jnp.sum(r * r, axis=-1))

    def decode(
        self, signs: UInt8[Array, "*n D"], gamma: Float[Array, "*n"]
    ) -> Float[Array, "*n D"]:
        """a gamma S^T z: the vector whose inner product with y is the estimate of <y, r>."""
        return product(plus_minus(signs), self.matrix) * (self.constant * gamma)[..., None]


def plus_minus(signs: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """0/1 to -1/+1 in float32."""
    return signs.astype(jnp.float32) * 2.0 - 1.0
