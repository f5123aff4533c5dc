"""One pass over windows of tokens: the exact model and every plan, layer by layer.

All plans and the exact model advance together, so a layer's weights are read once per batch of
windows however many plans there are, and only hidden states are kept. Logits exist for one block of
positions at a time: the exact block is normalised once and every plan's block is compared with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq_calibrate.cost import metrics
from turboq_calibrate.models import Model, default_positions, embed_tokens, exact_attend
from turboq_calibrate.models.decoder import run_head, run_parts

_exact = jax.jit(exact_attend, static_argnames=("spec",))


def hidden_states(
    model: Model,
    plans: dict[str, list[Any]],
    tokens: Int[np.ndarray, "B T"],
    plug: Callable[..., Any],
    step: Callable[[int], None],
) -> tuple[dict[str | None, Array], dict[str, list[dict[str, np.ndarray]]]]:
    """Last hidden states of the exact model (key None) and of every plan, and the head errors.

    `plans` hold what the plug takes for every layer: a `KVLayer`, a `Fresh` cache, or None of one
    without a cache of its own.
    """
    positions = default_positions(jnp.asarray(tokens))
    start = embed_tokens(model, tokens)
    hidden: dict[str | None, Array] = dict.fromkeys([None, *plans], start)
    found: dict[str, list[Any]] = {name: [] for name in plans}
    for i, spec in enumerate(model.spec.layers):
        params = model.layer(i)
        hidden[None], _ = run_parts(spec, params, hidden[None], positions, _exact, None)
        for name, layers in plans.items():
            read = layers[spec.cache_at(i)]
            hidden[name], errors = run_parts(spec, params, hidden[name], positions, plug, read)
            # A cache's errors are those of the layer that owns it.
            found[name].append((spec.owns_cache and errors) or {})
        jax.block_until_ready(list(hidden.values()))
        step(i)
    return hidden, jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def score(
    model: Model,
    hidden: dict[str | None, Float[Array, "B T M"]],
    tokens: Int[np.ndarray, "B T"],
    step: Callable[[float], None] = lambda share: None,
) -> tuple[list[np.ndarray], dict[str, list[dict[str, np.ndarray]]]]:
    """Exact NLL per window, and per plan the metrics of every window, over its T - 1 positions.

    `step` hears of every block of positions, what share of all it is.
    """
    batch, length = tokens.shape
    targets = np.zeros(tokens.shape, np.int32)
    targets[:, :-1] = tokens[:, 1:]  # the last position predicts nothing: dropped below
    blocks = math.ceil(tokens.size / metrics.BLOCK)
    pad = blocks * metrics.BLOCK - tokens.size
    goal = jnp.asarray(np.pad(targets.reshape(-1), (0, pad)))
    flat = {name: _padded(x, pad) for name, x in hidden.items()}
    head = model.head_params()
    nll, rows = [], {name: [] for name in hidden if name is not None}
    for i in range(blocks):
        at = slice(i * metrics.BLOCK, (i + 1) * metrics.BLOCK)

        def logits(name, at=at):
            return run_head(model.spec, head, flat[name][at][None])[0]

        exact = metrics.reference(logits(None), goal[at])
        for name in rows:
            rows[name].append(jax.device_get(metrics.compare(exact, logits(name), goal[at])))
        nll.append(np.asarray(exact["nll"]))
        step(1 / blocks)

    def windows(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)[: tokens.size].astype(np.float64)
        return joined.reshape(batch, length)[:, :-1]

    out = {}
    for name, parts in rows.items():
        whole = {key: windows([p[key] for p in parts]) for key in parts[0]}
        out[name] = [{key: v[w] for key, v in whole.items()} for w in range(batch)]
    return list(windows(nll)), out


@functools.partial(jax.jit, static_argnames=("pad",))
def _padded(x: Float[Array, "B T M"], pad: int) -> Float[Array, "n M"]:
    return jnp.pad(x.reshape(-1, x.shape[-1]), ((0, pad), (0, 0)))


def mean_errors(layers: list[dict[str, np.ndarray]]) -> dict[str, list[Any]]:
    """[layer] -> [N, K] to measure -> [layer] -> K numbers (None: no cache), 5 digits."""
    out: dict[str, list[Any]] = {"k_logit_rms": [], "k_rel_mse": [], "v_rel_mse": []}
    for layer in layers:
        if not layer:
            for values in out.values():
                values.append(None)
            continue
        mean = {key: x.mean(axis=0) for key, x in layer.items()}
        mean["k_logit_rms"] = np.sqrt(mean.pop("k_logit_mse"))
        for key, values in out.items():
            values.append([float(f"{x:.5g}") for x in mean[key]])
    return out
