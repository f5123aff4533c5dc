"""Rotations: identity, randomly signed Hadamard, Haar, each reproducible from (kind, dim, seed).

Randomness never comes from a library's normal or choice routine, whose streams change between
versions. It is raw 64-bit words of Philox-4x64-10 (Salmon et al., SC 2011) with

    key = seed + 2**64 * stream,  counter = 0

    sign:   +1 if the word's top bit is 0, else -1          (one word per sign)
    normal: ndtri(((word >> 11) + 1/2) * 2**-53)            (one word per normal, row-major)

so the signs are bit-exact everywhere and the normals are equal to rounding of `scipy.special.ndtri`
(1e-15). A golden test pins both.

Raises:
  ValueError: an unknown kind, or a dim or seed out of range.

Examples:
  >>> import jax.numpy as jnp
  >>> from turboq import rotation
  >>> turn = rotation.Rotation(kind="hadamard", dim=64, seed=0)
  >>> x = jnp.arange(64.0)
  >>> bool(jnp.allclose(turn.invert(turn.apply(x)), x, atol=1e-4))
  True
"""

# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt64
from scipy import special

KINDS = ("identity", "hadamard", "walsh", "haar")
STREAMS = {"hadamard": 0, "haar": 1, "sketch_gaussian": 2, "sketch_orthogonal": 3}
MAX_DIM = 8192  # a dense matrix of this size is 0.5 GB in float64

# Dense blocks above this size lose to one radix-4 stage on top of a smaller block. Measured on one
# AVX-512 core under jit, D=128: dense 4.4, radix-2 butterflies 2.5, this 9.2 M vectors/s; at D=64
# the dense product reaches 25 M/s, with and without a stage.
_DENSE_BLOCK = 64


def random_words(seed: int, stream: str, count: int) -> UInt64[np.ndarray, "count"]:
    """`count` raw uint64 words of the documented stream (module docstring)."""
    return np.random.Philox(key=seed + (STREAMS[stream] << 64)).random_raw(count)


