"""Every plan on every example of some tasks, kept one by one, and the table they give."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from turboq.cache import accounting
from turboq.cache.layer import KVLayer
from turboq.codecs import Exact
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.plan import Plan, check_model, document, head_plan
from turboq.version import __version__
from turboq_calibrate.measure.evaluate import NamedPlan
from turboq_calibrate.measure.storage_columns import exact_tokens
from turboq_calibrate.measure.window_files import arrays_sha256
from turboq_calibrate.models import Model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.run.progress import Progress
from turboq_calibrate.tasks.contract import Task
from turboq_calibrate.tasks.examples import ROOM, Example, examples
from turboq_calibrate.tasks.results import SCHEMA, StoredScore, read_score
from turboq_calibrate.tasks.score import Score, score
from turboq_calibrate.tasks.statistics import at_chance, summary

Cells = dict[tuple[str, int], list[Example]]  # by task and length
Scores = dict[tuple[str, int], list[Score]]

ALL = "all that count"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_tasks(
    model: Model,
    plans: Sequence[NamedPlan],
    tasks: Sequence[Task],
    *,
    lengths: Sequence[int] = (1024,),
    count: int = 10,
    depths: Sequence[float] = DEPTHS,
    room: int = ROOM,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`tasks.json`: of every plan, length and task that counts a row (`statistics.summary`), and of
    every plan and length one over all of them. A task at which the exact cache does no better than
    chance counts for nothing: its one row is the exact cache's, and no plan is measured on it.

    Args:
      plans: (name, plan, fitted arrays), in the order of the table.
      lengths: tokens of prompt and answer; count: examples per task and length, depths in turn.
      room: tokens kept free for an answer.
      folder: keeps every score by a hash of all that it follows from.

    Raises:
      TurboqError: no plans, tasks or lengths, plans that do not fit the model, lengths beyond the
        model's context, prompts that do not fit a length, a damaged file in `folder`, predictions
        that are not finite.
    """
    names = [name for name, _, _ in plans]
    if not plans or len(set(names)) != len(names):
        raise TurboqError(f"tasks need plans of different names, got {names}")
    if not tasks or not lengths:
        raise TurboqError(f"{len(tasks)} tasks at lengths {list(lengths)}: one or more of each")
    if count < 1:
        raise TurboqError(f"{count=} must be 1 example or more")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise TurboqError(f"depths={list(depths)} must be one or more, from 0 to 1")
    geometry = model_geometry(model)
    for name, plan, _ in plans:
        try:
            check_model(plan, geometry)
        except TurboqError as error:
            raise TurboqError(f"plan {name!r}: {error}") from None
    for length in lengths:
        model.spec.check_length(length, "tasks: prompts and answers")
    every = {
        (task.name, length): examples(
            task, model.tokenizer, length=length, count=count, depths=depths, seed=seed, room=room
        )
        for length, task in itertools.product(lengths, tasks)
    }
    where = None if folder is None else make_folder(folder)
    rows: list[dict[str, Any]] = []
    with Progress(_tokens(every) * (1 + len(plans)), label="tasks", enabled=progress) as bar:

        def scores(plan: Plan, arrays: Any, cells: Cells, exact: Scores | None = None) -> Scores:
            layers = plan.kv_layers(arrays)
            key = [document(plan)["hash"], arrays_sha256(arrays)]
            found = {}
            for cell, some in cells.items():
                due = [x.greedy for x in exact[cell]] if exact else [None] * len(some)
                found[cell] = [
                    _kept(model, layers, example, greedy, where, key, bar)
                    for example, greedy in zip(some, due, strict=True)
                ]
            return found

        plain = _exact(model)
        exact = scores(plain, {}, every)
        lots = {cell: some for cell, some in every.items() if at_chance(exact[cell])}
        counts = {cell: some for cell, some in every.items() if cell not in lots}
        rows += _rows("exact", plain.kv_layers({}), lots, exact, exact, seed)
        bar.total -= _tokens(lots) * len(plans)
        for name, plan, arrays in plans:
            found = scores(plan, arrays, counts, exact)
            rows += _rows(name, plan.kv_layers(arrays), counts, found, exact, seed)
            rows += _all(name, plan.kv_layers(arrays), found, exact, seed)
    return {
        "schema": SCHEMA,
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "seed": seed,
        "depths": list(depths),
        "rows": rows,
    }


def _exact(model: Model) -> Plan:
    """Nothing quantized, nothing rounded."""
    geometry = model_geometry(model)

    def choose(index: int, side: str, head: int) -> Exact:
        layer = geometry.layers[index]
        return Exact(dim=layer.k_dim if side == "k" else layer.v_dim, dtype="float32")

    return head_plan(geometry, choose)


def _kept(
    model: Model,
    layers: Sequence[KVLayer],
    example: Example,
    greedy: tuple[int, ...] | None,
    folder: Path | None,
    plan: list[str],
    bar: Progress,
) -> Score:
    """A score from its file, or measured and kept there."""
    path = None
    if folder is not None:
        inputs = [
            [__version__, jax.__version__, jax.default_backend(), model.fingerprint, model.dtype],
            [plan, example.prompt.tolist(), example.length, example.answers, greedy],
        ]
        path = folder / (hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32] + ".json")
    note = f"{example.task} {example.index}"
    if path is not None and path.exists():
        found = read_score(path)
        bar.total -= example.length  # no work of this run
        bar.advance(0, note)
        return found
    found = score(model, layers, example, greedy)
    if path is not None:
        stored = StoredScore(**dataclasses.asdict(found))
        atomic_write(path, json.dumps(dataclasses.asdict(stored), allow_nan=False) + "\n")
    bar.advance(example.length, note)
    return found


def _rows(
    name: str, layers: Sequence[KVLayer], cells: Cells, found: Scores, exact: Scores, seed: int
) -> list[dict[str, Any]]:
    rows = []
    for cell, some in cells.items():
        task, length = cell
        row = _storage(name, layers, length) | {"task": task, "length": length}
        row |= summary(found[cell], exact[cell], seed=seed)
        row["by_depth"] = [
            {
                "depth": depth,
                "logp_change": sum(found[cell][i].logp[0] - exact[cell][i].logp[0] for i in at)
                / len(at),
                "agrees": sum(found[cell][i].agrees for i in at) / len(at),
            }
            for depth in sorted({e.depth for e in some if e.depth is not None})
            if (at := [i for i, e in enumerate(some) if e.depth == depth])
        ]
        rows.append(row)
    return rows


def _all(
    name: str, layers: Sequence[KVLayer], found: Scores, exact: Scores, seed: int
) -> list[dict[str, Any]]:
    """A row per length over all tasks that count."""
    rows = []
    for length in dict.fromkeys(length for _, length in found):
        mine, theirs = (
            [x for c in found if c[1] == length for x in of[c]] for of in (found, exact)
        )
        row = _storage(name, layers, length) | {"task": ALL, "length": length}
        rows.append(row | summary(mine, theirs, seed=seed) | {"at_chance": False, "by_depth": []})
    return rows


def _tokens(cells: Cells) -> int:
    return sum(example.length for some in cells.values() for example in some)


def _storage(name: str, layers: Sequence[KVLayer], length: int) -> dict[str, Any]:
    """What a plan stores at this length."""
    held = accounting.residency(layers, context=length)
    return {
        "plan": name,
        "bits_per_channel": accounting.bits_per_channel(layers),
        "bits_per_channel_at_length": held.bits_per_channel,
        "cache_bytes": held.total,
        "exact_tokens": exact_tokens(layers),
    }
