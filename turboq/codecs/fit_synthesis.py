"""A synthesis of `transform` by least squares on the codes found, and search again.

The joint basis has S = A^-1, best for errors that are small and independent. At 1 to 3 bits they
are neither, so S (and the mean) are regressed on what the codes stand for, tokens weighted by what
an error costs there, and the encoder follows: with the metric F

    S, mean = argmin sum_n w_n |x_n - mean - S z_n|_F^2,    A = (S^T F S)^-1 S^T F

and coordinates count by the diagonal of S^T F S in a search. x_hat = mean + gain M bits with
M = S B (`turboq.numbers.window.bit_matrix`), so M is free in its D x C numbers S; B is the code's.

A fit to few tokens is a fit to their text. So it is made for every calibration text left out, and
kept only where each of those texts, unseen, then costs less than under the basis that saw them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from turboq.codecs.fit_basis import RIDGE, sample_weights
from turboq.codecs.fit_transform import fit_gains, vector_gains
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import PaddedTransform, pad_side

Arrays = dict[str, np.ndarray]

ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The sample of one head: x and gradients [N, D], weights [N], metric [D, D]."""

    x: Float[np.ndarray, "N D"]
    g: Float[np.ndarray, "N D"] | None
    weights: Float[np.ndarray, "N"]
    metric: Float[np.ndarray, "D D"]

    def cost(self, codec: Transform, arrays: Arrays, of: Bool[np.ndarray, "N"]) -> float:
        """Mean cost of the codec on some tokens, as `fit_transform.held_out_cost` counts it."""
        e = (self.x - arrays["mean"] - _values(codec, arrays, self.x) @ arrays["synthesis"].T)[of]
        quadratic = np.sum((e @ self.metric) * e, axis=1)
        if self.g is None:
            return float(np.mean(quadratic))
        slope = np.sum(self.g[of] * e, axis=1)
        return float(np.mean(0.5 * self.weights[of] * quadratic + 0.25 * np.square(slope)))


def free_synthesis(
    codecs: Sequence[Transform], arrays: Sequence[Arrays], seen: Observed
) -> list[Arrays]:
    """Arrays of all KV heads, those of them freed whose unseen texts agree.

    With one text there is none unseen: all stay as they are.
    """
    weights, out = sample_weights(seen), []
    for h, (codec, own) in enumerate(zip(codecs, arrays, strict=True)):
        g = None if seen.g is None else seen.g[h]
        tokens = _Tokens(seen.x[h], g, weights[h], seen.metric[h])
        out.append(_head(codec, own, tokens, seen.text))
    return out


def _head(codec: Transform, arrays: Arrays, tokens: _Tokens, text: np.ndarray) -> Arrays:
    texts = np.unique(text)
    if len(texts) < 2:
        return arrays
    for left_out in texts:
        unseen = text == left_out
        freed = _freed(codec, arrays, tokens, ~unseen)
        if not tokens.cost(codec, freed, unseen) < tokens.cost(codec, arrays, unseen):
            return arrays
    return _freed(codec, arrays, tokens, np.ones(len(text), bool))


def _freed(codec: Transform, arrays: Arrays, tokens: _Tokens, of: Bool[np.ndarray, "N"]) -> Arrays:
    for _ in range(ROUNDS):
        arrays = _step(codec, arrays, tokens, of)
    return arrays


def _step(codec: Transform, arrays: Arrays, tokens: _Tokens, of: Bool[np.ndarray, "N"]) -> Arrays:
    """Regression on the codes of these tokens, and the encoder that follows."""
    x, w = tokens.x[of].astype(np.float64), tokens.weights[of]
    z = np.append(_values(codec, arrays, tokens.x)[of], np.ones((len(x), 1)), axis=1)
    before = np.append(arrays["synthesis"], arrays["mean"][:, None], axis=1).astype(np.float64)
    weighted = z * (w / w.sum())[:, None]
    gram = weighted.T @ z
    # Pulled towards what was there, by as much as so many numbers from so few tokens are noise.
    pull = z.shape[1] * np.sum(w * w) / np.sum(w) ** 2
    gram += np.diag(pull * np.diag(gram) + 1e-12)
    both = before + np.linalg.solve(gram, weighted.T @ (x - z @ before.T)).T
    synthesis, mean = both[:, :-1], both[:, -1]
    dim = len(mean)
    metric = tokens.metric + np.eye(dim) * RIDGE * np.trace(tokens.metric) / dim
    inner = synthesis.T @ metric @ synthesis
    out = {
        "mean": mean,
        "analysis": np.linalg.solve(inner, synthesis.T @ metric),
        "synthesis": synthesis,
    }
    if codec.quantizer == "window":
        out["weights"] = np.diag(inner) / np.mean(np.diag(inner))
    if codec.gain == "code":
        y = (x - mean) @ out["analysis"].T
        out["gains"] = fit_gains(vector_gains(codec, y, out), 2**codec.gain_bits)
    return arrays | {name: a.astype(np.float32) for name, a in out.items()}


def _values(codec: Transform, arrays: Arrays, x: Float[np.ndarray, "N D"]) -> np.ndarray:
    """What the codes of x stand for, times the gain: [N, C], float64."""
    padded, data = pad_side([codec], [{n: jnp.asarray(a)[None] for n, a in arrays.items()}], [1])
    found = _coded(padded, {n: a[0] for n, a in data.items()}, jnp.asarray(x))
    return np.asarray(found, np.float64)[:, : codec.coded]


@functools.partial(jax.jit, static_argnums=0)
def _coded(
    codec: PaddedTransform, arrays: dict[str, Array], x: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    return codec.values(arrays, codec.encode(arrays, x))
