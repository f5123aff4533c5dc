"""A mixture of experts: every token passes the few experts that its router chooses.

    p = softmax(router n),   y = sum over the k largest p_e of w_e expert_e(n),   w_e = p_e (/ sum)

where some take p = sigmoid(router n), choose by p + correction, look in the best groups of experts
only, or multiply w by a factor (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
Tokens are sorted by expert and go through each expert's matrices in blocks of rows, so that the
work is that of the chosen experts and nothing loops over tokens. Routing is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from turboq_calibrate.models.params import expert_shapes
from turboq_calibrate.models.primitives import (
    Params,
    gated_mlp,
    linear,
    normed,
    pre_normed,
    residual,
    rms_norm,
)
from turboq_calibrate.models.spec import Experts, LayerSpec

PREFIX = "expert_"  # of the stacked matrices [experts, out, in]
SHARED = "shared_"
ROWS = (8, 256)  # fewest and most rows of a block


def mixture(spec: LayerSpec, params: Params, x: Float[Array, "B T Z"]) -> Float[Array, "B T M"]:
    """What every token's experts, all of them in `params`, make of the stream."""
    assert spec.experts is not None
    n, chosen, weights, y = enter(spec, params, x)
    numbers = jnp.arange(spec.experts.count, dtype=jnp.int32)
    return leave(spec, params, x, add_chosen(spec, params, numbers, y, n, chosen, weights))


def enter(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"]
) -> tuple[Float[Array, "N M"], Int[Array, "N k"], Float[Array, "N k"], Float[Array, "N M"]]:
    """Rows that experts read, every row's experts and their weights, and what is added to."""
    assert spec.experts is not None
    if not spec.experts.beside:
        n = pre_normed(spec, params, x, "mlp_norm").reshape(-1, spec.hidden)
        return n, *route(spec.experts, params, n), shared(spec, params, n)
    rows = residual(spec, x).reshape(-1, spec.hidden)
    scale = params["router_scale"].astype(jnp.float32) * jnp.float32(spec.hidden**-0.5)
    chosen, weights = route(spec.experts, params, rms_norm(rows, scale, spec.norm_eps))
    n = normed(spec, params, rows, "expert_norm")
    return n, chosen, weights, jnp.zeros_like(n)


def leave(
    spec: LayerSpec, params: Params, x: Float[Array, "B T Z"], y: Float[Array, "N M"]
) -> Float[Array, "B T M"]:
    """What the layer makes of the sum over experts: itself, or that and the MLP beside them."""
    assert spec.experts is not None
    y = y.reshape(*x.shape[:-1], -1)
    if not spec.experts.beside:
        return y
    own = gated_mlp(spec, params, pre_normed(spec, params, x, "mlp_norm"))
    own = normed(spec, params, own, "mlp_own_post_norm")
    return own + normed(spec, params, y, "expert_post_norm")


def route(
    experts: Experts, params: Params, n: Float[Array, "N M"]
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """The experts of every token, most probable first, and their weights."""
    logits = linear(n, params, "router")
    p = jax.nn.sigmoid(logits) if experts.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    rank = p
    if experts.correction:
        rank = rank + params["router_correction"].astype(jnp.float32)[None]
    if experts.groups > 1:
        rank = jnp.where(_in_best_groups(experts, rank), rank, -jnp.inf)
    _, chosen = jax.lax.top_k(rank, experts.chosen)
    weights = jnp.take_along_axis(p, chosen, axis=-1)
    if experts.renormalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if experts.beside:
        weights = weights * params["expert_factor"].astype(jnp.float32)[chosen]
    return chosen, weights if experts.scale == 1.0 else weights * jnp.float32(experts.scale)


def _in_best_groups(experts: Experts, rank: Float[Array, "N E"]) -> Bool[Array, "N E"]:
    """Which experts are in one of the best groups."""
    grouped = rank.reshape(len(rank), experts.groups, -1)
    worth = jnp.sum(jax.lax.top_k(grouped, experts.group_best)[0], axis=-1)
    _, best = jax.lax.top_k(worth, experts.chosen_groups)
    kept = jnp.any(jax.nn.one_hot(best, experts.groups, dtype=bool), axis=1)
    return jnp.repeat(kept, grouped.shape[-1], axis=1)


def shared(spec: LayerSpec, params: Params, n: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """What the expert that every token passes adds, times its gate; zero without one."""
    assert spec.experts is not None
    if not spec.experts.shared:
        return jnp.zeros_like(n)
    if not spec.experts.shared_gate:
        return gated_mlp(spec, params, n, SHARED)
    gate = jax.nn.sigmoid(linear(n, params, f"{SHARED}router"))
    return jnp.broadcast_to(gate, n.shape) * gated_mlp(spec, params, n, SHARED)


def add_chosen(
    spec: LayerSpec,
    params: Params,
    numbers: Int[Array, "G"],
    y: Float[Array, "N M"],
    n: Float[Array, "N M"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
) -> Float[Array, "N M"]:
    """y + what the experts `numbers` add, whose matrices are stacked in `params` in that order.

    A number of `experts.count` or more is padding: nothing chooses it.
    """
    assert spec.experts is not None
    matrices = {name.removeprefix(PREFIX): params[name] for name in expert_shapes(spec)}
    group, k = numbers.shape[0], chosen.shape[1]
    # Place of each (token, choice) in the group; `group` where its expert is not there.
    places = jnp.full(spec.experts.count, group, jnp.int32)
    places = places.at[numbers].set(jnp.arange(group, dtype=jnp.int32), mode="drop")
    place = places[chosen].reshape(-1)
    order = jnp.argsort(place, stable=True)
    size = min(max(ROWS[0], place.shape[0] // group), ROWS[1])
    counts = jnp.bincount(place, length=group).astype(jnp.int32)  # drops the place `group`
    first = jnp.cumsum(counts) - counts  # in `order`
    ends = jnp.cumsum(-(-counts // size))  # blocks up to and with each expert

    @jax.checkpoint  # or every block's matrices would be kept for the way back
    def block(y, number):
        at = jnp.minimum(jnp.searchsorted(ends, number, side="right"), group - 1)
        inside = number - (ends[at] - -(-counts[at] // size))
        row = inside * size + jnp.arange(size, dtype=jnp.int32)
        valid = row < counts[at]
        pair = order[jnp.where(valid, first[at] + row, 0)]
        token = pair // k

        def compute(y):
            own = {
                name: jax.lax.dynamic_index_in_dim(stacked, at, keepdims=False)
                for name, stacked in matrices.items()
            }
            weight = jnp.where(valid, weights.reshape(-1)[pair], 0.0)
            out = gated_mlp(spec, own, n[token]) * weight[:, None]
            return y.at[token].add(out)

        return jax.lax.cond(number < ends[-1], compute, lambda y: y, y), None

    # Every expert has at most one block that is not full.
    blocks = jnp.arange(place.shape[0] // size + group, dtype=jnp.int32)
    return jax.lax.scan(block, y, blocks)[0]
