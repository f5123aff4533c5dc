"""Is the scalar codebook the Lloyd-Max solution, and if not, which known mistake is it?"""

from __future__ import annotations

import numpy as np
from scipy import special

from turboq.conformance.adapters import codebook_bits
from turboq.conformance.sample import Sample
from turboq.conformance.verdict import Verdict, judge, not_claimed
from turboq.numbers import codebook as codebooks

# Any table within this of the least distortion is as good as exact: the Gaussian table costs 0.1
# to 0.3 % at D=128 (0.7 % at D=64, 4 bits), the mistakes below cost 3 to 100 %.
EXCESS = 0.01


def check_codebook(sample: Sample) -> Verdict:
    """Distortion of the table on the exact density against the exact optimum."""
    table = getattr(sample.adapter, "codebook", None)
    if table is None:
        return not_claimed("codebook", "no codebook offered")
    bits, dim = codebook_bits(sample.adapter), sample.adapter.dim
    if bits == 0:
        return not_claimed("codebook", "a one-bit sketch has no codebook")
    table = np.asarray(table, np.float64).ravel()
    if table.size != 2**bits:
        return judge(
            "codebook", False, f"{table.size} centroids, but {bits} bits address {2**bits}"
        )
    if not (np.all(np.isfinite(table)) and np.all(np.diff(table) > 0)):
        return judge("codebook", False, "centroids must be finite and strictly ascending")
    exact = codebooks.lloyd_max("sphere", bits, dim)
    least = codebooks.distortion("sphere", exact, dim)
    excess = codebooks.distortion("sphere", table, dim) / least - 1
    why = f"distortion {100 * excess:+.2f} % over the exact {bits}-bit table"
    return judge("codebook", excess <= EXCESS, why, _diagnose(table, exact, bits, dim))


def _diagnose(table: np.ndarray, exact: np.ndarray, bits: int, dim: int) -> str:
    """Names the mistake if it is a known one."""
    if np.max(np.abs(table + table[::-1])) > 0.02:
        return "not symmetric, so the Lloyd iteration was stopped before it converged"
    edges = codebooks.thresholds(exact)
    edges = edges[edges > 1e-9]
    if edges.size and np.all(np.min(np.abs(table[:, None] - edges), axis=0) <= 0.01 * edges):
        return "these are the Lloyd-Max thresholds, not the centroids"
    factor = float(table @ exact / (exact @ exact))
    if _close(table, factor * exact):
        return f"right shape, but {factor:.3f} times too large: wrong scale"
    levels = 2**bits
    middle = np.sqrt(2) * special.erfinv(2 * (np.arange(levels) + 0.5) / levels - 1)
    edge = special.ndtri(np.arange(levels + 1) / levels)
    mean = levels * np.diff(-np.exp(-(edge**2) / 2) / np.sqrt(2 * np.pi))
    if _close(table, middle) or _close(table, mean):
        return "bins of equal probability, not Lloyd-Max"
    return "not a fixed point of Lloyd-Max"


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 0.02 * np.abs(b).max()))
