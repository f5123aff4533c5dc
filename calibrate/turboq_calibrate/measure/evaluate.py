"""The quality table: what each plan does to a model's predictions, over windows of text.

Every text has its own windows and its own exact predictions. Plans advance together, some at a
time (`teacher_forced`); what a window measured can be kept, so an interruption does not repeat it.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import os
import platform
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int

from turboq.cache import composed, model_cache
from turboq.cache.layer import KVLayer
from turboq.codecs.transform_padded import shared_layer
from turboq.errors import TurboqError
from turboq.files import make_folder
from turboq.plan import Plan, check_model
from turboq.version import __version__
from turboq_calibrate.cost import metrics
from turboq_calibrate.measure import window_files
from turboq_calibrate.measure.attention_plugs import (
    KERNELS,
    packed_attend,
    packed_by,
    simulated_attend,
)
from turboq_calibrate.measure.broken import first_broken
from turboq_calibrate.measure.quality_schema import SCHEMA
from turboq_calibrate.measure.quality_table import Quality
from turboq_calibrate.measure.scored import plan_scored
from turboq_calibrate.measure.steps import step_by_step
from turboq_calibrate.measure.storage_columns import head_bits, layer_loss, storage_columns
from turboq_calibrate.measure.teacher_forced import hidden_states, mean_errors, score
from turboq_calibrate.measure.window_files import Measured, join
from turboq_calibrate.models import Model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.models.work import shares
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
    """`evaluate_texts` on one text: its windows, its name, and the same options.

    Raises:
      TurboqError: as `evaluate_texts`, and NotFinite too.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> heldout = tc.mixed_windows(["topics:heldout"], model.tokenizer, length=96, count=2)
      >>> codec = turboq.TurboQuantMSE(dim=model.spec.layers[0].head_dim, bits=3)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec)
      >>> quality = tc.evaluate(
      ...     model, [("3 bits", plan, {})], heldout.tokens, text="heldout", progress=False
      ... )
      >>> row = quality.rows[0]
      >>> 0 <= row["top1"] <= 1, row["kl_mean"] > 0  # share, nats per token
      (True, True)
    """
    return evaluate_texts(model, plans, {text: windows}, **options)


def evaluate_texts(
    model: Model,
    plans: Sequence[NamedPlan],
    texts: Mapping[str, Int[np.ndarray, "N T"]],
    *,
    attention: str = "simulated",
    steps: int = 0,
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
      steps: measure the last positions of every window, this many, once more token by token through
        the packed cache (`step_by_step`), read by the kernel named; rows then say how far the two
        are apart.
      context: tokens at which `bits_per_channel_at_context` counts sinks, recent window, whole
        pages and static arrays; the model's context by default.
      window_batch: windows that run together; memory grows with it.
      plan_batch: plans that run together beside one exact pass; memory grows with it.
      folder: keeps what every batch of windows and plans measured, by a hash of all that it
        follows from, and takes it from there the next time: the table is the same bytes,
        interrupted or not.
      progress: show a progress bar (plain lines without a terminal).

    Raises:
      TurboqError: no plans or windows, windows too short or longer than the model's context, plans
        that do not fit the model or quantize nothing of a window, as many steps as a window has
        tokens, a damaged file in `folder`, exact predictions that are not finite.
      NotFinite: a plan's are not: names the layer, side, head and token, and holds all other rows.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> heldout = tc.mixed_windows(["topics:heldout"], model.tokenizer, length=96, count=2)
      >>> codec = turboq.TurboQuantMSE(dim=model.spec.layers[0].head_dim, bits=3)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec)
      >>> rows = [("3 bits", plan, {})]
      >>> quality = tc.evaluate_texts(model, rows, {"heldout": heldout.tokens}, progress=False)
      >>> quality.texts, quality.rows[0]["kl_mean"] > 0  # nats per token
      (['heldout'], True)
    """
    started = time.perf_counter()
    _check(model, plans, texts, attention, steps)
    context = model.spec.context if context is None else context
    bootstrap = {"level": LEVEL, "samples": bootstrap_samples, "seed": seed}
    how = {"attention": attention, "window_batch": window_batch, "steps": steps}
    batches = list(itertools.batched(plans, plan_batch))
    where = None if folder is None else make_folder(folder)
    jobs = {
        (number, text): [
            _job(model, batch, windows[i : i + window_batch], how, where)
            for i in range(0, len(windows), window_batch)
        ]
        for number, batch in enumerate(batches)
        for text, windows in texts.items()
    }
    every = [job for some in jobs.values() for job in some]
    done = sum(job.size for job in every if job.kept)
    seconds, failures = 0.0, list[str]()
    parts: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
    bits: dict[str, Any] = {}
    size = sum(job.size for job in every)
    with Progress(size, label="evaluate", enabled=progress, done=done) as bar:
        for number, batch in enumerate(batches):
            layers = {name: plan_layers(model, plan, arrays) for name, plan, arrays in batch}
            bits |= {name: head_bits(mine) for name, mine in layers.items()}
            running = _running(layers, attention)
            for text, windows in texts.items():
                found: list[Measured] = []
                for job in jobs[number, text]:
                    begun = time.perf_counter()
                    found.append(job.kept or _measure(model, layers, running, job, how, text, bar))
                    if not job.kept:
                        seconds += time.perf_counter() - begun
                        if job.path is not None:
                            window_files.write(job.path, found[-1])
                part, failed = _part(
                    model, batch, layers, text, windows, join(found), context, bootstrap
                )
                parts[text].append(part)
                failures += failed
    table = {
        "schema": SCHEMA,
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "attention": attention,
        "bootstrap": bootstrap,
        "texts": [some[0]["text"] for some in parts.values()],
        "rows": [row for some in parts.values() for part in some for row in part["rows"]],
        "head_errors": {
            text: {name: e for part in some for name, e in part["head_errors"].items()}
            for text, some in parts.items()
        },
        "head_bits": bits,
    }
    losses = {name: loss for name, plan, _ in plans if (loss := layer_loss(plan)) is not None}
    table |= {"layer_loss": losses} if losses else {}
    joint = [name for name, plan, _ in plans if any(x.joint is not None for x in plan.layers)]
    table |= {"joint": joint} if joint else {}
    reused = sum(job.passes for job in every if job.kept)
    passes = sum(job.passes for job in every) - reused
    quality = Quality(table=table, run=_run_info(started, seconds, passes, reused))
    if failures:
        raise NotFinite(failures, quality)
    return quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """Some plans on windows that run together; the file of what they measure, and what it held."""

    plans: int
    windows: Int[np.ndarray, "B T"]
    path: Path | None
    kept: Measured | None

    @property
    def passes(self) -> int:
        """Of a window through the model: one for every plan and one exact."""
        return len(self.windows) * (self.plans + 1)

    @property
    def size(self) -> int:
        """Tokens of all passes."""
        return self.passes * self.windows.shape[1]


