"""Writing an export: everything checked first, then one folder, whole or not at all."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from turboq.codecs.exact import Exact
from turboq.errors import TurboqError, shortened
from turboq.export import checkpoint as checkpoints
from turboq.export.base import Exporter, Options, Projection, Tensors, entries, json_file
from turboq.export.report import (
    FILE,
    PLAN_FOLDER,
    ExportReport,
    Kl,
    engine_plan,
    make_report,
)
from turboq.files import PARTIAL, atomic_write, clear_abandoned, exchange, make_folder
from turboq.plan import Plan, check_arrays, save
from turboq.plan.document import fingerprint
from turboq.plan.json_file import read_json

# ((plan, arrays), (engine's plan, arrays)) -> what the export does to quality
Measure = Callable[[tuple[Plan, Tensors], tuple[Plan, Tensors]], Kl]


def export(
    plan: Plan,
    arrays: Tensors,
    exporter: Exporter,
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    measure: Measure | None = None,
) -> ExportReport:
    """Writes what `exporter` makes of a plan to the folder `out`, and returns the report.

    The folder then holds the engine's files, `export_report.json`, and in `engine_plan/` the plan
    that the engine will really run where turboq has its codecs. An earlier export of the same plan
    to the same engine is replaced. `measure` gives the KL of the plan and of the engine's own, for
    the report.

    Raises:
      TurboqError: the engine cannot hold the plan even approximately, the checkpoint is another
        model's, the folder holds something else, or turboq lacks a codec of what is to be measured.
        Nothing is written then.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layer = turboq.LayerGeometry(index=0, path="l0", **sizes)
      >>> model = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="one layer", layers=(layer,)
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=4)
      >>> plan = turboq.uniform_plan(model, k=codec, v=codec)
      >>> report = turboq.export_plan(plan, {}, turboq.ENGINES["reader"], "for_reader")
      >>> report.engine_bytes_per_token  # 2 heads of 64 + 64 numbers in 4 bits, 4 norms of 2 bytes
      136.0
    """
    options = options or Options()
    exporter.check_model(plan.model)
    exporter.check_plan(plan)
    _check_options(exporter, options)
    out = Path(out)
    arrays = check_arrays(plan, arrays)
    if options.checkpoint is not None:
        config = checkpoints.read_config(options.checkpoint)
        checkpoints.check_config(plan, config, options.checkpoint)
    _check_folder(out, plan, exporter)
    projection = exporter.project(plan, arrays, options)
    runs = engine_plan(plan, arrays, projection)
    names = [*projection.files, FILE]
    if runs is not None:
        names += [f"{PLAN_FOLDER}/plan.json", f"{PLAN_FOLDER}/plan.safetensors"]
    report = make_report(plan, arrays, exporter, projection, names)
    if options.prefer == "size" and report.engine_bytes_per_token > report.plan_bytes_per_token:
        said = (
            f"--prefer=size: nothing of {exporter.name} keeps this plan within its "
            f"{report.plan_bytes_per_token:g} bytes a token; this is the smallest found, as "
            "--prefer=quality may choose too"
        )
        report = dataclasses.replace(report, notes=(*report.notes, said))
    _check_holds(plan, arrays, exporter, projection)
    if measure is not None:
        if runs is None:
            raise TurboqError(
                f"turboq has no codec for what {exporter.name} would store, so that --measure has "
                "nothing to run: measure in the engine"
            )
        report = dataclasses.replace(report, kl=measure((plan, arrays), runs))
    parent = make_folder(out.absolute().parent)
    clear_abandoned(parent / out.name)
    try:
        temporary = Path(tempfile.mkdtemp(PARTIAL, f".{out.name}.", parent))
    except OSError as error:
        raise TurboqError(f"cannot write to {parent}: {error.strerror or error}") from error
    try:
        temporary.chmod(0o755)
        for name, data in projection.files.items():
            atomic_write(temporary / name, data)
        if runs is not None:
            save(*runs, temporary / PLAN_FOLDER)
        atomic_write(temporary / FILE, json_file(report.document()))
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _check_options(exporter: Exporter, options: Options) -> None:
    """Refuses an option that the engine would silently leave aside."""
    default = Options()
    if options.ladder is not None and "ladder" not in exporter.uses:
        raise TurboqError(
            f"{exporter.name} stores one plan: take a rung of the ladder with `turboq plan "
            "--ladder=PATH --budget=...`"
        )
    for name in ("checkpoint", "tensor_parallel", "rope_envelope"):
        if getattr(options, name) != getattr(default, name) and name not in exporter.uses:
            raise TurboqError(f"--{name} means nothing to {exporter.name}: leave it out")


def _check_holds(plan: Plan, arrays: Tensors, exporter: Exporter, projection: Projection) -> None:
    """Refuses an export that would quantize nothing of what the plan quantizes."""
    quantized = [e for e in entries(plan, arrays) if not isinstance(e.codec, Exact)]
    if not quantized:
        return
    held = [projection.held[e.place] for e in quantized]
    if not all(isinstance(h.codec, Exact) for h in held):
        return
    why = next((h.note for h in held if not h.reduced and h.note), "")
    if not why:
        why = f"nothing holds {quantized[0]} and the others in as many bits (--prefer=size)"
    raise TurboqError(
        f"{exporter.name} cannot hold this plan even approximately, all would stay"
        f" {held[0].format}: {why}; choose another --engine, or plan with --engine={exporter.name}"
    )


def _check_folder(out: Path, plan: Plan, exporter: Exporter) -> None:
    """Refuses a folder that holds anything but this plan's export to this engine."""
    if not out.exists():
        return
    if not out.is_dir():
        raise TurboqError(f"output folder {out} is a file: choose another --out")
    if not any(out.iterdir()):
        return
    fix = "choose another --out, or empty it"
    if not (out / FILE).is_file():
        raise TurboqError(f"output folder {out} holds other files: {fix}")
    report = read_json(out / FILE, ExportReport, otherwise=fix)
    engine, held = report["engine"], report["plan_hash"]
    if (engine, held) != (exporter.name, fingerprint(plan)):
        raise TurboqError(
            f"output folder {out} holds the export of another plan ({shortened(report['model'])}, "
            f"for {shortened(engine)}, {shortened(held, 23)}): choose another --out, or delete it"
        )


def _replace(temporary: Path, out: Path) -> None:
    """Puts the finished folder in place of an earlier one, which `temporary` is then."""
    try:
        if out.exists():
            exchange(temporary, out)
        else:
            os.replace(temporary, out)
    except OSError as error:
        raise TurboqError(f"cannot write {out}: {error.strerror or error}") from error
