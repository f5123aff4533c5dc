"""Sensitivity from true KL: one thing changed at a time, measured from the changed layer on.

A move changes units of one layer. Moves of a layer share forward passes (`rows` at a time) that
start from that layer's input, so a move costs half a forward pass on average, plus the head.
Finished passes are appended to a file; the same call with the same inputs continues from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq.plan.errors import PlanError
from turboq.plan.read import read
from turboq.plan.strict import parse_json
from turboq_calibrate.candidates.table import Table
from turboq_calibrate.cost.side_by_side import EXACT, Engine, Run
from turboq_calibrate.observe.recipe import differences
from turboq_calibrate.run.progress import Progress

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """Units of one layer and the candidate that each of them gets."""

    layer: int
    changes: tuple[tuple[int, int], ...]  # (index in `table.units`, candidate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Mean KL against the exact model, nats per token, of every move and window; of the base plan
    without a move in `base` (0 when the base is the exact model)."""

    moves: tuple[Move, ...]
    kl: Float[np.ndarray, "N W"]
    base: Float[np.ndarray, "W"]

    @property
    def change(self) -> Float[np.ndarray, "N"]:
        """What every move does to the KL, mean over windows."""
        return (self.kl - self.base[None, :]).mean(axis=1)


def unit_moves(table: Table, candidates: Sequence[int] | None = None) -> tuple[Move, ...]:
    """Every unit alone at every candidate (or at those given)."""
    chosen = range(len(table.labels)) if candidates is None else candidates
    return tuple(
        Move(layer=unit.layer, changes=((u, c),))
        for u, unit in enumerate(table.units)
        for c in chosen
    )


def measure(
    engine: Engine,
    moves: Sequence[Move],
    *,
    base: Int[np.ndarray, "U"] | None = None,
    frozen: bool = True,
    rows: int = 8,
    path: Path | str | None = None,
    progress: bool = True,
) -> Divergence:
    """KL of every move, alone on top of `base`.

    Args:
      base: the plan that is changed; None is the exact model, where a move's KL is what it costs
        by itself.
      frozen: see `Engine.kl`; without a base it makes no difference.
      rows: moves that share a forward pass; memory grows with it.
      path: file of finished passes (JSON lines), continued if it exists.

    Raises:
      TurboqError: the file is of other inputs, damaged, or cannot be written.
      ValueError: a move reaches outside its layer.
    """
    table = engine.table
    plan = None if base is None else table.check(base)
    batches = _batches(engine, moves, rows)
    depth = len(engine.model.spec.layers) + 1  # the head counts as one more layer
    cost = [len(b) * (depth - moves[b[0]].layer) for b in batches]
    log = _Log(path, _inputs(engine, moves, plan, frozen, rows))
    kl = np.empty((len(moves), engine.windows))
    if len(log.results) > len(batches):
        raise TurboqError(f"{path} is damaged: remove it to start again")
    for batch, found in zip(batches, log.results, strict=False):
        if [len(row) for row in found] != [engine.windows] * len(batch):
            raise TurboqError(f"{path} is damaged: remove it to start again")
        kl[batch] = found
    run: Run | None = None
    done = len(log.results)
    with Progress(
        sum(cost), label="KL", unit="layers", done=sum(cost[:done]), enabled=progress
    ) as bar:
        if plan is not None:
            run = engine.run(plan)
        for batch, layers in zip(batches[done:], cost[done:], strict=True):
            layer = moves[batch[0]].layer
            choices = np.stack([_choice(table, moves[i], plan) for i in batch])
            kl[batch] = engine.kl(choices, start=layer, run=run, frozen=frozen)
            log.append(kl[batch].tolist())
            bar.advance(layers, f"layer {layer}")
    if plan is None:
        own = np.zeros(engine.windows)
    else:
        own = engine.kl(plan[None], start=depth - 1, run=run)[0]
    return Divergence(moves=tuple(moves), kl=kl, base=own)


def isolated_costs(table: Table, found: Divergence) -> Float[np.ndarray, "U C"]:
    """KL of single-unit moves as a table; NaN where nothing was measured."""
    costs = np.full(table.sizes.shape, np.nan)
    for move, change in zip(found.moves, found.change, strict=True):
        ((unit, candidate),) = move.changes
        costs[unit, candidate] = change
    return costs


def _batches(engine: Engine, moves: Sequence[Move], rows: int) -> list[list[int]]:
    """Indices of moves that run together: one layer each, batches of a layer nearly equal."""
    if rows < 1:
        raise ValueError(f"{rows=} must be 1 or more")
    layers: dict[int, list[int]] = {}
    for i, move in enumerate(moves):
        units = [engine.table.units[u] for u, _ in move.changes]
        if any(unit.layer != move.layer for unit in units):
            raise ValueError(f"{move=} must change units of layer {move.layer} only")
        layers.setdefault(move.layer, []).append(i)
    out = []
    for layer in sorted(layers):
        all_of = layers[layer]
        count = math.ceil(len(all_of) / rows)
        size = math.ceil(len(all_of) / count)
        out.extend(all_of[s : s + size] for s in range(0, len(all_of), size))
    return out


def _choice(table: Table, move: Move, plan: np.ndarray | None) -> Int[np.ndarray, "U"]:
    choice = np.full(len(table.units), EXACT) if plan is None else plan.copy()
    for unit, candidate in move.changes:
        choice[unit] = candidate
    return choice


def _inputs(engine: Engine, moves, plan, frozen: bool, rows: int) -> dict[str, Any]:
    """What identifies a measurement."""
    listed = json.dumps([[m.layer, m.changes] for m in moves])
    return {
        "format": FORMAT,
        "model": engine.model.fingerprint,
        "tokens": hashlib.sha256(engine.tokens.astype("<i4").tobytes()).hexdigest(),
        "shape": list(engine.tokens.shape),
        "candidates": engine.table.sha256,
        "policy": dataclasses.asdict(engine.policy),
        "moves": hashlib.sha256(listed.encode()).hexdigest(),
        "base": None if plan is None else plan.tolist(),
        "frozen": frozen,
        "rows": rows,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Began:
    """The first line of a log."""

    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Finished:
    """Any other: the KL of every move of a pass in every window."""

    kl: tuple[tuple[float, ...], ...]


class _Log:
    """One JSON line of inputs, then one per finished pass, each on disk before the next starts."""

    def __init__(self, path: Path | str | None, inputs: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.results: list[Any] = []
        if self.path is None:
            return
        if not self.path.exists():
            atomic_write(self.path, json.dumps({"inputs": inputs}) + "\n")
            return
        first, *rest = self._lines()
        different = differences(first.get("inputs"), inputs)
        if different:
            raise TurboqError(
                f"{self.path} holds another measurement ({'; '.join(different[:3])}): "
                "use another file or remove it"
            )
        self.results = [line["kl"] for line in rest]

    def _lines(self) -> list[dict[str, Any]]:
        """Complete lines; a torn last one (the process was killed in a write) is cut off."""
        assert self.path is not None
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            atomic_write(self.path, whole)
        try:
            lines = [parse_json(line) for line in whole.splitlines()]
            for i, line in enumerate(lines):
                read(_Finished if i else _Began, line, f"line {i + 1}", {})
        except PlanError as error:
            raise TurboqError(f"{self.path} is damaged ({error}): remove it") from None
        if not lines:
            raise TurboqError(f"{self.path} is empty: remove it")
        return lines

    def append(self, kl: list) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as f:
                f.write(json.dumps({"kl": kl}).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise TurboqError(f"cannot write {self.path}: {error.strerror or error}") from error