def _job(
    model: Model,
    plans: Sequence[NamedPlan],
    windows: Int[np.ndarray, "B T"],
    how: dict[str, Any],
    folder: Path | None,
) -> _Job:
    path = folder and folder / window_files.file_name(model, plans, windows, how)
    due = window_files.shapes(model.spec, len(plans), windows.shape, how["steps"])
    kept = window_files.read(path, due) if path else None
    return _Job(plans=len(plans), windows=windows, path=path, kept=kept)


def _running(layers: dict[str, Layers], attention: str) -> dict[str, list[Any]]:
    """What the plug takes: one program for all learned segments."""
    if attention == "simulated":
        shared = {name: [x and shared_layer(x) for x in found] for name, found in layers.items()}
        wide = iter(composed.as_wide([x for found in shared.values() for x in found if x]))
        return {name: [x and next(wide) for x in found] for name, found in shared.items()}
    return {name: model_cache.fresh(found) or found for name, found in layers.items()}


def _measure(
    model: Model,
    layers: dict[str, Layers],
    running: dict[str, list[Any]],
    job: _Job,
    how: dict[str, Any],
    text: str,
    bar: Progress,
) -> Measured:
    """What some plans do on some windows, as `window_files` holds it."""
    windows, size = job.windows, how["window_batch"]
    # A short last batch is filled up so that nothing is compiled for another shape.
    tokens = np.concatenate([windows] + [windows[:1]] * (size - len(windows)))
    steps = how["steps"]
    # All steps of a plan count as one layer more.
    part = shares(model.spec, windows.shape[1])
    whole = job.size / (1 + bool(steps) / len(part))
    hidden, errors = hidden_states(
        model, running, tokens, PLUGS[how["attention"]],
        lambda layer: bar.advance(whole * part[layer], text),
    )  # fmt: skip
    nll, rows = score(
        model, hidden, tokens, lambda share: bar.advance(whole * part[-1] * share, text)
    )
    found = {"exact": np.stack(nll)[None]}
    for name in window_files.TOKENS:
        found[name] = np.stack([[row[name] for row in rows[plan]] for plan in layers])
    for i in range(len(model.spec.layers)):
        for name in errors[next(iter(layers))][i]:
            found[f"errors.{i}.{name}"] = np.stack([errors[plan][i][name] for plan in layers])
    if steps:
        each = (job.size - whole) / len(layers) / (steps + 1)
        reader = how["attention"] if how["attention"] in KERNELS else None
        walked = [
            step_by_step(
                model,
                layers[plan],
                tokens,
                hidden[None],
                steps,
                lambda: bar.advance(each, text),
                reader,
            )
            for plan in layers
        ]
        for name in window_files.STEPS:
            found[f"steps.{name}"] = np.stack([x[name] for x in walked]).astype(np.float64)
    return {name: x[:, : len(windows)] for name, x in found.items()}