def random_normals(seed: int, stream: str, shape: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    """Standard normals, float64, by inverse CDF of the documented stream."""
    words = random_words(seed, stream, int(np.prod(shape)))
    return special.ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(
        shape
    )


def haar_matrix(normals: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """Q of the QR of `normals` [D, D] with R's diagonal positive: Haar if the normals are iid.

    Mezzadri, "How to generate random matrices from the classical compact groups" (2007), eq. 5.
    """
    q, r = np.linalg.qr(normals)
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


@functools.lru_cache(maxsize=32)
def hadamard_matrix(dim: int) -> Float64[np.ndarray, "D D"]:
    """H_{2^k} (x) C_m [dim, dim], orthonormal, with dim = 2^k m, m odd.

    H is Sylvester's Hadamard matrix over sqrt(2^k), C the orthonormal DCT-II of the odd factor
    (C_1 = [1]), so that 80 = 16*5 and 96 = 32*3 work. Every entry is at most sqrt(2/dim).
    """
    odd = dim // (dim & -dim)
    n = np.arange(odd)
    matrix: np.ndarray = np.sqrt(2 / odd) * np.cos(
        np.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * odd)
    )
    matrix[0] = np.sqrt(1 / odd)
    h2 = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    while len(matrix) < dim:
        matrix = cast(np.ndarray, np.kron(h2, matrix))
    matrix.setflags(write=False)
    return matrix


def fast_transform(x: Float[Array, "*n D"], *, transpose: bool = False) -> Float[Array, "*n D"]:
    """x @ hadamard_matrix(D).T (or x @ hadamard_matrix(D)) in float32.

    H_D = H_4 (x) H_{D/4}: radix-4 stages of additions until the block is at most 64 wide, then one
    dense product: D*(D/4) multiplications instead of D*D at D=128 and 256.
    """
    dim = x.shape[-1]
    if dim > _DENSE_BLOCK and dim % 4 == 0:
        x = jax.lax.optimization_barrier(x)  # else XLA recomputes x in each of the four outputs
        y = x.reshape(*x.shape[:-1], 4, dim // 4)
        a, b, c, d = (y[..., i, :] for i in range(4))
        s, t, u, v = (a + b) * 0.5, (a - b) * 0.5, (c + d) * 0.5, (c - d) * 0.5
        mixed = jnp.stack([s + u, t + v, s - u, t - v], axis=-2)
        return fast_transform(mixed, transpose=transpose).reshape(x.shape)
    matrix = hadamard_matrix(dim).astype(np.float32)
    return product(x, matrix if transpose else matrix.T)


def product(x: Float[Array, "*n D"], matrix: Float[np.ndarray, "D C"]) -> Float[Array, "*n C"]:
    """x @ matrix in full float32 (TPU and GPU would otherwise round inputs to bf16 or TF32)."""
    return jnp.matmul(x, jnp.asarray(matrix, jnp.float32), precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def _signs(kind: str, dim: int, seed: int) -> np.ndarray:
    if kind == "hadamard":
        top = random_words(seed, "hadamard", dim) >> np.uint64(63)
        signs = 1.0 - 2.0 * top.astype(np.float64)
    else:
        signs = np.ones(dim)
    signs.setflags(write=False)
    return signs


@functools.lru_cache(maxsize=64)
def _matrix(kind: str, dim: int, seed: int) -> np.ndarray:
    if kind == "identity":
        matrix = np.eye(dim)
    elif kind in ("hadamard", "walsh"):
        matrix = hadamard_matrix(dim) * _signs(kind, dim, seed)
    else:
        matrix = haar_matrix(random_normals(seed, "haar", (dim, dim)))
    matrix.setflags(write=False)
    return matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """An orthogonal map of R^dim, y = R x, a constant of its description.

    hadamard: R = (H_{2^k} (x) C_m) diag(signs); walsh: the same without signs, as several engines
    ship it (a mean along a row of H then lands in one coordinate); haar: uniform on O(dim);
    identity: R = I. `seed` changes nothing for walsh and identity. TurboQuant (arXiv 2504.19874)
    Algorithm 1 uses haar; a randomly signed Hadamard has the same distortion to 0.3 % at these
    dims and costs far less.

    Raises:
      ValueError: unknown kind, dim not in 1..8192, or seed not in 0..2**63-1.
    """

    kind: str = "hadamard"
    dim: int
    seed: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind=} must be one of {KINDS}")
        check_dim_and_seed(self.dim, self.seed)

    @property
    def signs(self) -> np.ndarray:
        """Diagonal of random signs [D], float64; all ones unless hadamard."""
        return _signs(self.kind, self.dim, self.seed)

    @property
    def matrix(self) -> np.ndarray:
        """R [D, D], float64, orthogonal, read-only, cached."""
        return _matrix(self.kind, self.dim, self.seed)

    def apply(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """y = x @ R.T over the last axis, float32."""
        x = x.astype(jnp.float32)
        if self.kind == "identity":
            return x
        if self.kind == "haar":
            return product(x, self.matrix.T)
        return fast_transform(x * _row(self.signs, x.ndim))

    def invert(self, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """x = y @ R over the last axis, float32; invert(apply(x)) == x to rounding."""
        y = y.astype(jnp.float32)
        if self.kind == "identity":
            return y
        if self.kind == "haar":
            return product(y, self.matrix)
        return fast_transform(y, transpose=True) * _row(self.signs, y.ndim)


def check_dim_and_seed(dim: int, seed: int) -> None:
    """Raises ValueError unless dim is in 1..8192 and seed in 0..2**63-1 (ints, not bools)."""
    if type(dim) is not int or not 1 <= dim <= MAX_DIM:
        raise ValueError(f"{dim=} must be an integer from 1 to {MAX_DIM}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"{seed=} must be an integer from 0 to 2**63 - 1")


def _row(values: np.ndarray, ndim: int) -> Array:
    """A [D] constant with leading axes of one, because tests forbid implicit rank promotion."""
    return jnp.asarray(values, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
