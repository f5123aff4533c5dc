"""How much an error in each key and value costs in nats: the Fisher information, head by head.

    KL(model || model with k_s + e_s)  ~=  1/2 sum_s e_s^T F_s e_s,   F_s = E[g_s g_s^T]
    g_s = d/dk_s sum_t log p(y_t | x_<t),   y_t drawn from the model itself

Because the drawn y_t are independent given the text, the cross terms vanish and one backward pass
per window gives a sample of g for every key and value, with everything that attention weights, the
output projection and later layers do to an error. Half the mean of g g^T is a metric in nats per
token, so errors of different heads, layers and sides can be added up. Single tokens matter: a few
that most queries attend to ("sinks" past the first tokens) can have most of a head's F.

Source: Martens, "New insights and perspectives on the natural gradient method" (2020), section 5.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq_calibrate.models import decoder
from turboq_calibrate.models.decoder import default_positions, exact_attend
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.observe.samples import LayerSamples, collect_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGradients:
    """One layer: g of every stored key [K, N, D] and value [K, N, E], nats per unit of k and v."""

    k: Float[np.ndarray, "K N D"]
    v: Float[np.ndarray, "K N E"]

    def metric(self, side: str) -> Float[np.ndarray, "K D D"]:
        """1/2 E[g g^T] of each KV head over tokens: nats per token and squared unit of x."""
        g = (self.k if side == "k" else self.v).astype(np.float64)
        return np.swapaxes(g, -1, -2) @ g / (2 * g.shape[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSamples(LayerSamples):
    """Samples with the gradients of the same tokens: fits use both without being told."""

    gradients: LayerGradients


def collect_gradient_samples(
    model: Model, tokens: Int[np.ndarray, "B T"], *, skip: int = 4, seed: int = 0
) -> list[GradientSamples]:
    """`samples.collect_samples` and `collect_gradients` of the same windows."""
    pairs = zip(
        collect_samples(model, tokens, skip=skip),
        collect_gradients(model, tokens, skip=skip, seed=seed),
        strict=True,
    )
    return [GradientSamples(**vars(layer), gradients=gradients) for layer, gradients in pairs]


def collect_gradients(
    model: Model, tokens: Int[np.ndarray, "B T"], *, skip: int = 4, seed: int = 0
) -> list[LayerGradients]:
    """Gradients of every layer over windows tokens [B, T], without each window's first `skip`.

    Token n is token n of `samples.collect_samples` for the same windows. One forward and one
    backward pass per window; the result takes 4 bytes times B * T * (D_k + D_v) * K * L.
    """
    positions = default_positions(jnp.asarray(tokens[:1]))
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in model.spec.layers]
    for window, draw in zip(
        tokens, jax.random.split(jax.random.key(seed), len(tokens)), strict=True
    ):
        inputs = [embed_tokens(model, window[None])]
        for i, spec in enumerate(model.spec.layers):
            out, _ = decoder.run_layer(
                spec, model.layer(i), inputs[-1], positions, exact_attend, None
            )
            inputs.append(out)
        g = _head_gradient(model.spec, model.head_params(), inputs[-1], draw)
        for i in reversed(range(len(model.spec.layers))):
            spec = model.spec.layers[i]
            g, at = _layer_gradient(spec, model.layer(i), inputs[i], positions, g)
            found[i].append({s: np.moveaxis(np.asarray(y[0, skip:]), 1, 0) for s, y in at.items()})
    return [
        LayerGradients(**{s: np.concatenate([part[s] for part in layer], axis=1) for s in "kv"})
        for layer in found
    ]


@functools.partial(jax.jit, static_argnames=("spec",))
def _head_gradient(
    spec: ModelSpec, params: decoder.Params, x: Float[Array, "B T M"], key: Array
) -> Float[Array, "B T M"]:
    """d/dx of the summed log probability of tokens drawn from the predictions at x."""

    def block(part, draw):
        def score(h):
            logits = decoder.head(spec, params, h[None])[0]
            drawn = jax.random.categorical(draw, jax.lax.stop_gradient(logits))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)
            return jnp.sum(chosen)

        return jax.grad(score)(part)

    blocks = _blocks(x.shape[0] * x.shape[1])
    parts = x.reshape(blocks, -1, x.shape[-1])
    grads = jax.lax.map(lambda a: block(*a), (parts, jax.random.split(key, blocks)))
    return grads.reshape(x.shape)


def _blocks(count: int, most: int = 256) -> int:
    """The fewest equal blocks of at most 256 positions."""
    return next(n for n in range(-(-count // most), count + 1) if count % n == 0)


def _shifted(spec, q, k, v, positions, state):
    """Plug: exact attention of k and v plus the state's offsets."""
    out, _ = exact_attend(spec, q, k + state["k"], v + state["v"], positions, None)
    return out, None


@functools.partial(jax.jit, static_argnames=("spec",))
def _layer_gradient(
    spec: LayerSpec,
    params: decoder.Params,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    g: Float[Array, "B T M"],
) -> tuple[Float[Array, "B T M"], dict[str, Array]]:
    """Gradient at the layer's input from that at its output, and at its keys and values."""
    shape = (*x.shape[:2], spec.kv_heads)
    zero = {
        "k": jnp.zeros((*shape, spec.head_dim), jnp.float32),
        "v": jnp.zeros((*shape, spec.v_head_dim), jnp.float32),
    }

    def run(x, offsets):
        return decoder.layer(spec, params, x, positions, _shifted, offsets)[0]

    return jax.vjp(run, x, zero)[1](g)
