"""The jitted passes over one chunk of windows: a layer forwards, the head, a layer backwards.

    KL(model || model with k_s + e_s)  ~=  1/2 sum_s e_s^T F_s e_s,   F_s = E[g_s g_s^T]
    g_s = d/dk_s sum_t log p(y_t | x_<t),   y_t drawn from the model itself

The drawn y_t are independent given the text, so the cross terms vanish and one reverse pass gives a
sample of g for every key and value, with everything that attention weights, the output projection
and later layers do to an error. The layer is run again from its input on the way back, which is
also where its q, k and v are reduced to statistics: nothing but layer inputs is kept.

One compile per LayerSpec and chunk shape. Source: Martens, "New insights and perspectives on the
natural gradient method" (2020), section 5.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from turboq.numbers.rope import unrotate
from turboq_calibrate.models import decoder, streamed_experts
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.models.stream import borrowed
from turboq_calibrate.models.streamed_experts import Streamed
from turboq_calibrate.observe import reduce

HEAD_TOKENS = 256  # whose logits are in memory at once
Sides = dict[str, reduce.Reduced]
Finite = dict[str, Bool[Array, "h"]]


def forward(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T M"], Finite]:
    """The layer's output; which heads of k, v, q, and whether it, are free of NaN and infinity."""
    y, finite = decoder.run_layer(spec, params, x, positions, _look)
    finite = {} if spec.recurrent is not None else finite  # there it is the layer's state
    return y, finite | {"output": _finite_rows(y)}


def _look(spec, q, k, v, positions, state, *sinks):
    out, _ = exact_attend(spec, q, k, v, positions, None, *sinks)
    return out, {"k": _finite(k), "v": _finite(v), "q": _finite(q)}


