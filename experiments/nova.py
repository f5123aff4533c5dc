"""A baseline like NOVA-KV: keys in the joint basis of K and Q, 4 coordinates as one of 256 points.

    Q^1/2 C Q^1/2 = V diag(v) V^T,   A = V^T Q^1/2,   y = A (k - mean),   u = y / rms(y)
    x_hat = mean + A^-1 (rms c),     c of each group of 4 coordinates: the nearest of its 256 points

Q is the second moment of the queries that read a head, C the covariance of its keys, so an error of
y counts as it does in logits. Ranked by variance, coordinates are dealt to D / 4 groups to and fro:
every group spans the spectrum, of equal volume where variances fall geometrically. Points are found
by k-means on the sampled tokens. Values are those of OSCAR at 2 bits (`turboq.codecs.oscar`).

Stated from what is public (arXiv 2608.04074, Amir-zsh/nova-kv). Left out or chosen here: points are
float32 and not FP8, tokens kept exact are the experiment's, groups are dealt to and fro instead of
round and round, 10 rounds of k-means from points of the sample.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.fit_basis import fit_basis
from turboq.codecs.observed import Observed
from turboq.codecs.oscar import CLIP_PERCENT, Oscar
from turboq.codecs.scalar import dot
from turboq.codecs.transformed import TransformedCodec
from turboq.errors import TurboqError
from turboq.numbers import scale as scales

GROUP, POINTS, ROUNDS = 4, 256, 10
RIDGE = 1e-6  # of Q, so that it has an inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class NovaKey(TransformedCodec):
    """8 bits for 4 coordinates and a float16 size: 2 + 16 / D bits per channel, D a multiple of 4.

    Arrays of one head, float32: mean [D], analysis [D, D], synthesis [D, D] its inverse, points
    [D / 4, 256, 4] in coordinates of unit size.
    """

    name: ClassVar[str] = "nova.key"
    source: ClassVar[str] = "arXiv 2608.04074"
    needs: ClassVar[tuple[str, ...]] = ("moments", "sample")

    @property
    def fields(self) -> tuple[Field, ...]:
        return (
            Field(name="codes", width=self.dim // GROUP, bits=8, dtype="codes"),
            Field(name="scale", width=1, bits=16, dtype="float16"),
        )

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        square = (self.dim, self.dim)
        points = (self.dim // GROUP, POINTS, GROUP)
        return {"mean": (self.dim,), "analysis": square, "synthesis": square, "points": points}

    @property
    def fewest_tokens(self) -> int:
        return 2 * POINTS

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        if seen.queries is None:
            raise TurboqError(f"codec {self.name} is for keys: no queries were observed here")
        found = [self._fit_head(seen, h) for h in range(seen.heads)]
        return {name: np.stack([head[name] for head in found]) for name in self.array_shapes}

    def _fit_head(self, seen: Observed, h: int) -> dict[str, np.ndarray]:
        assert seen.queries is not None
        basis = fit_basis(seen.mean[h], seen.covariance[h], seen.queries[h], ridge=RIDGE)
        order, size = dealt(self.dim), np.sqrt(basis.variances)  # the basis has unit variances
        analysis = (basis.analysis * size[:, None])[order]
        y = (seen.x[h] - basis.mean) @ analysis.T
        rms = np.sqrt(np.mean(y * y, axis=1, keepdims=True))
        u = np.divide(y, rms, out=np.zeros_like(y), where=rms > 0).astype(np.float32)
        return {
            "mean": basis.mean,
            "analysis": analysis,
            "synthesis": (basis.synthesis / size)[:, order],
            "points": np.asarray(_k_means(jnp.asarray(u.reshape(len(u), -1, GROUP)))),
        }

    def forward(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return dot(x.reshape(-1, self.dim), arrays["analysis"].T).reshape(x.shape)

    def backward(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return dot(y.reshape(-1, self.dim), arrays["synthesis"].T).reshape(y.shape)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        q = q.astype(jnp.float32)
        offset = dot(q, arrays["mean"][:, None])[:, 0]
        return {"q": dot(q, arrays["synthesis"]), "offset": offset}

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        u, rms = scales.unit_rms(y)
        groups = u.reshape(-1, self.dim // GROUP, GROUP).swapaxes(0, 1)
        codes = jax.lax.map(lambda pair: _nearest(*pair), (arrays["points"], groups))
        codes = codes.T.reshape(*y.shape[:-1], self.dim // GROUP)
        return {"codes": codes.astype(jnp.uint8), "scale": rms.astype(jnp.float16)[..., None]}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        codes = stored["codes"].astype(jnp.int32)
        group = jnp.arange(self.dim // GROUP, dtype=jnp.int32).reshape(
            (1,) * (codes.ndim - 1) + (-1,)
        )
        values = arrays["points"].at[group, codes].get(mode="promise_in_bounds")
        return values.reshape(*codes.shape[:-1], self.dim) * stored["scale"].astype(jnp.float32)


def dealt(dim: int) -> Int[np.ndarray, "D"]:
    """Ranks of variance in the order of groups: those of group 0 first, dealt to and fro."""
    rounds = np.arange(dim).reshape(GROUP, dim // GROUP)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.reshape(-1)


def _nearest(points: Float[Array, "P 4"], u: Float[Array, "N 4"]) -> Int[Array, "N"]:
    return jnp.argmin(jnp.sum(points * points, axis=1)[None, :] - 2 * dot(u, points.T), axis=1)


@jax.jit
def _k_means(u: Float[Array, "N G 4"]) -> Float[Array, "G P 4"]:
    """Points of every group; those that no token is nearest to stay where they are."""
    first = u[jnp.linspace(0, len(u) - 1, POINTS).astype(jnp.int32)]

    def group(pair):
        own, start = pair

        def step(_, points):
            hits = jax.nn.one_hot(_nearest(points, own), POINTS, dtype=jnp.float32)
            count = jnp.sum(hits, axis=0)[:, None]
            return jnp.where(count > 0, dot(hits.T, own) / jnp.maximum(count, 1.0), points)

        return jax.lax.fori_loop(0, ROUNDS, step, start)

    return jax.lax.map(group, (u.swapaxes(0, 1), first.swapaxes(0, 1)))


def nova_like(dim: int) -> tuple[Codec, Codec]:
    """Codecs of K and V."""
    return NovaKey(dim=dim), Oscar(dim=dim, bits=2, clip_percent=CLIP_PERCENT["v"])
