"""Fits `turboq.cache.joint`: the basis of keys and values of several heads together. NumPy.

With C the covariance of x = [k of G heads, v of G heads] and M what an error costs, each head's
own metric on the diagonal (an error of one head is taken to cost nothing more for another's):

    M^1/2 C M^1/2 = V diag(l) V^T,   S = M^-1/2 V,   S^-1 = V^T M^1/2

so coordinates of y = S^-1 (x - mean) are uncorrelated, an error of any costs alike, and l falls:
bits follow l (`turboq.codecs.water_filling`), within units of D or E coordinates.

Source: as `turboq.codecs.fit_basis`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from turboq.codecs.fit_basis import RIDGE, fit_basis
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError

Arrays = dict[str, np.ndarray]

MOST = 512  # coordinates that are joined unless told: two matrices of so many squared per group
TOKENS_EACH = 4  # tokens seen per coordinate, at least: a covariance of fewer is noise


def heads_joined(kv_heads: int, k_dim: int, v_dim: int, tokens: int) -> int:
    """How many neighbouring heads are joined: what `MOST` coordinates and the tokens allow.

    One alone, its keys with its values, may have more coordinates. 0: too few tokens even for that.
    """
    each = k_dim + v_dim
    fit = [
        n
        for n in range(1, kv_heads + 1)
        if kv_heads % n == 0 and (n == 1 or n * each <= MOST) and n * each * TOKENS_EACH <= tokens
    ]
    return max(fit, default=0)


def fit_joint(k: Observed, v: Observed, heads: int, *, ridge: float = RIDGE) -> Arrays:
    """The arrays of `turboq.cache.joint.shapes`, of keys as they are stored and values of a layer,
    and `variances` [J, C] of the coordinates of y.

    Raises:
      TurboqError: no gradients (costs of keys and values cannot be compared), or fewer tokens than
        coordinates.
      ValueError: `heads` does not divide the layer's heads.
    """
    if heads < 1 or k.heads % heads:
        raise ValueError(f"{heads=} must divide {k.heads} KV heads")
    dim = heads * (k.dim + v.dim)
    for seen in (k, v):
        seen.require(("sample", "gradients"), "a joint transform", fewest=dim)
    means, turns, variances = [], [], []
    for first in range(0, k.heads, heads):
        own = range(first, first + heads)
        x = _joined(k.x, v.x, own)
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x - mean
        metric = np.zeros((dim, dim))
        at = 0
        for block in (seen.metric[h] for seen in (k, v) for h in own):
            metric[at : at + len(block), at : at + len(block)] = block
            at += len(block)
        basis = fit_basis(mean, centred.T @ centred / len(x), metric, ridge=ridge)
        means.append(mean)
        turns.append(basis.synthesis / np.sqrt(basis.variances))
        variances.append(basis.variances)
    if not all(np.all(np.isfinite(turn)) for turn in turns):
        raise TurboqError("a joint transform is not finite: some metric or covariance is too large")
    return {
        "mean": np.stack(means), "synthesis": np.stack(turns), "variances": np.stack(variances),
    }  # fmt: skip


def observed_units(k: Observed, v: Observed, fitted: Arrays) -> tuple[Observed, Observed]:
    """What was seen of the units in the place of keys and of values; moments are the sample's."""
    groups = len(fitted["mean"])
    heads = k.heads // groups
    keys, values = ([], []), ([], [])
    for j in range(groups):
        own = range(j * heads, (j + 1) * heads)
        turn = fitted["synthesis"][j].astype(np.float64)
        x = (_joined(k.x, v.x, own) - fitted["mean"][j]) @ np.linalg.inv(turn).T
        g = None if k.g is None or v.g is None else _joined(k.g, v.g, own) @ turn
        for part, y in enumerate((x, g)):
            if y is not None:
                at = heads * k.dim
                keys[part].extend(np.split(y[:, :at].astype(np.float32), heads, axis=1))
                values[part].extend(np.split(y[:, at:].astype(np.float32), heads, axis=1))
    sides = [
        Observed.of(np.stack(x), np.stack(g) if g else None, text=k.text) for x, g in (keys, values)
    ]
    return sides[0], sides[1]


def _joined(k: np.ndarray, v: np.ndarray, heads: range) -> Float[np.ndarray, "N C"]:
    return np.concatenate([x[h] for x in (k, v) for h in heads], axis=1, dtype=np.float64)
