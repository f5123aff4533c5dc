"""The quality table: what each plan does to a model's predictions, over windows of text.

All plans and the exact model advance together, layer by layer, so a layer's weights are read once
per batch of windows however many plans there are, and only hidden states are kept. Logits exist
for one block of positions at a time: the exact block is normalised once and every plan's block is
compared with it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache import accounting
from turboq.cache.layer import KVLayer
from turboq.codecs.transform_padded import shared_layer
from turboq.errors import TurboqError
from turboq.plan import Plan, check_model
from turboq.version import __version__
from turboq_calibrate.cost import metrics
from turboq_calibrate.fit.plan import model_geometry
from turboq_calibrate.measure.attention_plugs import (
    KERNELS,
    packed_attend,
    packed_by,
    simulated_attend,
)
from turboq_calibrate.measure.quality_table import SCHEMA, Quality
from turboq_calibrate.models import Model, default_positions, embed_tokens, exact_attend
from turboq_calibrate.models.decoder import run_head, run_layer
from turboq_calibrate.run.peak_memory import peak_rss
from turboq_calibrate.run.progress import Progress

PLUGS = {
    "simulated": simulated_attend,
    "packed": packed_attend,
} | {name: packed_by(name) for name in KERNELS}
BLOCK = 256  # positions whose logits exist at the same time
LEVEL = 0.95
NamedPlan = tuple[str, Plan, dict[str, np.ndarray]]


def evaluate(
    model: Model,
    plans: Sequence[NamedPlan],
    windows: Int[np.ndarray, "N T"],
    *,
    text: str,
    attention: str = "simulated",
    context: int | None = None,
    window_batch: int = 1,
    bootstrap_samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Quality:
    """Measures every plan against the same model's exact-KV logits, teacher-forced.

    A window of T tokens scores T - 1 positions: those that predict a token of the window. KL,
    top-1 agreement and perplexity are over the same positions; definitions are in
    `metrics.TokenMetrics.summary`. A plan's error on K and V per head is measured in place, on
    what its own earlier layers produced (`plugs.head_errors`), root or mean over windows.

    The same machine gives the same bytes. Arithmetic in another order (another processor, "packed")
    rounds a few coordinates to the neighbouring code, and over tens of layers that becomes another
    draw of the same quantization noise: single windows then differ by several per cent of their
    KL, within the interval over windows.

    Args:
      plans: (name, plan, fitted arrays), in the order of the table.
      windows: token ids; every window starts at position 0.
      text: what the windows are, for the table.
      attention: "simulated" (quantize and dequantize, one parallel pass) or "packed" (prefill of
        the packed cache): the same numbers up to float32 rounding, layer by layer; "xla",
        "mosaic_tpu" or "triton" (packed, read by that kernel, interpreted where it cannot run).
      context: tokens at which `bits_per_channel_at_context` counts sinks, recent window, whole
        pages and static arrays; the model's context by default.
      window_batch: windows that run together; memory grows with it.
      progress: show a progress bar (plain lines without a terminal).

    Raises:
      TurboqError: no plans or windows, windows too short or longer than the model's context,
        plans that do not fit the model, predictions that are not finite.
    """
    started = time.perf_counter()
    names = _check(model, plans, windows, attention)
    layers = {name: plan_layers(model, plan, arrays) for name, plan, arrays in plans}
    running = layers
    if attention == "simulated":  # one program for all learned segments
        running = {name: [x and shared_layer(x) for x in found] for name, found in layers.items()}
    context = model.spec.context if context is None else context
    measured: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    exact_nll: list[np.ndarray] = []
    errors: dict[str, list[list[dict[str, np.ndarray]]]] = {name: [] for name in names}
    batches = [windows[i : i + window_batch] for i in range(0, len(windows), window_batch)]
    seconds = []
    work = float(windows.size * (len(plans) + 1))
    with Progress(work, label="evaluate", enabled=progress) as bar:
        for batch in batches:
            begun = time.perf_counter()
            # A short last batch is filled up so that nothing is compiled for another shape.
            tokens = np.concatenate([batch] + [batch[:1]] * (window_batch - len(batch)))
            # The head counts as one more layer.
            unit = batch.size * (len(plans) + 1) / (len(model.spec.layers) + 1)
            hidden, found = _hidden_states(
                model, running, tokens, PLUGS[attention], lambda unit=unit: bar.advance(unit)
            )
            nll, rows = _score(model, hidden, tokens)
            bar.advance(unit)
            exact_nll.extend(nll[: len(batch)])
            for name in names:
                measured[name].extend(rows[name][: len(batch)])
                kept = [{k: v[: len(batch)] for k, v in e.items()} for e in found[name]]
                errors[name].append(kept)
            seconds.append(time.perf_counter() - begun)
    exact = np.stack(exact_nll)
    rows = []
    for name, plan, _ in plans:
        tokens_of = metrics.TokenMetrics.stack(
            [m | {"nll_exact": nll} for m, nll in zip(measured[name], exact, strict=True)]
        )
        _check_finite(name, tokens_of)
        rows.append(
            describe(name, plan, layers[name], model, context)
            | {"text": text}
            | tokens_of.summary(level=LEVEL, samples=bootstrap_samples, seed=seed)
        )
    table = {
        "schema": SCHEMA,
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "text": text,
        "windows": len(windows),
        "window_tokens": windows.shape[1],
        "tokens": int(exact.size),
        "windows_sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        "attention": attention,
        "exact": {"perplexity": metrics.perplexity(exact)},
        "bootstrap": {"level": LEVEL, "samples": bootstrap_samples, "seed": seed},
        "rows": rows,
        "head_errors": {name: _mean_errors(errors[name]) for name in names},
    }
    return Quality(table=table, run=_run_info(started, seconds, len(plans), len(windows)))


def _check(model: Model, plans: Sequence[NamedPlan], windows, attention: str) -> list[str]:
    names = [name for name, _, _ in plans]
    if not names:
        raise TurboqError("no plans to evaluate")
    if len(set(names)) != len(names):
        raise TurboqError(f"plan names must differ: {names}")
    if attention not in PLUGS:
        raise ValueError(f"{attention=} must be one of {tuple(PLUGS)}")
    for name, plan, _ in plans:
        try:
            check_model(plan, model_geometry(model))
        except TurboqError as error:
            raise TurboqError(f"plan {name!r}: {error}") from None
    count, length = windows.shape
    if count < 1 or length < 2:
        raise TurboqError(f"windows of shape {windows.shape}: need one of two tokens or more")
    if length > model.spec.context:
        raise TurboqError(f"windows of {length} tokens exceed the context of {model.spec.context}")
    return names


def _check_finite(name: str, m: metrics.TokenMetrics) -> None:
    for what, values in (("the exact model", m.nll_exact), (name, m.nll), (name, m.kl)):
        bad = ~np.isfinite(values)
        if bad.any():
            window, position = np.argwhere(bad)[0]
            raise TurboqError(
                f"{what}: predictions are not finite in window {window} at position {position}"
            )


def plan_layers(model: Model, plan: Plan, arrays: dict[str, np.ndarray]) -> list[KVLayer | None]:
    """One `KVLayer` per decoder layer; None where the layer keeps no cache of its own."""
    return [
        plan.kv_layer(i, arrays) if spec.owns_cache else None
        for i, spec in enumerate(model.spec.layers)
    ]


def _hidden_states(
    model: Model,
    plans: dict[str, list[KVLayer | None]],
    tokens: Int[np.ndarray, "B T"],
    plug: Callable,
    step: Callable[[], None],
) -> tuple[dict[str | None, Array], dict[str, list[dict[str, np.ndarray]]]]:
    """Last hidden states of the exact model (key None) and of every plan, and the head errors."""
    positions = default_positions(jnp.asarray(tokens))
    start = embed_tokens(model, tokens)
    hidden: dict[str | None, Array] = dict.fromkeys([None, *plans], start)
    found: dict[str, list[Any]] = {name: [] for name in plans}
    for i, spec in enumerate(model.spec.layers):
        params = model.layer(i)
        hidden[None], _ = run_layer(spec, params, hidden[None], positions, exact_attend, None)
        for name, layers in plans.items():
            hidden[name], errors = run_layer(spec, params, hidden[name], positions, plug, layers[i])
            found[name].append(errors or {})
        jax.block_until_ready(list(hidden.values()))
        step()
    return hidden, jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def _score(
    model: Model, hidden: dict[str | None, Float[Array, "B T M"]], tokens: Int[np.ndarray, "B T"]
) -> tuple[list[np.ndarray], dict[str, list[dict[str, np.ndarray]]]]:
    """Exact NLL per window, and per plan the metrics of every window, over its T - 1 positions."""
    batch, length = tokens.shape
    targets = np.zeros(tokens.shape, np.int32)
    targets[:, :-1] = tokens[:, 1:]  # the last position predicts nothing: dropped below
    blocks = math.ceil(tokens.size / BLOCK)
    pad = blocks * BLOCK - tokens.size
    goal = jnp.asarray(np.pad(targets.reshape(-1), (0, pad)))
    flat = {
        name: jnp.pad(x.reshape(tokens.size, -1), ((0, pad), (0, 0))) for name, x in hidden.items()
    }
    head = model.head_params()
    nll, rows = [], {name: [] for name in hidden if name is not None}
    for i in range(blocks):
        at = slice(i * BLOCK, (i + 1) * BLOCK)

        def logits(name, at=at):
            return run_head(model.spec, head, flat[name][at][None])[0]

        exact = metrics.reference(logits(None), goal[at])
        for name in rows:
            rows[name].append(jax.device_get(metrics.compare(exact, logits(name), goal[at])))
        nll.append(np.asarray(exact["nll"]))

    def windows(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)[: tokens.size].astype(np.float64)
        return joined.reshape(batch, length)[:, :-1]

    out = {}
    for name, parts in rows.items():
        whole = {key: windows([p[key] for p in parts]) for key in parts[0]}
        out[name] = [{key: v[w] for key, v in whole.items()} for w in range(batch)]
    return list(windows(nll)), out


def _mean_errors(batches: list[list[dict[str, np.ndarray]]]) -> dict[str, list]:
    """[batch][layer] -> [N, K] to measure -> [layer] -> K numbers (None: no cache), 5 digits."""
    out: dict[str, list] = {"k_logit_rms": [], "k_rel_mse": [], "v_rel_mse": []}
    for layer in zip(*batches, strict=True):
        if not layer[0]:
            for values in out.values():
                values.append(None)
            continue
        mean = {key: np.concatenate([e[key] for e in layer]).mean(axis=0) for key in layer[0]}
        mean["k_logit_rms"] = np.sqrt(mean.pop("k_logit_mse"))
        for key, values in out.items():
            values.append([float(f"{x:.5g}") for x in mean[key]])
    return out


def describe(
    name: str, plan: Plan, layers: Sequence[KVLayer | None], model: Model, context: int
) -> dict[str, Any]:
    """What a row says about storage, all of it from the codecs' own fields.

    k_bits, v_bits: bits per channel without per-vector scales, mean over layers and heads.
    bits_per_channel: every stored bit of one quantized token over all its K and V channels.
    bits_per_channel_at_context: every byte resident at `context` tokens (whole pages, sinks,
    recent window, fitted arrays, static tables) over the same channels.
    cache_bytes: those bytes at several context lengths.
    """
    owned = [layer for layer in layers if layer is not None]
    groups = [(g, len(g.heads)) for layer in owned for g in layer.groups]
    k_codecs = [(g.k, n) for g, n in groups]
    v_codecs = [(g.v, n) for g, n in groups]
    k_name, v_name = _codec_name(k_codecs), _codec_name(v_codecs)
    policy = plan.tokens
    return {
        "name": name,
        "codec": k_name if k_name == v_name else f"{k_name}/{v_name}",
        "k_codec": k_name,
        "v_codec": v_name,
        "k_bits": _code_bits(k_codecs),
        "v_bits": _code_bits(v_codecs),
        "bits_per_channel": accounting.bits_per_channel(owned),
        "bits_per_channel_at_context": accounting.residency(
            owned, context=context
        ).bits_per_channel,
        "context": context,
        "policy": {
            "sinks": policy.sinks,
            "recent": policy.recent,
            "exact_dtype": policy.exact_dtype,
        },
        "bytes_per_token": _whole(accounting.bits_per_token(owned) / 8),
        "compression": accounting.compression(owned),
        "cache_bytes": {
            str(c): accounting.residency(owned, context=c).total
            for c in _contexts(model.spec.context)
        },
    }


def _codec_name(codecs) -> str:
    names = dict.fromkeys(codec.name for codec, _ in codecs)
    return "+".join(names)


def _code_bits(codecs) -> float | int:
    """Mean bits per channel of the fields that hold one entry per channel."""
    heads = sum(n for _, n in codecs)
    bits = sum(n * sum(f.bits for f in codec.fields if f.width == codec.dim) for codec, n in codecs)
    return _whole(bits / heads)


def _whole(x: float) -> float | int:
    return int(x) if x == int(x) else x


def _contexts(longest: int) -> list[int]:
    """Powers of two from 256 below the model's context, and the context itself."""
    return [*(2**e for e in range(8, 24) if 2**e < longest), longest]


def _run_info(started: float, seconds: list[float], plans: int, windows: int) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_per_batch": [round(s, 3) for s in seconds],
        "seconds_per_plan_and_window": round(sum(seconds) / ((plans + 1) * windows), 3),
        "peak_memory_bytes": peak_rss(),
        "versions": {
            "turboq": __version__,
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "numpy")},
        },
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [str(d) for d in jax.devices()],
    }
