"""Schedules and degrade orders of buun's VBR: its grammar, and a greedy walk written anew."""

import dataclasses
import itertools
import json
import re

import pytest
from plan_cases import geometry

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, export
from turboq.export.base import entries
from turboq.export.buun import degrade_order
from turboq.export.report import make_report
from turboq.plan import head_plan, uniform_plan
from turboq.plan.ladder import Ladder, LadderSide, Tier, save_ladder

BYTES = {"f16": 256, "t8": 130, "t4": 66, "t3": 52, "t2": 36, "t1": 20}  # of 128 channels
LADDER = list(BYTES)
LAYERS, HEADS, DIM = 5, 2, 64
BITS = {"k": (4, 2, 3, 5, 2), "v": (3, 3, 2, 3, 4)}
BUUN = ENGINES["buun-llama.cpp"]


def planned(dim=DIM):
    """Heads of a side differ; the last values are exact."""

    def choose(layer, side, head):
        if (layer, side) == (LAYERS - 1, "v"):
            return Exact(dim=dim, dtype="float16")
        return TurboQuantMSE(dim=dim, bits=BITS[side][layer] + head)

    return head_plan(geometry(layers=LAYERS, kv_heads=HEADS, k_dim=dim, v_dim=dim), choose)


def tiers_of(text: str) -> dict[tuple[int, str], str]:
    """What the engine makes of a schedule: bands apart at semicolons, trimmed, fields at colons."""
    out = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        rows, tier, side, layers = item.removeprefix("band=").split(":")
        first, last = map(int, re.fullmatch(r"l(\d+)-(\d+)", layers).groups())  # pyright: ignore
        assert item.startswith("band=")
        assert rows == "0-8192"  # else the band is not of the whole layer, and ignored
        for layer in range(first, last + 1):
            assert (layer, side) not in out
            out[layer, side] = tier
    return out


