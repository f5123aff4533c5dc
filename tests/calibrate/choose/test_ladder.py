"""Ladders within two budgets: against all choices of small problems, and through the command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq.numbers import lower_hull
from turboq.plan import load
from turboq.plan.ladder import load_ladder
from turboq_calibrate.choose.budget import Budget, middle
from turboq_calibrate.choose.ladder import descent, first_rung, side_tiers
from turboq_calibrate.choose.within import NoPlan
from turboq_calibrate.cli import main as cli

MODEL = Path(__file__).parents[2] / "golden" / "llama3"


def problems():
    rng = np.random.default_rng(7)
    for _ in range(40):
        sizes = np.sort(rng.integers(1, 40, (4, 4)), axis=1)
        costs = -np.sort(-rng.random((4, 4)), axis=1)
        yield costs, sizes


def test_every_rung_is_the_best_choice_of_its_size():
    """Greedy states are optimal for their own bits: against all 256 choices."""
    for costs, sizes in problems():
        every = np.array(list(itertools.product(range(4), repeat=4)))
        rows = np.arange(4)
        total, cost = sizes[rows, every].sum(axis=1), costs[rows, every].sum(axis=1)
        low, high = int(total.min()), int(total.max())
        rungs, loss = descent(costs, sizes, low, high, "x")
        assert cost[total <= high].min() == pytest.approx(loss[0])
        slopes = []
        for chosen, (a, b) in zip(rungs[1:], itertools.pairwise(loss), strict=True):
            assert b > a
            size = sizes[rows, chosen].sum()
            assert cost[total <= size].min() == pytest.approx(b, abs=1e-12)
        for above, below in itertools.pairwise(rungs):
            (row,) = np.flatnonzero(above != below)  # one side falls
            saved = sizes[row, above[row]] - sizes[row, below[row]]
            slopes.append((costs[row, below[row]] - costs[row, above[row]]) / saved)
        assert slopes == sorted(slopes)  # loss per bit, the least first
        assert sizes[rows, rungs[-1]].sum() == low


def test_rungs_between_two_budgets():
    costs, sizes = next(problems())
    rows = np.arange(4)
    rungs, _ = descent(costs, sizes, 0 + int(sizes.min(axis=1).sum()), 10**6, "x")
    bits = [int(sizes[rows, c].sum()) for c in rungs]
    low, high = bits[-2] + 1, bits[1]
    some, _ = descent(costs, sizes, low, high, "x")
    assert [int(sizes[rows, c].sum()) for c in some] == bits[1:-1]
    with pytest.raises(NoPlan, match=r"budget 1B to 2B: the smallest plan .* 1B allows"):
        descent(costs, sizes, bits[-1] - 1, high, "1B to 2B")


def test_both_orders_are_one_walk():
    """Upwards and downwards visit the same segments, each row's own in order."""
    for costs, sizes in problems():
        found = lower_hull.segments(costs, sizes, lower_hull.smallest(costs, sizes))
        up, down = found.upwards(), found.downwards()
        assert sorted(up) == sorted(down) == list(range(len(up)))
        np.testing.assert_array_equal(found.gain[up], found.gain[down][::-1])
        for row in range(4):
            steps = found.step[up][found.row[up] == row]
            np.testing.assert_array_equal(steps, np.arange(len(steps)))
            np.testing.assert_array_equal(found.step[down][found.row[down] == row], steps[::-1])


