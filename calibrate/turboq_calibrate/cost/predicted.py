"""Sensitivity from activations: what each candidate's error is predicted to cost, in one pass.

For every unit and candidate, with e = x_hat - x, p the attention weights, g the gradient of the
loss (labels drawn from the model itself, so that E[g g^T] is the Hessian of the KL), all sums over
tokens, all costs per predicted token:

    fisher       1/2 sum_s sum_j g_sj^2 e_sj^2                   diagonal, on K or V itself
    directional  1/2 sum_s (g_s . e_s)^2                         errors of tokens independent
    matrix       1/2 tr(mean_s g_s g_s^T  sum_s e_s e_s^T)       errors independent of gradients
    output       1/2 sum_t do_t^T W_o^T diag(E g_x^2) W_o do_t   do: change of the head's output
    output_error     sum_t |W_o do_t|^2                          the same without the Fisher weight
    logit        1/2 sum_t sum_heads Var_{s ~ p_t}(d logit_ts)   softmax Jacobian; keys only (V: 0)
    mse              sum |e|^2 / sum |x - mean|^2                relative, for comparison

The first four are predictions of the KL in nats per token and comparable across layers. For a key
`do` is exact (both softmaxes), for a value do_t = sum_s p_ts e_s. Tokens that the policy keeps
exact have e = 0 for the queries that see them so.

Source: second-order expansion of the KL; diagonal Fisher as in KVQuant (Hooper et al.,
arXiv 2401.18079).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.exact_attention import causal, soft_cap
from turboq.cache.layer import TokenPolicy
from turboq.plan.types import SIDES
from turboq_calibrate.candidates.table import Table
from turboq_calibrate.cost import metrics
from turboq_calibrate.cost.side_by_side import Engine, mixed_attention, quantized
from turboq_calibrate.models import Model
from turboq_calibrate.models.decoder import Params, feed_forward, head, linear, project_qkv
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.run.progress import Progress

HIGHEST = jax.lax.Precision.HIGHEST
SCORES = ("fisher", "directional", "matrix", "output", "output_error", "logit", "mse")
Costs = dict[str, Float[np.ndarray, "U C"]]


def activation_costs(
    model: Model,
    table: Table,
    tokens: Int[np.ndarray, "N T"],
    *,
    policy: TokenPolicy,
    base: Int[np.ndarray, "U"] | None = None,
    seed: int = 0,
    window_batch: int = 1,
    progress: bool = True,
) -> Costs:
    """Every score of `SCORES` for every unit and candidate: one forward and one backward pass.

    Streams over windows. Peak memory per batch of W windows, in floats: W T (M (L + 1) + V) for
    the layer inputs and the exact log-probabilities, 6 W G T^2 for one KV head's attention,
    K (G E)^2 for W_o.

    Args:
      policy: tokens that stay exact.
      base: measure around this plan (its errors are in place when the gradients are taken) instead
        of around the exact model.
      seed: of the labels; the same seed gives the same labels.
    """
    totals = {name: np.zeros(table.sizes.shape) for name in SCORES}
    uniforms = _uniforms(seed, tokens.shape)
    starts = range(0, len(tokens), window_batch)
    with Progress(tokens.size * len(table.layers), label="sensitivity", enabled=progress) as bar:
        for start in starts:
            at = slice(start, start + window_batch)
            engine = Engine(model, table, tokens[at], policy)
            run = engine.exact if base is None else engine.run(table.check(base))
            g = _loss_gradient(engine, run.hidden[-1], uniforms[at])
            for i in reversed(range(len(model.spec.layers))):
                g, found = _layer(engine, i, run, g)
                for side, name, values in found:
                    totals[name][table.rows(i, side)] += values
                if found:
                    bar.advance(engine.tokens.size, f"layer {i}")
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return {  # the relative error is a ratio within each batch
        name: total / (len(starts) if name == "mse" else predicted)
        for name, total in totals.items()
    }


def _uniforms(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "N T"]:
    """Uniforms in [0, 1) from Philox's raw words: the high 24 bits, exact in float32."""
    raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def _loss_gradient(engine: Engine, x: Array, uniforms: np.ndarray) -> Float[Array, "W T M"]:
    """d/dx of -sum log p(label), labels drawn from p, over the positions that predict a token."""
    scored = np.ones(uniforms.shape, np.float32)
    scored[:, -1] = 0
    blocks = engine.blocks(x)[0]
    shape = blocks.shape[:2]
    pad = shape[0] * shape[1] - uniforms.size

    def cut(y: np.ndarray) -> Array:
        return jnp.asarray(np.pad(y.reshape(-1), (0, pad)).reshape(shape))

    model, u, weight = engine.model, cut(uniforms), cut(scored)
    params = model.head_params()
    parts = [_head_gradient(model.spec, params, b, u[i], weight[i]) for i, b in enumerate(blocks)]
    return jnp.concatenate(parts)[: uniforms.size].reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("spec",))
