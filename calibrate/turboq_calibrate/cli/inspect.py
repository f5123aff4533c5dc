"""Says what each PATH is, checks it, and prints what it holds.

A plan, a ladder, statistics, an evaluation, results of tasks, an export, or a model (a folder, a
.gguf file, a config.json): folders or their files; what a folder holds of several kinds is said of
each.
"""

from __future__ import annotations

import collections
from pathlib import Path

from absl import flags

from turboq.errors import TurboqError
from turboq.hub_cache import snapshot_hint
from turboq.json_object import read_object

ARGUMENTS = "PATH ..."
REQUIRED = ()
RESUME = "run the same command again"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "context", 32768, "Tokens at which a plan's cache is counted.", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("layers", None, "A plan's layers one by one.", flag_values=values)


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    if not arguments:
        raise TurboqError("name a path: a plan, a statistics folder, a model or what was written")
    for i, argument in enumerate(arguments):
        if i:
            print()
        print(describe(argument, values.context, layers=values.layers))


def describe(argument: str, context: int, *, layers: bool | None = None) -> str:
    """What is at a path, as text.

    Raises:
      TurboqError: nothing is there, or what is there is damaged or of no known kind.
    """
    from turboq.plan.io import is_ladder
    from turboq_calibrate.models import hub, packaged

    if argument in packaged.MODELS:
        return _model(argument)
    path = Path(hub.local(argument, hub.CONFIG))
    argument = str(path)
    if not path.exists():
        raise TurboqError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent

    def holds(name: str) -> bool:
        return (path / name).is_file() if path.is_dir() else path.name == name

    found = []
    if is_ladder(path):
        found.append(_ladder(path))
    elif holds("plan.json"):
        found.append(_plan(path, context, layers))
    found += [say(path, folder) for name, say in _RESULTS.items() if holds(name)]
    if any((path / name / "manifest.json").is_file() for name in (".", "statistics")):
        found.append(_statistics(path))
    if (path / "observe" / "inputs.json").is_file() and not found:
        raise TurboqError(f"{path} is an unfinished run: give the same `turboq calibrate` again")
    if path.suffix == ".gguf":
        found.append(_model(argument))
    elif holds("config.json") and not holds("export_report.json"):  # some exports bring one
        found.append(_model(str(folder)))
    elif not found and path.suffix == ".json" and path.is_file():
        config = "model_type" in read_object(path)
        found.append(_counted(argument, _ALONE) if config else _plan(path, context, layers))
    if not found:
        raise TurboqError(
            f"{path} is no plan (plan.json), no statistics folder, nothing that a command wrote "
            f"and no model (config.json, .gguf){snapshot_hint(path)}"
        )
    return "\n\n".join(found)


def _plan(path: Path, context: int, layers: bool | None) -> str:
    from turboq.plan import load, summary

    plan, _ = load(path)
    return f"{path}: plan\n{summary(plan, context, layers=layers)}"


def _ladder(path: Path) -> str:
    from turboq.plan.ladder import load_ladder

    ladder, stored = load_ladder(path)
    bits = [ladder.bits[0] / 8, ladder.bits[-1] / 8]
    return "\n".join(
        [
            f"{path}: ladder of {ladder.rungs} plans for {ladder.model.name}",
            f"rungs: {bits[0]:g} to {bits[1]:g} B per token, predicted loss {ladder.loss[0]:.4g} "
            f"to {ladder.loss[-1]:.4g} nats per token",
            f"arrays: {len(stored)} tensors, {sum(x.nbytes for x in stored.values()) / 2**20:.1f} "
            "MiB",
        ]
    )


def _evaluation(path: Path, folder: Path) -> str:
    from turboq_calibrate.measure.quality_table import nats, over_texts, read_quality

    quality = read_quality(folder)
    rows = sorted(over_texts(quality.rows), key=lambda row: row["kl_mean"])
    texts = [
        f"{t['text']}, {t['windows']} windows of {t['window_tokens']} tokens"
        for t in quality.table["texts"]
    ]
    return "\n".join(
        [
            f"{path}: evaluation of {len(rows)} plans, model {quality.table['model']}",
            f"texts: {'; '.join(texts)}",
            *(
                f"{row['name']}: KL {nats(row['kl_mean'])} nats per token at "
                f"{row['bits_per_channel']:.2f} bits per channel"
                for row in rows[:_MOST]
            ),
            *([f"and {len(rows) - _MOST} more"] if len(rows) > _MOST else []),
            f"drawn: turboq report --run={folder}",
        ]
    )


def _tasks(path: Path, folder: Path) -> str:
    from turboq_calibrate.tasks.results import read_results

    found = read_results(folder)
    rows = found["rows"]
    each = {key: dict.fromkeys(str(r[key]) for r in rows) for key in ("plan", "task", "length")}
    return "\n".join(
        [
            f"{path}: results of {len(each['task'])} tasks, model {found['model']}, seed "
            f"{found['seed']}",
            f"tasks: {', '.join(each['task'])}; tokens: {', '.join(each['length'])}",
            f"plans: {', '.join(each['plan'])}",
            f"drawn: turboq report --run={folder}",
        ]
    )