def walked(dim=DIM) -> list[str]:
    """The order again: always the step that loses least per byte, of what each side does next."""
    plan = planned(dim)
    planned_bits = {
        (layer, side): sum(c.bits_per_channel for c in plan.codecs(layer, side)) / HEADS
        for layer in range(LAYERS)
        for side in "kv"
    }
    at, out = dict.fromkeys(planned_bits, 0), []
    padded = -(-dim // 128)

    def step(unit):
        a, b = (HEADS * padded * BYTES[LADDER[at[unit] + n]] for n in (0, 1))
        if LADDER[at[unit]] == "f16":
            a = HEADS * dim * 2
        bits = [8 * x / (HEADS * dim) for x in (a, b)]
        loss = [HEADS * dim * 4.0 ** (planned_bits[unit] - x) for x in bits]
        return (loss[1] - loss[0]) / (a - b)

    while left := [unit for unit in at if at[unit] < 5]:
        unit = min(left, key=step)
        at[unit] += 1
        out.append(f"{unit[0]}{unit[1]}:{LADDER[at[unit]]}")
    return out


@pytest.mark.parametrize("dim", [128, 192])  # padded to 256
def test_the_order_loses_least_per_byte_first(dim):
    files = BUUN.project(planned(dim), {}, Options()).files
    lines = files["degrade_order.txt"].decode().splitlines()
    assert all(re.fullmatch(r"\d+[kv]:t[84321]", line) for line in lines)
    assert len(lines) == LAYERS * 2 * 5
    assert lines == walked(dim)
    # Exact values are what the plan wants to keep: everything else falls to the bottom first.
    assert [line[:2] for line in lines[-4:]] == ["4v"] * 4


def test_the_schedule_is_what_the_report_says():
    plan = planned(128)
    found = BUUN.project(plan, {}, Options())
    tiers = tiers_of(found.files["schedule.txt"].decode())
    assert tiers == {(layer, side): h.format for (layer, side, _), h in found.held.items()} | {
        (4, "v"): "f16"
    }
    assert [tiers[layer, "k"] for layer in range(LAYERS)] == ["t8", "t3", "t4", "t8", "t3"]
    report = make_report(plan, {}, BUUN, found, list(found.files))
    exact = 2 * HEADS * 128
    assert report.engine_bytes_per_token == exact + HEADS * sum(
        BYTES[tier] for tier in tiers.values() if tier != "f16"
    )
    assert report.counts == {"exact": HEADS, "approximated": 18, "unsupported": 0}


def test_rungs_of_the_policy_are_states_of_the_order():
    files = BUUN.project(planned(128), {}, Options()).files
    ladder = json.loads(files["policy.json"])["static_ladder"]
    assert [rung["bpv"] for rung in ladder] == sorted(rung["bpv"] for rung in ladder)
    order = files["degrade_order.txt"].decode().splitlines()
    states, now = [], {(layer, side): "f16" for layer in range(LAYERS) for side in "kv"}
    for line in order:
        now[int(line[0]), line[1]] = line[3:]
        states.append(dict(now))
    budgets = (6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0)
    for rung in ladder:
        tiers = tiers_of(files[rung["schedule_file"]].decode())
        assert tiers in states
        assert "full_kld" not in rung  # nobody has measured it
        bits = sum(BYTES[t] for t in tiers.values()) * 8 / 128 / len(tiers)
        assert rung["bpv"] == pytest.approx(bits, abs=1e-4)
        # The first state within a budget: one step before, it was above.
        before = states[states.index(tiers) - 1]
        above = sum(BYTES[t] for t in before.values()) * 8 / 128 / len(tiers)
        assert any(bits <= budget < above for budget in budgets)


WEIGHTS = {(0, "k"): 3.0, (0, "v"): 0.2, (1, "k"): 1.0, (1, "v"): 0.05}


def ladder_of(lowest=(2, 2, 2, 2)):
    """Sides lose WEIGHTS * channels * 4^-bits exactly; the least loss per bit falls first."""
    model = geometry(layers=2, kv_heads=HEADS, k_dim=128, v_dim=128)
    tiers = {unit: list(range(5, low - 1, -1)) for unit, low in zip(WEIGHTS, lowest, strict=True)}

    def plan(at):
        def codec(i, s, head):
            return TurboQuantMSE(dim=128, bits=tiers[i, s][: at + 1][-1])

        return head_plan(model, codec)

    sides = tuple(
        LadderSide(
            layer=i, side=s,
            tiers=tuple(Tier(store=plan(t).layers[i].side(s), arrays={}) for t in range(len(own))),
        )
        for (i, s), own in tiers.items()
    )  # fmt: skip
    scale = 16 / 128  # of every vector

    def loss(unit, t):
        return WEIGHTS[unit] * HEADS * 128 * 4.0 ** -(tiers[unit][t] + scale)

    at, order, total = dict.fromkeys(WEIGHTS, 0), [], [sum(loss(u, 0) for u in WEIGHTS)]
    while left := [u for u in at if at[u] < len(tiers[u]) - 1]:
        unit = min(left, key=lambda u: loss(u, at[u] + 1) - loss(u, at[u]))
        total.append(total[-1] + loss(unit, at[unit] + 1) - loss(unit, at[unit]))
        at[unit] += 1
        order.append(list(WEIGHTS).index(unit))
    return Ladder(
        model=model, tokens=TokenPolicy(), sides=sides, order=tuple(order), loss=tuple(total)
    )


def test_a_ladder_orders_steps_by_the_losses_it_predicts(tmp_path):
    """One law holds between its tiers and beyond them, so the order is a walk along that law."""
    ladder = ladder_of()
    save_ladder(ladder, {}, tmp_path / "ladder")
    plan, arrays = ladder.rung(0, {})
    report = export(plan, arrays, BUUN, tmp_path / "out", Options(ladder=ladder))
    lines = (tmp_path / "out" / "degrade_order.txt").read_text().splitlines()
    steps = []
    for (layer, side), weight in WEIGHTS.items():
        for a, b in itertools.pairwise(LADDER):
            loss = weight * (4.0 ** (-BYTES[b] / 16) - 4.0 ** (-BYTES[a] / 16))
            steps.append((loss / (BYTES[a] - BYTES[b]), f"{layer}{side}:{b}"))
    assert lines == [line for _, line in sorted(steps)]
    assert any("that the ladder predicts" in note for note in report.notes)
    with pytest.raises(TurboqError, match="stores one plan: take a rung"):
        export(plan, arrays, ENGINES["llama.cpp"], tmp_path / "no", Options(ladder=ladder))


def test_a_side_that_never_falls_is_worth_the_last_step():
    ladder = ladder_of(lowest=(5, 2, 2, 2))
    lines = [str(x) for x in degrade_order(entries(ladder.rung(0, {})[0], {}), ladder)]
    whole = [str(x) for x in degrade_order(entries(ladder.rung(0, {})[0], {}), ladder_of())]
    others = [line for line in lines if not line.startswith("0k")]
    assert others == [line for line in whole if not line.startswith("0k")]
    # At the same bits it is above everything that fell to 2 bits.
    assert lines.index("0k:t2") > max(lines.index(f"{u}:t3") for u in ("0v", "1k", "1v"))
    flat = dataclasses.replace(ladder, loss=(1.0,) * ladder.rungs)
    with pytest.raises(TurboqError, match="each losing more"):
        degrade_order(entries(flat.rung(0, {})[0], {}), flat)


def test_a_plan_of_equal_bits_says_that_it_orders_nothing():
    model = geometry(layers=2, kv_heads=1, k_dim=128, v_dim=128)
    codec = TurboQuantMSE(dim=128, bits=3)
    notes = BUUN.project(uniform_plan(model, k=codec, v=codec), {}, Options()).notes
    assert any("equal bits" in note for note in notes)
    assert not any("equal bits" in note for note in BUUN.project(planned(), {}, Options()).notes)
