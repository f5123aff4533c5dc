"""Scalar codebooks: Lloyd-Max for known densities, nearest code, lookup. Fitting is in `fitting`.

Scale convention: every codebook is for coordinates of unit variance. `sphere` is one coordinate of
a uniform point on the sphere of R^d times sqrt(d); its limit for large d is `gaussian`.

    sphere, x = t / sqrt(d):  f(x) = Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) (1 - x^2)^((d-3)/2)
                              (TurboQuant, arXiv 2504.19874, Lemma 1;  x^2 ~ Beta(1/2, (d-1)/2))
    Lloyd-Max:  c_i = E[t | t_{i-1} < t < t_i],  t_i = (c_i + c_{i+1}) / 2   (Lloyd 1982, Max 1960)

Both densities are log-concave for d >= 3, so the solution is unique and symmetric (Fleischer 1964).

Raises:
  ValueError: an unknown density, bits outside 1 to 8, or a sphere of fewer than 3 dimensions.

Examples:
  >>> from turboq import codebook
  >>> codebook.lloyd_max("gaussian", 2).round(4).tolist()
  [-1.5104, -0.4528, 0.4528, 1.5104]
  >>> round(codebook.distortion("gaussian", codebook.lloyd_max("gaussian", 2)), 4)
  0.1175
"""

# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8
from scipy import special

from turboq.numbers.codebook_fitting import fit_histogram as fit_histogram
from turboq.numbers.codebook_fitting import fit_samples as fit_samples

SOURCES = ("sphere", "gaussian")
MAX_BITS = 8

# Above this many levels a table gather replaces the tree of selects in `lookup`.
_SELECT_LEVELS = 16


def _check(source: str, dim: int | None) -> None:
    if source not in SOURCES:
        raise ValueError(f"{source=} must be one of {SOURCES}")
    if source == "sphere" and (dim is None or dim < 3):
        raise ValueError(f"{dim=} must be an integer of at least 3 for source='sphere'")


def _density(source: str, dim: int | None, t: np.ndarray) -> np.ndarray:
    """f(t) for t >= 0."""
    if source == "gaussian":
        return np.exp(-0.5 * t * t) / np.sqrt(2 * np.pi)
    assert dim is not None
    return _peak(dim) * np.maximum(1 - t * t / dim, 0.0) ** ((dim - 3) / 2)


def _peak(dim: int) -> float:
    """f(0) of the sphere in unit-variance scale."""
    log_ratio = special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2)
    return float(np.exp(log_ratio) / np.sqrt(np.pi * dim))


