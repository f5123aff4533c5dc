"""buun-llama.cpp (VBR): a tier of its own for every (layer, K or V), and the order to give them up.

    schedule.txt        VBR_LAYER_SCHEDULE: the tiers nearest to the plan, fixed
    degrade_order.txt   VBR_DEGRADE_ORDER: which side of which layer to store in fewer bits next, as
                        memory fills; every one begins as f16
    policy.json         --vbr-policy: schedules along that order for fixed budgets

The tiers' rotation, trellis and codebooks are the engine's, so that nothing is exact but floats;
what a plan gives is where bits matter. A plan spends them so that one more bit would gain as much
everywhere: with errors falling as 4^-bits, side i of n_i channels and b_i planned bits loses

    n_i 4^(b_i - b)     at b bits, in one common unit,

and the order takes the step of the least loss per byte first. A ladder (`turboq.plan.ladder`) says
what each side's steps lose: between its tiers log loss is linear in bits, beyond them as above.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from turboq.codecs.tcq import TCQ
from turboq.codecs.turboquant_mse import TurboQuantMSE
from turboq.errors import TurboqError
from turboq.export import choose
from turboq.export.base import (
    SIDES,
    Entry,
    Exporter,
    Formats,
    Held,
    Hold,
    Options,
    Projection,
    Side,
    Tensors,
    entries,
    first_dims,
    json_file,
    sides_of,
)
from turboq.export.llama_cpp import ggml_formats, ggml_hold
from turboq.numbers import lower_hull
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints
from turboq.plan.ladder import Ladder

BLOCK = 128  # channels, to whole numbers of which heads are padded
TIERS = {"t8": 130, "t4": 66, "t3": 52, "t2": 36, "t1": 20}  # bytes of a block
LADDER = ("f16", *TIERS)
FLOATS = ("f16", "bf16")
WINDOW = 8192  # VBR_SCHEDULE_CTX: rows that a band must cover to hold for a whole layer
BUDGETS = (6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0)  # bits per value of the policy's rungs

Unit = tuple[int, Side]
Losses = Callable[[np.ndarray], np.ndarray]  # bits per channel [side, tier] -> losses


def tier_hold(tier: str) -> Hold:
    """A head in a tier."""

    def hold(entry: Entry) -> Held | None:
        bits = -(-entry.dim // BLOCK) * TIERS[tier] * 8
        return Held(format=tier, bits=bits, codes=int(tier[1]) * entry.dim)

    return hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the order: store `unit` in `tier` from now on, so many bytes a token less."""

    unit: Unit
    tier: str
    saves: int
    loss: float  # in the module's unit, or a ladder's

    def __str__(self) -> str:
        return f"{self.unit[0]}{self.unit[1]}:{self.tier}"


def implied(heads: Sequence[Sequence[Entry]]) -> Losses:
    """What a plan says of the loss of every side, in the module's unit."""
    channels = np.array([[sum(e.dim for e in side)] for side in heads])
    planned = np.array([[sum(e.codec.bits_per_vector for e in side)] for side in heads])
    return lambda bits: channels * 4.0 ** (planned / channels - bits)


def predicted(ladder: Ladder) -> Losses:
    """What a ladder says of it, in nats per token.

    Only steps have losses: a side's first tier gets what the law of 4^-b makes of its first step,
    or where it has none of the ladder's last, which no other step was worth.

    Raises:
      TurboqError: the ladder has one rung, or a step that gains.
    """
    steps = np.diff(ladder.loss)
    if not len(steps) or np.any(steps <= 0):
        raise TurboqError("its order needs a ladder of two rungs or more, each losing more")
    last = steps[-1] / (ladder.bits[-2] - ladder.bits[-1])  # nats per bit
    tiers, logs = [], []
    for i, side in enumerate(ladder.sides):
        layer = ladder.model.layers[side.layer]
        n = layer.kv_heads * (layer.k_dim if side.side == "k" else layer.v_dim)
        bits = np.array([ladder.bits_of(i, t) / n for t in range(len(side.tiers))])
        falls = steps[np.array(ladder.order) == i]
        first = falls[0] / (4 ** (bits[0] - bits[1]) - 1) if len(falls) else n * last / np.log(4)
        tiers.append(bits[::-1])
        logs.append(np.log(first + np.cumsum([0.0, *falls]))[::-1] / np.log(4))

    def at(bits: np.ndarray) -> np.ndarray:
        found = [
            np.interp(b, x, y) - np.maximum(b - x[-1], 0) + np.maximum(x[0] - b, 0)
            for b, x, y in zip(bits, tiers, logs, strict=True)
        ]
        return 4.0 ** np.array(found)

    return at


def degrade_order(found: Sequence[Entry], ladder: Ladder | None = None) -> list[Step]:
    """All steps of all sides, by loss per byte; those of one side in the ladder's order.

    A tier that is no smaller than the one above it (of padded heads) is no step.
    """
    of = units(found)
    sizes = np.array([[size(heads, tier) for tier in LADDER] for heads in of.values()])
    channels = np.array([[sum(e.dim for e in heads)] for heads in of.values()])
    law = implied(list(of.values())) if ladder is None else predicted(ladder)
    losses = law(8 * sizes / channels)
    losses[:, 1:][sizes[:, 1:] >= np.minimum.accumulate(sizes, axis=1)[:, :-1]] = np.inf
    hull = lower_hull.segments(losses, sizes, lower_hull.smallest(losses, sizes))
    # Where a segment begins: the column that the one below it reaches, or the smallest.
    below = {(r, s + 1): c for r, s, c in zip(hull.row, hull.step, hull.column, strict=True)}
    below |= {(r, 0): c for r, c in enumerate(lower_hull.smallest(losses, sizes))}
    out = []
    for i in hull.downwards():
        unit = list(of)[hull.row[i]]
        tier = LADDER[below[hull.row[i], hull.step[i]]]
        out.append(Step(unit=unit, tier=tier, saves=int(hull.more[i]), loss=float(hull.less[i])))
    return out