def _head_gradient(
    spec: ModelSpec, params: Params, x: Array, u: Float[Array, "n"], weight: Float[Array, "n"]
) -> Float[Array, "n M"]:
    def loss(x):
        log_p = metrics.log_softmax(head(spec, params, x[None])[0])
        below = jnp.cumsum(jnp.exp(jax.lax.stop_gradient(log_p)), axis=-1)
        label = jnp.sum(below < u[:, None] * below[:, -1:], axis=-1).astype(jnp.int32)
        chosen = jnp.take_along_axis(log_p, label[:, None], axis=-1)[:, 0]
        return -jnp.sum(chosen * weight)

    return jax.grad(loss)(x)


def _layer(engine: Engine, i: int, run, g: Array):
    """Gradient at the layer's input and [(side, score, [K, C])]."""
    spec, params = engine.model.spec.layers[i], engine.model.layer(i)
    x = run.hidden[i]
    added = {} if run.errors is None else run.errors[i]
    g, parts = backward(
        spec, engine.policy, params, x, engine.positions(len(x)), added.get("k"),
        added.get("v"), g,
    )  # fmt: skip
    if not spec.owns_cache:
        return g, []
    weights = _output_weights(spec, params, parts["g_x"])
    out = []
    for side in SIDES:
        new = jnp.stack([quantized(o, parts[side]) for o in engine.table.options[i, side]])
        scores = jax.device_get(_scores(spec, engine.policy, side, parts, new, weights))
        for name in SCORES:
            out.append((side, name, scores[name].astype(np.float64).T))
    return g, out


@functools.partial(jax.jit, static_argnames=("spec", "policy"))
def backward(
    spec: LayerSpec,
    policy: TokenPolicy,
    params: Params,
    x: Float[Array, "W T M"],
    positions: Int[Array, "W T"],
    dk: Array | None,
    dv: Array | None,
    g: Float[Array, "W T M"],
) -> tuple[Float[Array, "W T M"], dict[str, Array]]:
    """One layer backwards, dk and dv added to the keys and values that are not kept exact.

    Returns:
      The gradient at x, and q, k, v with the gradients g_k, g_v [W, T, K, D] at dk and dv (summed
      over all queries that read them quantized) and g_x [W, T, M] at the attention's output.
    """
    q, k, v = project_qkv(spec, params, x, positions)
    dk = jnp.zeros_like(k) if dk is None else dk
    dv = jnp.zeros_like(v) if dv is None else dv

    def layer(x, dk, dv, between):
        q, k, v = project_qkv(spec, params, x, positions)
        out = mixed_attention(spec, policy, q, (k, v), (k + dk, v + dv))
        y = x + linear(out.reshape(*x.shape[:2], -1), params, "o") + between
        return y + feed_forward(spec, params, y)

    _, pull = jax.vjp(layer, x, dk, dv, jnp.zeros_like(x))
    g, g_k, g_v, g_x = pull(g)
    return g, {"q": q, "k": k, "v": v, "g_k": g_k, "g_v": g_v, "g_x": g_x}


@functools.partial(jax.jit, static_argnames=("spec",))
def _output_weights(
    spec: LayerSpec, params: Params, g_x: Float[Array, "W T M"]
) -> dict[str, Float[Array, "K F F"]]:
    """W_o^T W_o and W_o^T diag(mean g_x^2) W_o of every KV head's columns, F = G E."""
    w = params["o"].astype(jnp.float32).reshape(g_x.shape[-1], spec.kv_heads, -1)
    fisher = jnp.mean(jnp.square(g_x), axis=(0, 1))

    def gram(weight):
        return jnp.einsum("mka,mkb->kab", w * weight[:, None, None], w, precision=HIGHEST)

    return {"plain": gram(jnp.ones_like(fisher)), "fisher": gram(fisher)}


