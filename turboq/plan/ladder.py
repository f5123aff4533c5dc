"""A ladder of plans: every rung stores one (layer, K or V) in fewer bits than the rung above it.

    Ladder(sides = (LadderSide(layer, side, tiers = (Tier, ...)), ...), order = (side, ...))

Tiers of a side are listed best first. Rung 0 has every side in its first tier; `order` names the
side that falls by one tier from each rung to the next, least loss per bit first, so that an engine
whose memory fills goes down one step at a time and rewrites one side of one layer.

On disk a folder of two files. `ladder.json` is described by `turboq/ladder.schema.json`; fitted
arrays lie in the safetensors file that it names, arrays that tiers share once. A save writes that
file under the name of its hash, then replaces the JSON, then clears older files away: cut off at
any point, the old ladder or the new one loads, whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turboq.cache.layer import TokenPolicy
from turboq.files import atomic_write, make_folder
from turboq.plan import tensors
from turboq.plan.document import plan_hash, pretty, schema, to_json
from turboq.plan.errors import PlanConflict, PlanError
from turboq.plan.geometry import ModelGeometry
from turboq.plan.io import LADDER_NAME, MAX_ARRAY_BYTES, read_file
from turboq.plan.provenance import Measurement, Provenance, Quality
from turboq.plan.read import Extra, read
from turboq.plan.strict import MAX_JSON_BYTES, parse_json
from turboq.plan.types import SIDES, ArrayFile, LayerPlan, Plan, Producer, SidePlan, array_name

LADDER_VERSION = 1
_FILE = re.compile(r"ladder\.[0-9a-f]{16}\.safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """One way to store a side; `arrays`: each fitted array's tensor in the side file.

    Arrays are named as in a plan, without "layers.{i}.{k|v}.": "mean", or "heads.0.mean".
    """

    store: SidePlan
    arrays: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderSide:
    """K or V of one layer and its tiers, best first."""

    layer: int
    side: Literal["k", "v"]
    tiers: tuple[Tier, ...]

    def __post_init__(self):
        if not self.tiers:
            raise ValueError("tiers=() must hold one tier at least")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Everything but the arrays' values. `loss`: predicted nats per token of every rung.

    Raises:
      PlanConflict: sides that are not the model's, or an order that is not of their tiers.
    """

    model: ModelGeometry
    tokens: TokenPolicy
    sides: tuple[LadderSide, ...]
    order: tuple[int, ...]
    loss: tuple[float, ...]
    ladder_version: int = LADDER_VERSION
    producer: Producer = dataclasses.field(default_factory=Producer)
    arrays: ArrayFile | None = None
    provenance: Provenance | None = None

    def __post_init__(self):
        due = [(x.index, side) for x in self.model.cache_layers for side in SIDES]
        if [(x.layer, x.side) for x in self.sides] != due:
            raise PlanConflict(
                "sides", "must be K and V of every layer that owns a cache, in order"
            )
        falls = collections.Counter(self.order)
        for i, side in enumerate(self.sides):
            if falls.pop(i, 0) != len(side.tiers) - 1:
                raise PlanConflict("order", f"must name side {i} {len(side.tiers) - 1} times")
            bits = [self.bits_of(i, t) for t in range(len(side.tiers))]
            if any(b >= a for a, b in itertools.pairwise(bits)):
                raise PlanConflict(f"sides[{i}].tiers", f"have {bits} bits, which must fall")
        if falls:
            raise PlanConflict("order", f"names side {min(falls)}, of {len(self.sides)}")
        if len(self.loss) != self.rungs or not all(map(math.isfinite, self.loss)):
            raise PlanConflict("loss", f"must be {self.rungs} numbers, one of every rung")
        for tiers in self.levels():
            self.plan_of(tiers)

    @property
    def rungs(self) -> int:
        """How many plans this is."""
        return len(self.order) + 1

    def bits_of(self, side: int, tier: int) -> int:
        """Stored bits of one token of one side in one of its tiers."""
        x = self.sides[side]
        store = x.tiers[tier].store
        return sum(store.of(h).bits_per_vector for h in range(self.model.layers[x.layer].kv_heads))

    @functools.cached_property
    def bits(self) -> tuple[int, ...]:
        """Stored bits of one token, all layers, of every rung."""
        at = [0] * len(self.sides)
        found = [sum(self.bits_of(i, 0) for i in range(len(at)))]
        for i in self.order:
            found.append(found[-1] - self.bits_of(i, at[i]) + self.bits_of(i, at[i] + 1))
            at[i] += 1
        return tuple(found)

    def tiers(self, rung: int) -> list[Tier]:
        """The tier of every side on one rung.

        Raises:
          PlanError: there is no such rung.
        """
        if not 0 <= rung < self.rungs:
            raise PlanError("", f"rung {rung} must be within 0..{self.rungs - 1}")
        fallen = collections.Counter(self.order[:rung])
        return [side.tiers[fallen[i]] for i, side in enumerate(self.sides)]

    def levels(self) -> Iterator[list[Tier]]:
        """Tiers of all sides, so that every tier is in one of the lists."""
        for t in range(max(len(x.tiers) for x in self.sides)):
            yield [x.tiers[min(t, len(x.tiers) - 1)] for x in self.sides]

    def plan_of(self, tiers: Sequence[Tier], quality: Quality | None = None) -> Plan:
        """The plan that stores every side in a tier of its own; its arrays are `arrays_of`."""
        stores = iter(tier.store for tier in tiers)
        layers = [
            LayerPlan(index=x.index, path=x.path, k=next(stores), v=next(stores))
            for x in self.model.cache_layers
        ]
        return Plan(
            model=self.model, tokens=self.tokens, layers=tuple(layers),
            provenance=self.provenance, quality=quality,
        )  # fmt: skip

    def arrays_of(self, tiers: Sequence[Tier], stored: Mapping[str, np.ndarray]) -> tensors.Tensors:
        """The fitted arrays of `plan_of` under their names there."""
        return {
            array_name(side.layer, side.side, name): stored[tensor]
            for side, tier in zip(self.sides, tiers, strict=True)
            for name, tensor in tier.arrays.items()
        }

    def rung(self, number: int, stored: Mapping[str, np.ndarray]) -> tuple[Plan, tensors.Tensors]:
        """One rung as a plan, and its arrays.

        Raises:
          PlanError: there is no such rung.
        """
        tiers = self.tiers(number)
        predicted = Measurement(text=f"rung {number} of a ladder", kl_mean=self.loss[number])
        plan = self.plan_of(tiers, Quality(predicted=predicted))
        return plan, self.arrays_of(tiers, stored)


