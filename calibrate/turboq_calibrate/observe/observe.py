"""A model over text, layer by layer, once forwards and once backwards, to statistics on disk.

    hidden_0 = embedding
    layers 0, 1, ...:     hidden_{i+1} = layer(hidden_i)
    head:                 gradient_L of drawn labels' log probability at hidden_L
    layers L-1, L-2, ...: k, v, q again from hidden_i, their gradients and gradient_i from
                          gradient_{i+1}  ->  statistics and sampled tokens of layer i

These are 2 L + 1 stages, each over all chunks of windows. Memory holds one layer's weights and one
chunk; disk holds all L + 1 hidden states and two gradients. Orbax checkpoints keep the position and
the sums of the layer at hand, so a killed run continues, and ends with the same bytes: every step
is deterministic, and files are in place before the checkpoint that relies on them.

    OUT/statistics/   the result (statistics_files)
    OUT/observe/      inputs.json, events.jsonl, run.json; while unfinished also hidden states,
                      gradients, rows of sampled tokens and checkpoints
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.plan.json_file import read_json
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.models.model import Model
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.manifest import Inputs
from turboq_calibrate.observe.placement import MeshPlacement, Placement
from turboq_calibrate.observe.recipe import (
    ObserveRecipe,
    Shard,
    check_sizes,
    differences,
    identity,
    observe_inputs,
)
from turboq_calibrate.observe.stages import Observer, Stages
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import Windows
from turboq_calibrate.run.peak_memory import peak_rss

FOLDER = "observe"


def observe(
    model: Model,
    windows: Windows,
    out_dir: str | os.PathLike[str],
    recipe: ObserveRecipe | None = None,
    *,
    shard: Shard | None = None,
    mesh: Mesh | None = None,
    checkpoint_every: int = 4,
    progress: bool = True,
    log: Callable[[str], None] = print,
    observer: Observer | None = None,
) -> Statistics:
    """Writes statistics of `windows` into `out_dir`, continuing an unfinished run found there.

    Args:
      shard: observe only this part of the windows. The shards' folders become one with
        `turboq_calibrate.observe.merge_shards.merge_shards`.
      mesh: of `placement.make_mesh`: windows and heads are divided over its devices, which may
        belong to several processes that share `out_dir`. All of them call `observe`.
      checkpoint_every: chunks between checkpoints; changes what a kill costs, not the result.
      progress: show a progress bar (plain lines without a terminal).
      log: where the closing line goes.
      observer: called with every event after it is logged (name, fields).

    Returns:
      The statistics: sums and a sample of tokens per layer, of Q, K, V and of the gradients of the
      log likelihood (nats) at K and V.

    Raises:
      TurboqError: the folder holds a run over other inputs, or another process works there; NaN or
        infinity in activations or gradients; the folder cannot be written.
      ValueError: `checkpoint_every` is not positive.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> texts = ["topics:calibration", "source:calibration"]
      >>> windows = tc.mixed_windows(texts, model.tokenizer, length=96, count=4)
      >>> statistics = tc.calibrate(model, windows, "run", progress=False, log=lambda line: None)
      >>> len(statistics.layers) == len(model.spec.layers)
      True
    """
    recipe = ObserveRecipe() if recipe is None else recipe
    if checkpoint_every < 1:
        raise ValueError(f"{checkpoint_every=} must be 1 or more chunks")
    check_sizes(model, windows, recipe)
    inputs = observe_inputs(identity(model), windows, recipe, shard)
    place = Placement() if mesh is None else MeshPlacement(mesh)
    out = Path(out_dir)
    work = make_folder(out / FOLDER)
    with _locked(work) if place.primary else contextlib.nullcontext():
        if place.primary:
            _claim(work, inputs)
        place.barrier("claimed")
        if (out / files.FOLDER / files.MANIFEST).exists():
            finished = load_statistics(out_dir)
            _compare(work, finished.manifest.inputs, inputs)
            place.barrier("compared")
            if place.primary:
                _clear(work)
                log(f"statistics in {out_dir} are complete: nothing to observe")
            return finished
        started = time.monotonic()
        run = Stages(
            model, windows, work, make_folder(out / files.FOLDER), recipe, shard, place,
            checkpoint_every, observer,
        )  # fmt: skip
        try:
            run.all(progress and place.primary)
        finally:
            run.close()
        if place.primary:
            _finish(run, windows, inputs, time.monotonic() - started, log)
        place.barrier("finished")
        return load_statistics(out_dir)


calibrate = observe  # the name in `turboq_calibrate`, where `observe` is this package


def _finish(
    run: Stages,
    windows: Windows,
    inputs: dict[str, Any],
    seconds: float,
    log: Callable[[str], None],
) -> None:
    """Writes the manifest and what the run cost, and clears the working files."""
    files.write_windows(run.statistics, windows.tokens, windows.text, windows.held_back)
    entries = run.describe()
    files.write_manifest(run.statistics, inputs, model_geometry(run.model), run.counted, entries)
    run.event("finished")
    _clear(run.work)
    cost: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss(),
        "peak_array_bytes": run.meter.peak,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    atomic_write(run.work / "run.json", json.dumps(cost, indent=1, sort_keys=True) + "\n")
    log(
        f"observed {run.tokens.size:,} tokens through {run.layers} layers in {seconds:.1f} s; "
        f"peak memory {peak_rss() / 2**20:,.0f} MiB (own arrays {run.meter.peak / 2**20:,.0f} MiB)"
    )


def _claim(work: Path, inputs: dict[str, Any]) -> None:
    """Records the inputs of a new run, or compares them with those of the one found."""
    path = work / "inputs.json"
    if not path.exists():
        _clear(work)  # whatever is left here belongs to an unknown run
        atomic_write(path, json.dumps(inputs, indent=1, sort_keys=True) + "\n")
        return
    found = read_json(path, Inputs, otherwise=f"remove {work.parent} to start again")
    _compare(work, found, inputs)


def _compare(work: Path, found: dict[str, Any], inputs: dict[str, Any]) -> None:
    lines = differences(found, inputs)
    if lines:
        raise TurboqError(
            f"{work.parent} holds statistics of other inputs ({'; '.join(lines)}): choose another "
            f"folder, or remove this one to start again"
        )


def _clear(work: Path) -> None:
    """Removes what only an unfinished run needs."""
    for pattern in ("hidden_*", "gradient_*", "sampled_*"):
        for path in work.glob(pattern):
            path.unlink(missing_ok=True)
    if (work / "checkpoints").exists():
        shutil.rmtree(work / "checkpoints")


@contextlib.contextmanager
def _locked(work: Path) -> Generator[None]:
    """Keeps a second run out of the folder; the lock dies with the process."""
    with open(work / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TurboqError(f"another run is observing into {work.parent}") from None
        yield