@functools.partial(jax.jit, static_argnames=("spec", "policy", "side"))
def _scores(
    spec: LayerSpec,
    policy: TokenPolicy,
    side: str,
    parts: dict[str, Array],
    x_hat: Float[Array, "C W T K D"],
    weights: dict[str, Array],
) -> dict[str, Float[Array, "C K"]]:
    """All scores of every candidate, summed over windows and tokens, for every head."""
    x, t = parts[side], x_hat.shape[2]
    stored = (jnp.arange(t, dtype=jnp.int32) >= policy.sinks).astype(jnp.float32)
    stored = stored[None, :, None, None]
    errors = (x_hat - x[None]) * stored[None]
    g = parts[f"g_{side}"]
    count = x.shape[0] * max(t - policy.sinks, 1)
    hessian = jnp.einsum("wtkd,wtke->kde", g, g, precision=HIGHEST) / count
    centre = jnp.sum(x * stored, axis=(0, 1)) / count
    spread = jnp.sum(jnp.square((x - centre[None, None]) * stored), axis=(0, 1, 3))

    def local(error):
        moment = jnp.einsum("wtkd,wtke->kde", error, error, precision=HIGHEST)
        lost = jnp.sum(jnp.square(error), axis=(0, 1, 3))
        return {
            "fisher": jnp.sum(jnp.square(g * error), axis=(0, 1, 3)) / 2,
            "directional": jnp.sum(jnp.square(jnp.sum(g * error, axis=3)), axis=(0, 1)) / 2,
            "matrix": jnp.sum(hessian * moment, axis=(1, 2)) / 2,
            "mse": lost / jnp.where(spread > 0, spread, 1.0),
        }

    per_head = jax.tree.map(
        lambda y: jnp.moveaxis(y, 2, 0),
        {"k": parts["k"], "v": parts["v"], "q": _grouped(spec, parts["q"])},
    )
    per_head["e"] = jnp.moveaxis(errors, 3, 0)
    reads = jax.lax.map(lambda y: _attention_scores(spec, policy, side, *y), (per_head, weights))
    return jax.tree.map(jnp.transpose, reads) | jax.lax.map(local, errors)


def _grouped(spec: LayerSpec, q: Float[Array, "W T H D"]) -> Float[Array, "W T K G D"]:
    return q.reshape(*q.shape[:2], spec.kv_heads, -1, q.shape[-1])


def _attention_scores(
    spec: LayerSpec, policy: TokenPolicy, side: str, x: dict[str, Array], weights: dict[str, Array]
) -> dict[str, Array]:
    """Scores of one head's candidates that need its attention weights p [W, G, T, S]."""
    batch, t = x["k"].shape[:2]
    at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (batch, t))
    seen = causal(at, window=spec.window)(at)[:, None]
    stored = (at[:, None, None, :] <= at[:, None, :, None] - policy.recent).astype(jnp.float32)

    def scores(keys):
        raw = jnp.einsum("wtgd,wsd->wgts", x["q"], keys, precision=HIGHEST)
        return soft_cap(raw * spec.scale, spec.softcap)

    exact = scores(x["k"])
    p = jax.nn.softmax(jnp.where(seen, exact, -jnp.inf), axis=-1)

    def candidate(error):
        if side == "v":
            change = jnp.einsum("wgts,wse->wtge", p * stored, error, precision=HIGHEST)
            logit = jnp.zeros(())
        else:
            moved = (scores(x["k"] + error) - exact) * stored
            mean = jnp.sum(p * moved, axis=-1, keepdims=True)
            logit = jnp.sum(p * jnp.square(moved - mean)) / 2
            other = jax.nn.softmax(jnp.where(seen, exact + moved, -jnp.inf), axis=-1)
            change = jnp.einsum("wgts,wse->wtge", other - p, x["v"], precision=HIGHEST)
        change = change.reshape(batch * t, -1)

        def quadratic(form):
            return jnp.sum(jnp.dot(change, form, precision=HIGHEST) * change)

        return {
            "logit": logit,
            "output": quadratic(weights["fisher"]) / 2,
            "output_error": quadratic(weights["plain"]),
        }

    return jax.lax.map(candidate, x["e"])
