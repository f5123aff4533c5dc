"""The quality table: what each plan does to a model's predictions, over windows of text.

Every text has its own windows and its own exact predictions. Plans advance together, some at a
time (`teacher_forced`); what is finished can be kept, so an interruption does not repeat it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from turboq.cache import model_cache
from turboq.cache.layer import KVLayer
from turboq.codecs.transform_padded import shared_layer
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.plan import Plan, check_model, document
from turboq.version import __version__
from turboq_calibrate.cost import metrics
from turboq_calibrate.measure.attention_plugs import (
    KERNELS,
    packed_attend,
    packed_by,
    simulated_attend,
)
from turboq_calibrate.measure.broken import first_broken
from turboq_calibrate.measure.quality_schema import SCHEMA, Part, read_json
from turboq_calibrate.measure.quality_table import Quality, json_text
from turboq_calibrate.measure.scored import Scored, scored
from turboq_calibrate.measure.storage_columns import storage_columns
from turboq_calibrate.measure.teacher_forced import hidden_states, mean_errors, score
from turboq_calibrate.models import Model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.run.peak_memory import peak_rss
from turboq_calibrate.run.progress import Progress

PLUGS = {
    "simulated": simulated_attend,
    "packed": packed_attend,
} | {name: packed_by(name) for name in KERNELS}
LEVEL = 0.95
NamedPlan = tuple[str, Plan, dict[str, np.ndarray]]
Layers = list[KVLayer | None]


class NotFinite(TurboqError):
    """Some plans gave no finite numbers; `quality` holds all other rows (None: there are none)."""

    def __init__(self, failures: Sequence[str], quality: Quality):
        more = f" (and {len(failures) - 1} more rows)" if len(failures) > 1 else ""
        super().__init__(failures[0] + more)
        self.quality = quality if quality.rows else None


def evaluate(
    model: Model,
    plans: Sequence[NamedPlan],
    windows: Int[np.ndarray, "N T"],
    *,
    text: str,
    **options: Any,
) -> Quality:
    """`evaluate_texts` on one text: its windows, its name, and the same options."""
    return evaluate_texts(model, plans, {text: windows}, **options)


def evaluate_texts(
    model: Model,
    plans: Sequence[NamedPlan],
    texts: Mapping[str, Int[np.ndarray, "N T"]],
    *,
    attention: str = "simulated",
    context: int | None = None,
    window_batch: int = 1,
    plan_batch: int = 8,
    bootstrap_samples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Quality:
    """Measures every plan on every text against the same model's exact-KV logits, teacher-forced.

    A window of T tokens has T - 1 positions that predict a token of it. A plan is judged by those
    that can see at least one token it has quantized (`scored`): KL, top-1 agreement and perplexity
    are over them, and every row says how many they are (`metrics.TokenMetrics.summary`). A plan's
    error on K and V per head is measured in place, on what its own earlier layers produced
    (`attention_plugs.head_errors`), root or mean over windows.

    The same machine gives the same bytes. Arithmetic in another order (another processor, "packed")
    rounds a few coordinates to the neighbouring code, and over tens of layers that becomes another
    draw of the same quantization noise: single windows then differ by several per cent of their
    KL, within the interval over windows.

    Args:
      plans: (name, plan, fitted arrays), in the order of the table.
      texts: name -> token ids [N, T]; every window starts at position 0. Texts may differ in N and
        T; another T compiles anew.
      attention: "simulated" (quantize and dequantize, one parallel pass) or "packed" (prefill of
        the packed cache): the same numbers up to float32 rounding, layer by layer; "xla",
        "mosaic_tpu" or "triton" (packed, read by that kernel, interpreted where it cannot run).
      context: tokens at which `bits_per_channel_at_context` counts sinks, recent window, whole
        pages and static arrays; the model's context by default.
      window_batch: windows that run together; memory grows with it.
      plan_batch: plans that run together beside one exact pass; memory grows with it.
      folder: keeps the part of every text and batch of plans, by a hash of all that it follows
        from, and takes it from there the next time. Change nothing else and the table is the same
        bytes, interrupted or not.
      progress: show a progress bar (plain lines without a terminal).

    Raises:
      TurboqError: no plans or windows, windows too short or longer than the model's context, plans
        that do not fit the model or quantize nothing of a window, a damaged part in `folder`,
        exact predictions that are not finite.
      NotFinite: a plan's are not: names the layer, side, head and token, and holds all other rows.
    """
    started = time.perf_counter()
    _check(model, plans, texts, attention)
    options = {
        "attention": attention,
        "context": model.spec.context if context is None else context,
        "window_batch": window_batch,
        "bootstrap": {"level": LEVEL, "samples": bootstrap_samples, "seed": seed},
    }

    def path(batch: Sequence[NamedPlan], text: str, windows: np.ndarray) -> Path | None:
        if folder is None:
            return None
        return make_folder(folder) / _part_name(model, batch, text, windows, options)

    jobs = [
        _Job(batch, text, windows, path(batch, text, windows))
        for batch in itertools.batched(plans, plan_batch)
        for text, windows in texts.items()
    ]
    advice = "remove it to measure it again"
    kept = [
        None if x.path is None or not x.path.exists() else read_json(x.path, Part, otherwise=advice)
        for x in jobs
    ]
    parts: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
    done = sum(x.size for x, part in zip(jobs, kept, strict=True) if part is not None)
    seconds, loaded, failures = 0.0, None, []
    with Progress(sum(x.size for x in jobs), label="evaluate", enabled=progress, done=done) as bar:
        for job, part in zip(jobs, kept, strict=True):
            if part is None:
                if loaded is None or loaded[0] is not job.plans:
                    loaded = job.plans, {name: plan_layers(model, p, a) for name, p, a in job.plans}
                begun = time.perf_counter()
                part, failed = _measure(
                    model, job.plans, loaded[1], job.text, job.windows, options, bar
                )
                seconds += time.perf_counter() - begun
                failures += failed
                if job.path is not None and not failed:
                    atomic_write(job.path, json_text(part))
            parts[job.text].append(part)
    table = {
        "schema": SCHEMA,
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "attention": attention,
        "bootstrap": options["bootstrap"],
        "texts": [some[0]["text"] for some in parts.values()],
        "rows": [row for some in parts.values() for part in some for row in part["rows"]],
        "head_errors": {
            text: {name: e for part in some for name, e in part["head_errors"].items()}
            for text, some in parts.items()
        },
    }
    reused = sum(x.passes for x, part in zip(jobs, kept, strict=True) if part is not None)
    passes = sum(x.passes for x in jobs) - reused
    quality = Quality(table=table, run=_run_info(started, seconds, passes, reused))
    if failures:
        raise NotFinite(failures, quality)
    return quality


class _Job(NamedTuple):
    """Some plans on one text, and the file that keeps what was found."""

    plans: tuple[NamedPlan, ...]
    text: str
    windows: Int[np.ndarray, "N T"]
    path: Path | None

    @property
    def passes(self) -> int:
        """Of a window through the model: one for every plan and one exact."""
        return len(self.windows) * (len(self.plans) + 1)

    @property
    def size(self) -> int:
        """Tokens of all passes."""
        return self.passes * self.windows.shape[1]


def _measure(
    model: Model,
    plans: Sequence[NamedPlan],
    layers: dict[str, Layers],
    text: str,
    windows: Int[np.ndarray, "N T"],
    options: dict[str, Any],
    bar: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """A `Part`: some plans on one text; and why some have no row."""
    size, names = options["window_batch"], list(layers)
    running: dict[str, list[Any]] = dict(layers)
    # One program for all learned segments.
    if options["attention"] == "simulated":
        running = {name: [x and shared_layer(x) for x in found] for name, found in layers.items()}
    elif options["attention"] == "packed":
        running = {name: model_cache.fresh(found) or found for name, found in layers.items()}
    measured: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    exact_nll: list[np.ndarray] = []
    errors: dict[str, list[list[dict[str, np.ndarray]]]] = {name: [] for name in names}
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        # A short last batch is filled up so that nothing is compiled for another shape.
        tokens = np.concatenate([batch] + [batch[:1]] * (size - len(batch)))
        # The head counts as one more layer.
        unit = batch.size * (len(plans) + 1) / (len(model.spec.layers) + 1)
        hidden, found = hidden_states(
            model, running, tokens, PLUGS[options["attention"]],
            lambda unit=unit: bar.advance(unit, text),
        )  # fmt: skip
        nll, rows = score(model, hidden, tokens)
        bar.advance(unit, text)
        exact_nll.extend(nll[: len(batch)])
        for name in names:
            measured[name].extend(rows[name][: len(batch)])
            kept = [{k: v[: len(batch)] for k, v in e.items()} for e in found[name]]
            errors[name].append(kept)
    exact = np.stack(exact_nll)
    _check_exact(exact)
    failed = {
        name: f"{name}: {why}"
        for name in names
        if (why := _not_finite(model, layers[name], windows, measured[name], errors[name]))
    }
    part = {
        "text": {
            "text": text,
            "windows": len(windows),
            "window_tokens": windows.shape[1],
            "tokens": int(exact.size),
            "windows_sha256": _sha256(windows),
            "perplexity": metrics.perplexity(exact),
        },
        "rows": [
            storage_columns(name, plan, layers[name], model, options["context"], windows.shape[1])
            | {"text": text}
            | _quality(plan, measured[name], exact, options["bootstrap"])
            for name, plan, _ in plans
            if name not in failed
        ],
        "head_errors": {name: mean_errors(errors[name]) for name in names if name not in failed},
    }
    return part, list(failed.values())


def _quality(
    plan: Plan,
    measured: list[dict[str, np.ndarray]],
    exact: np.ndarray,
    bootstrap: dict[str, Any],
) -> dict[str, Any]:
    """The columns of quality of one row."""
    tokens = metrics.TokenMetrics.stack(
        [m | {"nll_exact": nll} for m, nll in zip(measured, exact, strict=True)]
    )
    scope = _scored(plan, exact.shape[1] + 1)
    return {
        "quantized_tokens": scope.quantized * len(exact),
        **tokens.since(scope.first).summary(**bootstrap),
        "kl_by_position": metrics.kl_by_position(tokens.kl, scope.first),
    }


def _check(
    model: Model, plans: Sequence[NamedPlan], texts: Mapping[str, np.ndarray], attention: str
) -> None:
    names = [name for name, _, _ in plans]
    if not names:
        raise TurboqError("no plans to evaluate")
    if len(set(names)) != len(names):
        raise TurboqError(f"plan names must differ: {names}")
    if attention not in PLUGS:
        raise ValueError(f"{attention=} must be one of {tuple(PLUGS)}")
    if not texts:
        raise TurboqError("no text to evaluate on")
    for text, windows in texts.items():
        count, length = windows.shape
        if count < 1 or length < 2:
            raise TurboqError(
                f"{text}: windows of shape {windows.shape}: need one of two tokens or more"
            )
        model.spec.check_length(length, f"{text}: windows")
    geometry = model_geometry(model)
    for name, plan, _ in plans:
        try:
            check_model(plan, geometry)
            for windows in texts.values():
                _scored(plan, windows.shape[1])
        except TurboqError as error:
            raise TurboqError(f"plan {name!r}: {error}") from None


def _scored(plan: Plan, length: int) -> Scored:
    return scored([layer.window for layer in plan.model.cache_layers], plan.storage, length)


def _check_exact(nll: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(nll))
    if len(bad):
        window, position = bad[0]
        raise TurboqError(
            f"the exact model: predictions are not finite in window {window} at position {position}"
        )


def _not_finite(
    model: Model,
    layers: Layers,
    windows: Int[np.ndarray, "N T"],
    measured: list[dict[str, np.ndarray]],
    errors: list[list[dict[str, np.ndarray]]],
) -> str | None:
    """What is not finite of a plan's predictions and errors, and where that comes from."""
    stored = np.concatenate(
        [np.sum([e.sum(axis=1) for x in batch for e in x.values()], axis=0) for batch in errors]
    )
    for window, (row, error) in enumerate(zip(measured, stored, strict=True)):
        bad = ~np.isfinite(row["nll"] + row["kl"])
        if not bad.any() and np.isfinite(error):
            continue
        where = f"at position {np.argmax(bad)} " if bad.any() else ""
        cause = first_broken(model, layers, windows[window])
        found = f"predictions are not finite {where}of window {window}"
        return found if cause is None else f"{found}: {cause}"
    return None


