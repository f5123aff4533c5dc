"""Joining softmaxes over disjoint parts of the tokens: sequence splits, exact tokens, sinks.

    top = max_i top_i,  f_i = exp(top_i - top),  total = sum f_i total_i,  acc = sum f_i acc_i

(Milakov & Gimelshein, arXiv 1805.02867). A part that saw nothing (total 0) has factor 0 whatever
its top is, and a row of which no part saw anything stays at total 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from turboq.cache.exact_attention import HIGHEST, soft_cap, without_broken
from turboq_kernels.decode.types import Partial


def factors(
    tops: Float[Array, "I *rows"], totals: Float[Array, "I *rows"]
) -> tuple[Float[Array, "I *rows"], Float[Array, "*rows"]]:
    """(f_i, top): what each part's sums are multiplied by, and the common maximum.

    A row that nobody saw gets factors 0 and top -inf.
    """
    tops = jnp.where(totals > 0, tops, -jnp.inf)
    top = jnp.max(tops, axis=0)
    base = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.exp(tops - base[None]), top


def merge(parts: Partial) -> Partial:
    """One partial softmax from parts stacked along a leading axis."""
    f, top = factors(parts.top, parts.total)
    return Partial(
        acc=jnp.sum(parts.acc * f[..., None], axis=0),
        top=top,
        total=jnp.sum(parts.total * f, axis=0),
    )


def stack(parts: Sequence[Partial]) -> Partial:
    """Parts of equal shapes along a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def exact(
    q: Float[Array, "B N M D"],
    k: Float[Array, "B N S D"],
    v: Float[Array, "B N S E"],
    seen: Bool[Array, "B M S"],
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """The softmax over exact keys and values.

    A token that a row does not see may hold anything; one that it sees and that holds Inf or NaN
    makes that row's result NaN.
    """
    (k, broken_k), (v, broken_v) = (without_broken(x.astype(jnp.float32)) for x in (k, v))
    raw = jnp.einsum("bnmd,bnsd->bnms", q, k, precision=HIGHEST)
    raw = jnp.where((broken_k | broken_v)[:, :, None], jnp.nan, soft_cap(raw * scale, softcap))
    logits = jnp.where(seen[:, None], raw, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    p = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)[..., None])
    acc = jnp.einsum("bnms,bnse->bnme", p, v, precision=HIGHEST)
    return Partial(acc=acc, top=top, total=jnp.sum(p, axis=-1))


def sink(logits: Float[Array, "N M"], batch: int, width: int) -> Partial:
    """An extra logit per query row that joins the denominator only (gpt-oss attention sinks)."""
    top = jnp.broadcast_to(logits.astype(jnp.float32)[None], (batch, *logits.shape))
    return Partial(
        acc=jnp.zeros((*top.shape, width), jnp.float32), top=top, total=jnp.ones_like(top)
    )