def shared(named: Mapping[str, np.ndarray], stored: dict[str, np.ndarray]) -> dict[str, str]:
    """Puts arrays among those `stored`, equal ones once; their names -> the stored names.

    A name that holds other values already gets a number behind it.
    """
    found = {}
    for name, values in named.items():
        place, n = name, 1
        while place in stored and not np.array_equal(stored[place], values):
            place, n = f"{name}.{n}", n + 1
        stored[place] = values
        found[name] = place
    return found


def ladder_schema() -> dict[str, Any]:
    """The published JSON Schema of `ladder.json`, on the definitions of the plan's."""
    found = json.loads(resources.files("turboq").joinpath("ladder.schema.json").read_text("utf-8"))
    return found | {"$defs": schema()["$defs"] | found["$defs"]}


def save_ladder(
    ladder: Ladder, stored: Mapping[str, np.ndarray], folder: str | os.PathLike[str]
) -> Ladder:
    """Writes a ladder; returns it as it will load.

    Raises:
      PlanError: the arrays are not the ladder's.
      TurboqError: the folder cannot be written; an earlier ladder stays intact.
    """
    _check_arrays(ladder, stored)
    raw = tensors.write_bytes(dict(stored))
    sha256 = hashlib.sha256(raw).hexdigest()
    file = f"ladder.{sha256[:16]}.safetensors"
    spec = ArrayFile(file=file, size=len(raw), sha256=sha256, tensors=tensors.specs(dict(stored)))
    ladder = dataclasses.replace(ladder, arrays=spec)
    content = to_json(ladder)
    text = pretty(content | {"hash": plan_hash(content)}) + "\n"
    _parse(text.encode())  # what cannot be read back is not written
    folder = make_folder(folder)
    atomic_write(folder / file, raw)
    atomic_write(folder / LADDER_NAME, text)
    for old in folder.iterdir():
        if _FILE.fullmatch(old.name) and old.name != file:
            with contextlib.suppress(OSError):
                old.unlink()
    return ladder


def load_ladder(path: str | os.PathLike[str]) -> tuple[Ladder, tensors.Tensors]:
    """The ladder in a folder (or its JSON file) and its tensors.

    Raises:
      PlanError: one line that names the file, the field or tensor, and what is wrong.
    """
    path = Path(path)
    path = path / LADDER_NAME if path.is_dir() else path
    try:
        ladder = _parse(read_file(path, MAX_JSON_BYTES))
        spec = ladder.arrays
        if spec is None:
            raise PlanError("arrays", "missing")
        raw = read_file(path.parent / spec.file, MAX_ARRAY_BYTES)
        if hashlib.sha256(raw).hexdigest() != spec.sha256 or len(raw) != spec.size:
            raise PlanConflict("arrays.sha256", f"{spec.file} is damaged or exchanged")
        stored = tensors.read_bytes(raw, spec.tensors)
        _check_arrays(ladder, stored)
    except PlanError as error:
        raise error.in_file(str(path)) from None
    return ladder, stored


def _parse(raw: bytes) -> Ladder:
    value = parse_json(raw)
    if not isinstance(value, dict) or value.get("ladder_version") != LADDER_VERSION:
        raise PlanError("ladder_version", f"must be {LADDER_VERSION}: is this a ladder?")
    value = dict(value)
    stated = value.pop("hash", None)
    if stated != plan_hash(value):
        raise PlanConflict("hash", "is not that of the content: edited or damaged")
    extra: Extra = {}
    ladder = read(Ladder, value, "", extra)
    if extra:
        raise PlanError(next(iter(extra)), "has fields of its own (x-), which a ladder cannot keep")
    return ladder


def _check_arrays(ladder: Ladder, stored: Mapping[str, np.ndarray]) -> None:
    """All arrays of all tiers are there and usable, and none is left over."""
    used = {tensor for x in ladder.sides for tier in x.tiers for tensor in tier.arrays.values()}
    if odd := sorted(used ^ set(stored)):
        what = "is missing" if odd[0] in used else "belongs to no tier"
        raise PlanConflict(odd[0], f"tensor {what}")
    for tiers in ladder.levels():
        tensors.check_arrays(ladder.plan_of(tiers), ladder.arrays_of(tiers, stored))