@functools.partial(jax.jit, static_argnames=("spec", "seed"))
def head(
    spec: ModelSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    windows: Int[Array, "B"],
    *,
    seed: int,
) -> tuple[Float[Array, "B T M"], Finite]:
    """d/dx of the summed log probability of one token drawn from the prediction at every x.

    The draw depends on the seed, the window's number and the position only, whatever else is in
    the chunk.
    """
    batch, t, width = x.shape
    drawn = uniforms(seed, windows.astype(jnp.uint32), t)
    block = max(1, HEAD_TOKENS // batch)
    pad = -t % block

    def blocks(y):
        y = jnp.pad(y, ((0, 0), (0, pad), (0, 0)))
        return y.reshape(batch, -1, block, y.shape[-1]).swapaxes(0, 1)

    def gradient(part):
        x, u = part
        logits, pull = jax.vjp(lambda x: decoder.head(spec, params, x), x)
        p = jax.nn.softmax(logits)
        label = labels(p.reshape(-1, spec.vocab), u.reshape(-1, 2)).reshape(p.shape[:2])
        return pull(jax.nn.one_hot(label, spec.vocab, dtype=p.dtype) - p)[0]

    g = jax.lax.map(gradient, (blocks(x), blocks(drawn)))
    g = g.swapaxes(0, 1).reshape(batch, -1, width)[:, :t]
    return g, {"input": _finite(g[:, :, None])}


def uniforms(seed: int, windows: UInt32[Array, "B"], t: int) -> Float[Array, "B T 2"]:
    """What labels are drawn with: by the window's number and the position only."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), (t, 2)))(windows)


def labels(p: Float[Array, "n V"], u: Float[Array, "n 2"]) -> Int[Array, "n"]:
    """One token per row: of ~sqrt(V) runs of tokens one by u[:, 0], in it one token by u[:, 1].

    Both by the inverse of the cumulative distribution, P(token) = P(run) P(token | run); short
    sums, so the rounding of a probability is ~sqrt(V) eps. u in [0, 1) never picks p = 0.
    """
    run = math.isqrt(p.shape[1] - 1) + 1
    parts = jnp.pad(p, ((0, 0), (0, -p.shape[1] % run))).reshape(p.shape[0], -1, run)
    first = _inverse(jnp.sum(parts, axis=2), u[:, 0])
    chosen = jnp.take_along_axis(parts, first[:, None, None], axis=1)[:, 0]
    return first * run + _inverse(chosen, u[:, 1])


def _inverse(weights: Float[Array, "n m"], u: Float[Array, "n"]) -> Int[Array, "n"]:
    below = jnp.cumsum(weights, axis=1)
    return jnp.sum((below <= u[:, None] * below[:, -1:]).astype(jnp.int32), axis=1)


def reverse(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    g: Float[Array, "B T M"],
    sampled: Int[Array, "n 2"],
    *,
    skip: int,
) -> tuple[Float[Array, "B T M"], Sides, Float[Array, "n R"], Finite]:
    """One layer backwards, from the gradient g at its output.

    Of a layer that lends its cache the gradients at K and V are the sums over all of its readers; a
    borrower's are its own alone.

    Returns:
      The gradient at the layer's input; the statistics of every side without each window's first
      `skip` tokens; rows (k, v, g_k, g_v), before rotary embedding, of the tokens `sampled`
      (window in the chunk, position); which gradients are free of NaN and infinity.
    """
    if not isinstance(params, Streamed):
        return reverse_part(spec, params, x, positions, g, sampled, skip=skip, whole=True)
    half, _ = _attention_half(spec, params, x, positions)
    g = streamed_experts.feed_forward_gradient(spec, params, half, g)
    return reverse_part(spec, params, x, positions, g, sampled, skip=skip, whole=False)


_attention_half = functools.partial(
    jax.jit(decoder.attention_half, static_argnames=("spec", "attend")), attend=exact_attend
)


@functools.partial(jax.jit, static_argnames=("spec", "skip", "whole"))
def reverse_part(spec, params, x, positions, g, sampled, *, skip: int, whole: bool):
    """`reverse` through the whole layer, or up to its MLP."""
    part = decoder.layer if whole else decoder.attention_half
    if spec.recurrent is not None:  # neither keys nor values
        _, pull = jax.vjp(lambda x: part(spec, params, x, positions, exact_attend)[0], x)
        (g_x,) = pull(g)
        rows = jnp.zeros((len(sampled), 0), jnp.float32)
        return g_x, {}, rows, {"input": _finite(g_x[:, :, None])}

    def run(x, offset_k, offset_v):
        def attend(spec, q, k, v, positions, state, *sinks):
            out, _ = exact_attend(spec, q, k + offset_k, v + offset_v, positions, None, *sinks)
            return out, (q, k, v)

        return part(spec, params, x, positions, attend, None)

    tokens = (*x.shape[:2], spec.kv_heads)
    zeros = [jnp.zeros((*tokens, dim), jnp.float32) for dim in (spec.head_dim, spec.v_head_dim)]
    _, pull, (q, k, v) = jax.vjp(run, x, *zeros, has_aux=True)
    g_x, g_k, g_v = pull(g)
    if spec.lends:  # what its readers say of the K and V that it left them
        g_k, g_v = (own + more for own, more in zip((g_k, g_v), borrowed(spec, g), strict=True))

    q = q[..., -spec.head_dim :]  # of latent attention the part that meets K
    values, gradients = {"k": k, "v": v, "q": q}, {"k": g_k, "v": g_v}
    if spec.rope is not None:
        at = positions[:, :, None]
        values |= {"k_before": unrotate(spec.rope, k, at), "q_before": unrotate(spec.rope, q, at)}
        gradients["k_before"] = unrotate(spec.rope, g_k, at)
    reduced = {
        side: reduce.side(side, y[:, skip:], None if g is None else g[:, skip:])
        for side, y in values.items()
        for g in [gradients.get(side)]
    }
    before = "k" if spec.rope is None else "k_before"
    kept = (values[before], v, gradients[before], g_v)
    window, position = sampled[:, 0], sampled[:, 1]
    rows = [y[window, position].reshape(-1, y.shape[2] * y.shape[3]) for y in kept]
    finite = {"k": _finite(g_k), "v": _finite(g_v), "input": _finite(g_x[:, :, None])}
    return g_x, reduced, jnp.concatenate(rows, axis=1), finite


@jax.jit
def _finite_rows(x: Float[Array, "B T M"]) -> Bool[Array, "1"]:
    return _finite(x[:, :, None])


def _finite(x: Float[Array, "B T h D"]) -> Bool[Array, "h"]:
    return jnp.all(jnp.isfinite(x), axis=(0, 1, 3))