def test_heads_of_a_tier_share_its_bits():
    costs, sizes = np.array([[9.0, 4.0, 1.0], [3.0, 2.9, 2.8]]), np.array([[1, 2, 3]] * 2)
    one = side_tiers(costs, sizes, "per_kv")
    np.testing.assert_array_equal(one.heads, [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_allclose(one.costs, [12, 6.9, 3.8])
    two = side_tiers(costs, sizes, "per_head")
    np.testing.assert_array_equal(two.heads, [[0, 0], [2, 0], [2, 2]])
    np.testing.assert_allclose(two.costs, [12, 4, 3.8])
    np.testing.assert_array_equal(two.sizes, one.sizes)


def test_ranges_of_budgets():
    found = Budget.parse_range("1.75..4bpc")
    assert found is not None
    assert [b.text for b in found] == ["1.75bpc", "4bpc"]
    assert middle(*found).bpc == 2.875
    found = Budget.parse_range("2 .. 3KiB")
    assert found is not None
    assert [b.bits(1) for b in found] == [2 * 8192, 3 * 8192]
    assert middle(*found).nbytes == 2560
    assert Budget.parse_range("3bpc") is Budget.parse_range("8192@4GiB") is None
    for text in ("4..2bpc", "2..2bpc"):
        with pytest.raises(TurboqError, match="must be less than"):
            Budget.parse_range(text)


def test_the_first_rung_that_fits():
    for most in range(10, 100, 7):
        sizes = [100 - 10 * n for n in range(9)]
        due = next((n for n, x in enumerate(sizes) if x <= most), None)
        if due is None:
            with pytest.raises(NoPlan, match="name: the lowest rung of the ladder needs 20 B"):
                first_rung(9, sizes.__getitem__, most, "name")
        else:
            assert first_rung(9, sizes.__getitem__, most, "name") == due


def test_a_ladder_by_the_command(tmp_path, capsys):
    """Made, described, a rung taken and counted; the first rung within a memory is the one."""

    def turboq(*argv) -> str:
        assert cli.run([str(a) for a in argv]) == 0
        return capsys.readouterr().out

    run, ladder, rung = (tmp_path / name for name in ("run", "ladder", "rung"))
    sizes = ("--windows=2", "--window_length=24", "--reservoir=64", "--text=topics:calibration")
    turboq("calibrate", f"--model={MODEL}", *sizes, f"--out={run}")
    plan = ("plan", f"--statistics={run}", "--nocheck")
    said = turboq(
        *plan, "--candidates=turboquant_mse:1,2,3,4", "--budget=2.5..4bpc", f"--out={ladder}"
    )
    found, stored = load_ladder(ladder)
    assert f"{found.rungs} rungs of 4 sides" in said
    channels = 2 * 2 * 2 * 16
    assert found.bits[0] / channels <= 4
    assert found.bits[-1] / channels <= 2.5 < found.bits[-2] / channels
    assert list(found.loss) == sorted(found.loss)
    assert f"ladder of {found.rungs} plans" in turboq("inspect", ladder)
    turboq("plan", f"--ladder={ladder}", "--budget=3bpc", f"--out={rung}")
    n = next(n for n, bits in enumerate(found.bits) if bits <= 3 * channels)
    assert load(rung)[0].layers == found.rung(n, stored)[0].layers
    # A memory between what two rungs need at a context takes the lower one.
    needs = [found.rung(k, stored)[0].residency(1000).total for k in range(found.rungs)]
    gib = (needs[n] + needs[n - 1]) / 2 / 2**30
    flags = ("--context=1000", "--format=json")
    told = json.loads(turboq("memory", f"--plan={ladder}", f"--memory_gib={gib}", *flags))
    assert told["codec"] == f"rung {n} of 0..{found.rungs - 1}"
    assert told["total_bytes"] == needs[n]
    bytes_ = (needs[n] + needs[n - 1]) // 2
    turboq("plan", f"--ladder={ladder}", f"--budget=1000@{bytes_}B", f"--out={rung}")
    assert load(rung)[0].layers == found.rung(n, stored)[0].layers

    def refused(*argv) -> str:
        assert cli.run([str(a) for a in argv]) == 1
        return capsys.readouterr().err

    out = f"--out={tmp_path / 'no'}"
    few = ("memory", f"--plan={ladder}", "--memory_gib=0.0000001", "--context=1000")
    assert f"lowest rung of the ladder needs {needs[-1]:,} B" in refused(*few)
    assert "lowest rung" in refused("plan", f"--ladder={ladder}", "--budget=1bpc", out)
    assert "is a ladder of plans" in refused("evaluate", f"--plan={ladder}", out)
    assert "the ladder decides" in refused(*plan, f"--ladder={ladder}", "--budget=3bpc", out)
    assert "--rounds: is for one plan" in refused(*plan, "--budget=2..3bpc", "--rounds=1", out)
    wrong = refused(*plan, "--budget=2..3bpc", "--granularity=uniform", out)
    assert "lowers K or V of one layer at a time" in wrong
    assert "needs --budget" in refused("plan", f"--ladder={ladder}", out)
    assert not (tmp_path / "no").exists()