def _part(
    model: Model,
    plans: Sequence[NamedPlan],
    layers: dict[str, Layers],
    text: str,
    windows: Int[np.ndarray, "N T"],
    found: Measured,
    context: int,
    bootstrap: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Text, rows and head errors of some plans on one text; and why some have no row."""
    exact = found["exact"][0]
    _check_exact(exact)
    rows, failures = list[dict[str, Any]](), list[str]()
    head_errors: dict[str, Any] = {}
    for i, (name, plan, _) in enumerate(plans):
        mine = {key: x[i] for key, x in found.items() if key != "exact"}
        errors = [
            {
                key: mine[f"errors.{layer}.{key}"]
                for key in window_files.ERRORS
                if f"errors.{layer}.{key}" in mine
            }
            for layer in range(len(model.spec.layers))
        ]
        why = _not_finite(model, layers[name], windows, mine, errors)
        if why:
            failures.append(f"{name}: {why}")
            continue
        storage = storage_columns(name, plan, layers[name], model, context, windows.shape[1])
        rows.append(storage | {"text": text} | _quality(plan, mine, exact, bootstrap))
        head_errors[name] = mean_errors(errors)
    text_row = {
        "text": text,
        "windows": len(windows),
        "window_tokens": windows.shape[1],
        "tokens": int(exact.size),
        "windows_sha256": window_files.sha256(windows),
        "perplexity": metrics.perplexity(exact),
    }
    return {"text": text_row, "rows": rows, "head_errors": head_errors}, failures


def _quality(
    plan: Plan, mine: Measured, exact: Float64[np.ndarray, "N P"], bootstrap: dict[str, Any]
) -> dict[str, Any]:
    """The columns of quality of one row."""
    tokens = metrics.TokenMetrics(
        kl=mine["kl"], nll=mine["nll"], nll_exact=exact, top1=mine["top1"]
    )
    scope = plan_scored(plan, exact.shape[1] + 1)
    walked = {}
    if "steps.kl" in mine:
        walked = {"steps": metrics.steps(tokens, mine["steps.kl"], mine["steps.top1"], **bootstrap)}
    return {
        "quantized_tokens": scope.quantized * len(exact),
        **tokens.since(scope.first).summary(**bootstrap),
        "kl_by_position": metrics.kl_by_position(tokens.kl, scope.first),
        "by_position": tokens.by_position(scope.first, **bootstrap),
        **walked,
    }


def _check(
    model: Model,
    plans: Sequence[NamedPlan],
    texts: Mapping[str, np.ndarray],
    attention: str,
    steps: int,
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
        if not 0 <= steps < length:
            raise TurboqError(
                f"{text}: {steps=} must be less than the {length} tokens of a window, of which the "
                "last has nothing to predict"
            )
    geometry = model_geometry(model)
    for name, plan, _ in plans:
        try:
            check_model(plan, geometry)
            for windows in texts.values():
                plan_scored(plan, windows.shape[1])
        except TurboqError as error:
            raise TurboqError(f"plan {name!r}: {error}") from None


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
    mine: Measured,
    errors: list[dict[str, np.ndarray]],
) -> str | None:
    """What is not finite of a plan's predictions and errors, and where that comes from."""
    stored = np.sum([e.sum(axis=1) for layer in errors for e in layer.values()], axis=0)
    walked = mine.get("steps.kl", np.zeros((len(windows), 0)))
    for window in range(len(windows)):
        bad = ~np.isfinite(mine["nll"][window] + mine["kl"][window])
        bad[len(bad) - walked.shape[1] :] |= ~np.isfinite(walked[window])
        if not bad.any() and np.isfinite(stored[window]):
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
        "devices": list(map(str, typing.cast(list[Any], jax.devices()))),
    }
