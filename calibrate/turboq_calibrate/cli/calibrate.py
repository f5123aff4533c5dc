"""Runs a model over text, once forwards and once backwards, and keeps what fits need in --out.

Kept are statistics of K, V and Q of every layer, of the gradients of the log likelihood at K and V,
and a sample of tokens with both. A run that was killed continues when the same command is given
again, and ends with the same bytes. A folder that holds another run (model, text or recipe) is
refused with what differs. --dry_run prints geometry, memory, disk and a time estimate from one
timed layer, and writes nothing (nor counts the time that the model writes text of its own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq_calibrate.models import Model

REQUIRED = ("out",)
RESUME = "the same command continues after the last finished chunk"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    common.model_dtype(values)
    common.observation(values)
    common.out(values, "Folder for the statistics.")
    flags.DEFINE_integer(
        "checkpoint_every", 4, "Chunks between checkpoints.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "shard", None, "Observe only part i of n, as i/n: `turboq merge` joins the folders of all "
        "n.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", None, "Devices as DATAxMODEL: windows are divided over DATA, heads over MODEL.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0 of several that share --out and a --mesh, or "
        "'auto' on a cluster that JAX recognises.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process", None, "Number of this process.", flag_values=values)
    flags.DEFINE_string(
        "captured", None, "Folder for what transformers captures of a model of any family, in an "
        "environment with torch: without a capture in it, writes the request and says what to run "
        "there; with one, writes the statistics.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("dry_run", False, "Only say what it would take.", flag_values=values)


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq_calibrate.fit.plan import check_dims
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import spec_geometry
    from turboq_calibrate.observe.recipe import Shard
    from turboq_calibrate.run.progress import phases

    if values.captured is not None:
        if values.long_context:
            raise TurboqError("--long_context: transformers chooses by itself with --captured")
        captured(values)
        return
    if values.coordinator is not None:
        join(values)
    shard = None if values.shard is None else Shard.parse(values.shard)
    recipe, mesh = common.recipe_of(values), mesh_of(values)
    # Each layer is read twice, so there is little to gain from keeping them all.
    model = load_model(
        values.model, dtype=values.model_dtype, resident=False, long_context=values.long_context
    )
    check_dims(spec_geometry(model.spec, "not read yet"))
    with phases(*common.observing(values, model)):
        _observe(values, model, recipe, shard, mesh)


def _observe(values: flags.FlagValues, model: Model, recipe, shard, mesh) -> None:
    from turboq.files import make_folder
    from turboq_calibrate.observe.observe import observe

    windows = common.observed_windows(values, model, written=not values.dry_run)
    if values.dry_run:
        from turboq_calibrate.observe.dry_run import dry_run

        if shard is not None:
            raise TurboqError(f"--dry_run speaks of the whole text, not of --shard={values.shard}")
        dry_run(model, windows, values.out, recipe)
        return
    make_folder(values.out)
    observe(
        model, windows, values.out, recipe, shard=shard, mesh=mesh,
        checkpoint_every=values.checkpoint_every,
    )  # fmt: skip


def captured(values: flags.FlagValues) -> None:
    """--captured: the request, or the statistics of what was captured."""
    from turboq_calibrate.observe.captured import (
        PROGRAM,
        is_captured,
        observe_captured,
        request,
        source_of,
    )

    for name in ("shard", "mesh", "coordinator", "dry_run"):
        if values[name].value:
            raise TurboqError(f"--captured takes no --{name}: transformers runs the model")
    source, recipe = source_of(values.model), common.recipe_of(values)
    windows = common.captured_windows(values, source)
    if is_captured(values.captured):
        observe_captured(values.captured, source, windows, values.out, recipe)
        return
    request(values.captured, windows, recipe)
    print(
        f"run this where torch and transformers are, then the same command again:\n"
        f"  python {PROGRAM} --model={values.model} --folder={values.captured}"
    )


def join(values: flags.FlagValues) -> None:
    """Makes this process one of several, before any array exists."""
    import jax

    if values.mesh is None:
        raise TurboqError("--coordinator needs --mesh=DATAxMODEL over the devices of all processes")
    if values.coordinator == "auto":
        jax.distributed.initialize()
        return
    if values.processes is None or values.process is None:
        raise TurboqError("--coordinator=HOST:PORT needs --processes and --process")
    jax.distributed.initialize(values.coordinator, values.processes, values.process)


def mesh_of(values: flags.FlagValues):
    """The mesh that --mesh describes, or None."""
    if values.mesh is None:
        return None
    from turboq_calibrate.observe.placement import make_mesh

    data, times, model = values.mesh.partition("x")
    if not (times and data.isdecimal() and model.isdecimal()):
        raise TurboqError(f"--mesh={values.mesh!r} must be DATAxMODEL, for example 4x2")
    with common.as_user_error():
        return make_mesh(int(data), int(model))