def _tails(source: str, dim: int | None, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integrals of f and t f from t to infinity, for t >= 0 (t may be inf).

    Tails, not cumulatives: the outer cells hold little mass and would lose it to cancellation.
    """
    if source == "gaussian":
        return special.ndtr(-t), _density(source, dim, t)
    assert dim is not None
    x2 = np.minimum(t * t / dim, 1.0)
    m0 = 0.5 * special.betaincc(0.5, (dim - 1) / 2, x2)
    m1 = _peak(dim) * dim / (dim - 1) * (1 - x2) ** ((dim - 1) / 2)
    return m0, m1


@functools.lru_cache(maxsize=128)
def lloyd_max(source: str, bits: int, dim: int | None = None) -> Float64[np.ndarray, "levels"]:
    """Optimal 2**bits centroids [2**bits], float64, ascending, symmetric, unit-variance scale.

    Newton's method on the fixed-point equations of the positive half (tridiagonal Jacobian), from
    companded quantiles (density^(1/3), Panter-Dite): about six steps to rounding, where Lloyd's
    iteration needs thousands at 8 bits.

    Raises:
      ValueError: unknown source, bits not in 1..8, or no dim >= 3 for the sphere.
    """
    _check(source, dim)
    if type(bits) is not int or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits=} must be an integer from 1 to {MAX_BITS}")
    half = 2 ** (bits - 1)
    # The cube root of a unit-variance normal density is a normal of variance 3.
    c = np.sqrt(3.0) * special.ndtri(0.5 + 0.5 * (np.arange(half) + 0.5) / half)
    if source == "sphere":
        assert dim is not None
        c = c / np.sqrt(1 + c * c / dim)  # maps the line into the ball of radius sqrt(d)
    for _ in range(20):
        c = _cells(source, dim, c)[2]
    size = np.inf
    for _ in range(100):
        step = _newton_step(source, dim, c)
        while not _ascending(c + step):
            step = 0.5 * step
        c = c + step
        # Quadratic convergence ends in rounding noise (about 1e-11 at 8 bits): stop there.
        size, before = np.max(np.abs(step)), size
        if size < 1e-8 and size >= 0.1 * before:
            break
    else:
        raise RuntimeError(f"lloyd_max({source=}, {bits=}, {dim=}): last step {size}")
    codebook = np.concatenate([-c[::-1], c])
    codebook.setflags(write=False)
    return codebook


def _ascending(c: np.ndarray) -> bool:
    return bool(c[0] > 0 and np.all(np.diff(c) > 0))


def _cells(
    source: str, dim: int | None, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell edges [n+1] (0 and infinity outside), masses [n] and centroids [n] of the half."""
    edges = np.concatenate([[0.0], 0.5 * (c[1:] + c[:-1]), [np.inf]])
    m0, m1 = _tails(source, dim, edges)
    mass = m0[:-1] - m0[1:]
    return edges, mass, (m1[:-1] - m1[1:]) / mass


def _newton_step(source: str, dim: int | None, c: np.ndarray) -> np.ndarray:
    """Solves J step = centroid(c) - c with J = d(c - centroid)/dc."""
    edges, mass, centroid = _cells(source, dim, c)
    f = np.zeros_like(edges)
    f[1:-1] = _density(source, dim, edges[1:-1])  # outer edges do not move
    lower = f[:-1] * (centroid - edges[:-1]) / mass  # d centroid / d lower edge
    upper = f[1:-1] * (edges[1:-1] - centroid[:-1]) / mass[:-1]
    jacobian = np.eye(len(c)) - 0.5 * np.diag(lower)
    i = np.arange(len(c) - 1)
    jacobian[i, i] -= 0.5 * upper
    jacobian[i, i + 1] -= 0.5 * upper
    jacobian[i + 1, i] -= 0.5 * lower[1:]
    return np.linalg.solve(jacobian, centroid - c)


def thresholds(codebook: Float[np.ndarray, "levels"]) -> Float64[np.ndarray, "edges"]:
    """Midpoints [levels-1] between neighbouring centroids, float64."""
    c = np.asarray(codebook, np.float64)
    return 0.5 * (c[1:] + c[:-1])


def _moments(source: str, codebook: np.ndarray, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Integrals of f and t f over each cell of any sorted codebook: two arrays [levels]."""
    edges = np.concatenate([[-np.inf], thresholds(codebook), [np.inf]])
    m0, m1 = _tails(source, dim, np.abs(edges))
    # Below a negative edge lies the mirrored tail. Cells above zero are differences of tails, which
    # unlike differences of cumulatives do not cancel far out.
    mass = np.diff(np.where(edges < 0, m0, 1 - m0))
    mass = np.where(edges[:-1] >= 0, m0[:-1] - m0[1:], mass)
    return mass, m1[:-1] - m1[1:]  # the first moment below an edge is minus its tail, either side


def distortion(source: str, codebook: Float[np.ndarray, "levels"], dim: int | None = None) -> float:
    """Mean squared error E[(t - c(t))^2] of nearest-centroid coding of a unit-variance coordinate.

    For Lloyd-Max D(b) is 0.1175, 0.03455, 0.009501 at 2, 3, 4 bits (Gaussian).
    """
    _check(source, dim)
    c = np.asarray(codebook, np.float64)
    mass, first = _moments(source, c, dim)
    return float(1 + np.sum(c * (c * mass - 2 * first)))  # 1 is the variance


def entropy(source: str, codebook: Float[np.ndarray, "levels"], dim: int | None = None) -> float:
    """Entropy of the codes in bits: what ideal entropy coding would store per coordinate."""
    _check(source, dim)
    p = _moments(source, np.asarray(codebook, np.float64), dim)[0]
    return float(-np.sum(special.xlogy(p, p)) / np.log(2))  # pyright: ignore


def nearest(codebook: Float[Array, "levels"], u: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Code of the nearest centroid (codebook ascending): the number of thresholds below u.

    A value exactly on a threshold takes the lower code; -0.0 and 0.0 take the same code.
    """
    levels = codebook.shape[0]
    t = 0.5 * (codebook[1:] + codebook[:-1])
    # Sums of comparisons vectorise, a search by gathers does not: 30 against 6 M vectors/s at
    # 3 bits, 14 against 5 at 4 bits, 3.0 against 2.3 at 6 bits (D=128, one AVX-512 core, jit).
    if levels <= 64:
        code = jnp.zeros(u.shape, jnp.uint8)
        for i in range(levels - 1):  # of `lax`: of up to 63 rounds much less is traced
            above = jax.lax.gt(u, jax.lax.broadcast(_entry(t, i), u.shape))
            code = jax.lax.add(code, jax.lax.convert_element_type(above, jnp.uint8))
        return materialized(code)
    # Binary search: the code is built from its top bit, all thresholds being sorted.
    code = jnp.zeros(u.shape, jnp.int32)
    step = 1 << ((levels - 1).bit_length() - 1)
    while step:
        above = u > t.at[jnp.minimum(code + (step - 1), levels - 2)].get(mode="promise_in_bounds")
        fits = code + step < levels
        code = jnp.where(above & fits, code + step, code)
        step //= 2
    return materialized(code.astype(jnp.uint8))


def _entry(values: Float[Array, "n"], index: int) -> Float[Array, ""]:
    return jax.lax.index_in_dim(values, index, keepdims=False)


def materialized(code: UInt8[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Keeps XLA from fusing the search into its readers, which would repeat it per bit plane."""
    return jax.lax.optimization_barrier(code)


@functools.partial(jax.jit, inline=True)  # traced once for all readers of the same shapes
def lookup(codebook: Float[Array, "levels"], codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Centroid of each code: a tree of selects up to 16 levels, a gather above.

    Measured alike on CPU (38 and 33 M vectors/s at 3 bits, D=128), but gathers are slow on TPU and
    keep XLA from fusing there; at 64 levels the tree is over 4 times slower.
    """
    levels = codebook.shape[0]
    if levels > _SELECT_LEVELS:
        return codebook.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    values = [jax.lax.broadcast(_entry(codebook, i), codes.shape) for i in range(levels)]
    bit = 0
    while len(values) > 1:
        odd = ((codes >> bit) & jnp.uint8(1)) == 1
        pairs = [jax.lax.select(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]  # an odd count keeps its last one
        bit += 1
    return values[0]