def units(found: Iterable[Entry]) -> dict[Unit, list[Entry]]:
    """Heads of every layer and side."""
    out: dict[Unit, list[Entry]] = {}
    for entry in found:
        out.setdefault((entry.place[0], entry.side), []).append(entry)
    return out


def size(heads: Sequence[Entry], tier: str) -> int:
    """Bytes of a token's heads in a rung of the ladder."""
    if tier == "f16":
        return 2 * sum(e.dim for e in heads)
    return sum(-(-e.dim // BLOCK) * TIERS[tier] for e in heads)


def schedule(tiers: Mapping[Unit, str]) -> str:
    """Bands of equal neighbours, one a line."""
    lines = []
    for side in SIDES:
        layers = sorted(index for index, s in tiers if s == side)
        for tier, run in itertools.groupby(layers, lambda i, side=side: tiers[i, side]):
            run = list(run)
            lines.append(f"band=0-{WINDOW}:{tier}:{side}:l{run[0]}-{run[-1]}")
    return ";\n".join(lines) + ";\n"


def rungs(found: Sequence[Entry], steps: Sequence[Step]) -> dict[float, dict[Unit, str]]:
    """Tiers along the order: bits per value -> the first state within each of `BUDGETS`."""
    of = units(found)
    tiers = dict.fromkeys(of, "f16")
    channels = sum(e.dim for e in found)
    bytes_now, out, left = sum(size(h, "f16") for h in of.values()), {}, list(BUDGETS)
    for step in steps:
        tiers[step.unit] = step.tier
        bytes_now -= step.saves
        bits = 8 * bytes_now / channels
        if left and bits <= left[0]:
            out[round(bits, 4)] = dict(tiers)
            left = [b for b in left if b < bits]
    return out


class Buun(Exporter):
    """VBR_LAYER_SCHEDULE, VBR_DEGRADE_ORDER and --vbr-policy."""

    name = "buun-llama.cpp"
    title = "llama.cpp fork with variable-bit-rate caches (spiritbuun/buun-llama-cpp)"
    versions = "VBR of August 2026 (CUDA and ROCm)"
    checked = "its manual and the parser of its schedules, 2026-11-28, commit not recorded"
    uses = ("ladder",)

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        """Floats exactly; for each tier our codec that is most like it."""
        k, v = first_dims(model).values()
        near: Formats = {}
        for tier in TIERS:
            bits = int(tier[1])
            pair = [
                TCQ(dim=d, bits=bits, states=256) if bits < 4 else TurboQuantMSE(dim=d, bits=bits)
                for d in (k, v)
            ]
            near[tier] = (pair[0], pair[1])
        return ggml_formats(model, FLOATS, False) | near

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Any tier for the keys of a layer, and for its values."""
        allowed = sides_of(self.formats(model, options or Options()))
        return (Constraints(granularity="per_kv", **allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        found = entries(plan, arrays)
        holds: dict[str, Hold] = {name: ggml_hold(name, False) for name in FLOATS}
        holds |= {tier: tier_hold(tier) for tier in TIERS}
        tiers, held = {}, {}
        for unit, heads in units(found).items():
            total = choose.costs(heads, holds, unit[1])[:, 0]
            chosen = choose.pick(total, choose.planned_bits(heads), options.prefer)
            tiers[unit] = list(holds)[chosen]
            held |= choose.held_by(heads, lambda _, name=tiers[unit]: holds[name])
        steps = degrade_order(found, options.ladder)
        files = {
            "schedule.txt": schedule(tiers),
            "degrade_order.txt": "".join(f"{step}\n" for step in steps),
        }
        ladder = []
        for bits, state in rungs(found, steps).items():
            file = f"schedule_{bits:g}.txt"
            files[file] = schedule(state)
            ladder.append({"name": f"turboq {bits:g}", "bpv": bits, "schedule_file": file})
        policy = json_file({"static_ladder": sorted(ladder, key=lambda rung: rung["bpv"])})
        run = "llama-server -m MODEL.gguf"
        rates = {choose.planned_bits(heads) for heads in units(found).values()}
        alike = "All sides have equal bits in this plan, so its order is no more than by number."
        source = "plan implies" if options.ladder is None else "ladder predicts"
        fixed = "VBR_LAYER_SCHEDULE=@schedule.txt VBR_LAYER_STRICT=1"
        return Projection(
            held=held,
            files={name: text.encode() for name, text in files.items()} | {"policy.json": policy},
            flags=(
                f"{fixed} {run} -ctk turbo3_tcq -ctv turbo3_tcq -fa on",
                f"VBR_DEGRADE_ORDER=degrade_order.txt {run} -ct vbr",
                f"{run} -ct vbr --vbr-budget BITS --vbr-policy policy.json",
            ),
            notes=(
                "One of the lines, here: fixed tiers; tiers that fall as memory fills; the"
                " schedule nearest below BITS per value.",
                "Calibration has no effect here but on which layer and side gets how many bits.",
                f"The order is by loss per byte that the {source}, not measured in the engine;"
                " policy.json states no KL for its schedules, because nobody has measured it.",
                f"Heads are padded to {BLOCK} channels.",
                *([alike] if options.ladder is None and len(rates) == 1 else []),
            ),
        )