def plan_layers(model: Model, plan: Plan, arrays: dict[str, np.ndarray]) -> list[KVLayer | None]:
    """One `KVLayer` per decoder layer; None where the layer keeps no cache of its own."""
    return [
        plan.kv_layer(i, arrays) if spec.owns_cache else None
        for i, spec in enumerate(model.spec.layers)
    ]


def _part_name(
    model: Model,
    plans: Sequence[NamedPlan],
    text: str,
    windows: Int[np.ndarray, "N T"],
    options: dict[str, Any],
) -> str:
    """File of these plans on this text: a hash of all that its numbers follow from."""
    inputs = [
        SCHEMA,
        [__version__, jax.__version__, jax.default_backend()],
        [model.fingerprint, model.dtype],
        [text, windows.shape, _sha256(windows)],
        options,
        [(name, document(plan)["hash"], _arrays_sha256(arrays)) for name, plan, arrays in plans],
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32] + ".json"


def _sha256(windows: Int[np.ndarray, "N T"]) -> str:
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()


def _arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype.str} {x.shape}\n".encode() + x.tobytes())
    return digest.hexdigest()


def _run_info(started: float, timed: float, passes: int, reused: int) -> dict[str, Any]:
    """`quality_schema.Run`; the exact pass beside a batch of plans counts as one more plan."""
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_per_plan_and_window": round(timed / passes, 3) if passes else None,
        "windows_measured": passes,
        "windows_reused": reused,
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