def _export(path: Path, folder: Path) -> str:
    from turboq.export.report import FILE, ExportReport
    from turboq.plan.json_file import read_json

    found = read_json(folder / FILE, ExportReport, otherwise="export again")
    counts = ", ".join(f"{n} {name}" for name, n in found["counts"].items() if n)
    return "\n".join(
        [
            f"{path}: export of {found['model']} for {found['engine_title']}: {found['status']} "
            f"({counts} of K and V heads)",
            f"checked: {found['checked']}",
            f"one token: {found['engine_bytes_per_token']:g} bytes in the engine, "
            f"{found['plan_bytes_per_token']:g} in the plan {found['plan_hash'][:19]}",
            f"files: {', '.join(found['files'])}",
            *found["flags"],
        ]
    )


_MOST = 8  # rows of an evaluation
_ALONE = TurboqError("a configuration by itself")
_RESULTS = {"quality.json": _evaluation, "tasks.json": _tasks, "export_report.json": _export}


def _statistics(path: Path) -> str:
    from turboq_calibrate.observe.statistics_files import load_statistics

    statistics = load_statistics(path)
    manifest = statistics.manifest
    sampled = 0
    for index, entry in enumerate(manifest.layers):
        _ = statistics.layers[index]  # reads and checks the layer's files
        sampled = 0 if entry["tokens"] is None else len(statistics.tokens(index))
    inputs = manifest.inputs
    owner = statistics.geometry.cache_layers[0]
    first = manifest.layers[owner.index]
    text, recipe = inputs["text"], inputs["recipe"]
    files = [file for layer in manifest.layers for file in (layer, layer["tokens"]) if file]
    texts = ", ".join(f"{t['name']} ({t['windows']})" for t in text["texts"])
    bos = ", each after BOS" if text["bos"] else ""
    return "\n".join(
        [
            f"{path}: statistics, all files as their manifest says",
            f"model: {inputs['model']['name']} ({inputs['model']['family']}), fingerprint "
            f"{inputs['model']['fingerprint'][:12]}",
            f"text: {text['windows']} windows of {text['window']} tokens{bos}: {texts}",
            f"counted: {manifest.tokens:,} tokens per head "
            f"(first {recipe['skip']} of each window left out), {sampled:,} of them sampled",
            f"layers: {len(manifest.layers)}; K {first['k']}, V {first['v']}, Q {first['q']} "
            f"[heads, dim]; {sum(file['bytes'] for file in files) / 2**20:.1f} MiB",
            f"seed {recipe['seed']}",
        ]
    )


def _model(argument: str) -> str:
    from turboq.cache import accounting
    from turboq_calibrate.models.model import open_source
    from turboq_calibrate.models.params import parameter_count
    from turboq_calibrate.models.spec import DeltaNet, Mamba

    try:
        spec = open_source(argument).spec
    except TurboqError as why:
        return _counted(argument, why)
    owners = [layer for layer in spec.layers if layer.owns_cache]
    heads = [(layer.kv_heads, layer.head_dim, layer.v_head_dim) for layer in owners]
    shapes = sorted(
        {
            (s.heads, s.kv_heads, s.head_dim, s.window)
            for s in spec.layers
            if not s.recurrent and not s.latent
        },
        key=str,
    )
    described = "; ".join(
        f"{h} query heads, {k} KV heads, head dim {d}" + (f", window {w}" if w else "")
        for h, k, d, w in shapes
    )
    latents = sorted(
        {(s.heads, s.v_head_dim, s.head_dim) for s in spec.layers if s.latent is not None}
    )
    described += "; ".join(
        f"{h} query heads, one latent vector of {v} + {k} rotated channels" for h, v, k in latents
    )
    for kind, called in ((DeltaNet, "gated delta-nets"), (Mamba, "Mamba-2 mixers")):
        count = sum(isinstance(layer.recurrent, kind) for layer in spec.layers)
        described += f"; {count} {called}" if count else ""
    return "\n".join(
        [
            f"{argument}: model {spec.name} ({spec.family})",
            f"parameters: {parameter_count(spec):,}; vocabulary {spec.vocab:,}; "
            f"context {spec.context:,}",
            f"layers: {len(spec.layers)}, {len(owners)} with a KV cache; {described}",
            f"exact bf16 cache: {accounting.exact_bytes(heads, context=1):,} bytes per token, "
            f"{accounting.readable(accounting.exact_bytes(heads, context=spec.context))} "
            f"at {spec.context:,} tokens",
        ]
    )


def _counted(argument: str, why: TurboqError) -> str:
    """A model that turboq counts and does not run: what `turboq memory` knows of it."""
    from turboq.what_fits import baseline
    from turboq_calibrate.what_fits.read_geometry import read_geometry

    found = read_geometry(argument)
    kinds = collections.Counter(layer.kind for layer in found.layers)
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return "\n".join(
        [
            f"{argument}: model {found.name} ({found.family}), counted but not run: {why}",
            f"layers: {len(found.layers)} ({layers})",
            f"exact bf16 cache: {baseline(found.layers, 1):,} bytes for the first token; more: "
            f"turboq memory --model={argument}",
        ]
    )
