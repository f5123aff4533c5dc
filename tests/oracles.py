"""Independent float64 NumPy twins of the mathematics: definitions, no shared code with turboq."""

from __future__ import annotations

import itertools

import numpy as np
import scipy.fft
import scipy.linalg
from scipy import integrate, special

MASK = (1 << 64) - 1


def philox(key: int, count: int) -> list[int]:
    """Philox-4x64-10 words in plain integers (Salmon et al., SC 2011, section 3.3, table 2)."""
    words, counter = [], 0
    while len(words) < count:
        counter += 1  # NumPy's generator increments before each block
        c, k = [counter, 0, 0, 0], [key & MASK, key >> 64]
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 64) ^ c[3] ^ k[1], p0 & MASK]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        words += c
    return words[:count]


def hadamard_signs(seed: int, dim: int) -> np.ndarray:
    """+1 where the top bit of the word is 0, else -1."""
    return np.array([1.0 if w < 1 << 63 else -1.0 for w in philox(seed, dim)])


def rotation(kind: str, dim: int, seed: int) -> np.ndarray:
    """R [D, D]; Haar by plain Gram-Schmidt of the columns."""
    if kind == "identity":
        return np.eye(dim)
    if kind in ("hadamard", "walsh"):
        odd = dim
        while odd % 2 == 0:
            odd //= 2
        dct = scipy.fft.dct(np.eye(odd), axis=0, norm="ortho")
        h = np.kron(scipy.linalg.hadamard(dim // odd) / np.sqrt(dim // odd), dct)
        return h if kind == "walsh" else h @ np.diag(hadamard_signs(seed, dim))
    return gram_schmidt(normals(seed, 1, dim))


def normals(seed: int, stream: int, dim: int) -> np.ndarray:
    """[dim, dim] standard normals of a documented stream by inverse CDF."""
    words = philox(seed + (stream << 64), dim * dim)
    return special.ndtri([((w >> 11) + 0.5) * 2.0**-53 for w in words]).reshape(dim, dim)


def gram_schmidt(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal columns, each with a positive component along its original."""
    q = matrix.copy()
    for i in range(len(q)):
        for _ in range(2):  # twice is enough (Kahan)
            q[:, i] -= q[:, :i] @ (q[:, :i].T @ q[:, i])
        q[:, i] /= np.linalg.norm(q[:, i])
    return q


def density(source: str, t: float, dim: int | None) -> float:
    """Density of a unit-variance coordinate."""
    if source == "gaussian":
        return float(np.exp(-t * t / 2) / np.sqrt(2 * np.pi))
    assert dim is not None
    constant = special.gamma(dim / 2) / (np.sqrt(np.pi) * special.gamma((dim - 1) / 2))
    return float(constant * max(0.0, 1 - t * t / dim) ** ((dim - 3) / 2) / np.sqrt(dim))


def cell_moments(source: str, codebook: np.ndarray, dim: int | None) -> np.ndarray:
    """Integrals [3, levels] of f, t f, t^2 f over the nearest-centroid cells, by quadrature."""
    end = np.sqrt(dim) if source == "sphere" and dim else 12.0
    edges = np.concatenate([[-end], (codebook[1:] + codebook[:-1]) / 2, [end]])
    return np.array(
        [
            [
                integrate.quad(lambda t, k=k: t**k * density(source, t, dim), a, b, epsabs=1e-13)[0]
                for a, b in itertools.pairwise(edges)
            ]
            for k in range(3)
        ]
    )


def kmeans_1d(w: np.ndarray, x: np.ndarray, levels: int) -> tuple[float, np.ndarray]:
    """Least weighted squared error and its centroids by the plain O(n^2 levels) programme."""
    n = len(x)

    def cost(i: int, j: int) -> float:
        mean = np.average(x[i:j], weights=w[i:j])
        return float(np.sum(w[i:j] * (x[i:j] - mean) ** 2))

    costs = {(i, j): cost(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    best = {j: (costs[0, j], (0,)) for j in range(1, n + 1)}
    for k in range(2, levels + 1):
        best = {
            j: min((best[i][0] + costs[i, j], (*best[i][1], i)) for i in range(k - 1, j))
            for j in range(k, n + 1)
        }
    total, starts = best[n]
    ends = (*starts[1:], n)
    return total, np.array(
        [np.average(x[i:j], weights=w[i:j]) for i, j in zip(starts, ends, strict=True)]
    )


def word_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of codes [S, C] straight from the definition of the layout, entry by entry."""
    tokens, channels = codes.shape
    words = [
        [[[0] * channels for _ in range(8)] for _ in range(bits)] for _ in range(tokens // 256)
    ]
    for token in range(tokens):
        page, within = divmod(token, 256)
        j, r = divmod(within, 8)
        for c in range(channels):
            for p in range(bits):
                words[page][p][r][c] |= (int(codes[token, c]) >> p & 1) << j
    return np.array(words, np.uint32)


def scale(rule: str, u: np.ndarray, c: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """Scale rules by their defining property, for non-zero vectors."""
    uu, uc, cc = (np.sum(a * b, -1) for a, b in ((u, u), (u, c), (c, c)))
    return (
        rms
        * {
            "raw": np.ones_like(uu),
            "matched": np.sqrt(uu / cc),  # |x_hat| = |x|
            "unbiased": uu / uc,  # <x, x_hat> = |x|^2
            "least_squares": uc / cc,  # x - x_hat orthogonal to x_hat
        }[rule]
    )


def nearest(codebook: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Code of the nearest centroid by exhaustive search; the lower one of two at equal distance."""
    return np.argmin(np.abs(u[..., None] - codebook), axis=-1)


def water_filling(bits: float, variances: np.ndarray) -> float:
    """D(R) of a Gaussian source by bisection on the water level."""
    low, high = 0.0, float(np.max(variances))
    for _ in range(200):
        level = (low + high) / 2
        rate = np.sum(0.5 * np.log2(np.maximum(variances / level, 1.0)))
        low, high = (level, high) if rate > bits else (low, level)
    return float(np.sum(np.minimum(variances, high)))
