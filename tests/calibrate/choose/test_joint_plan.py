"""Plans that store heads together: by default where candidates are learned, as told, or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import model_cache
from turboq.errors import TurboqError
from turboq.export import ENGINES
from turboq.export.write import export
from turboq.plan import load, summary
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.ladder import ladder_within
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.cli import main as cli
from turboq_calibrate.fit.plan import fit_plan
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import load_statistics

MODEL = Path(__file__).parents[2] / "golden" / "llama3"  # 2 KV heads of 16 channels


def turboq(command, *argv) -> int:
    return cli.run([command, *(str(a) for a in argv)])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Statistics with 4 tokens to a coordinate of two heads together, and a plan from them."""
    folder, rng = tmp_path_factory.mktemp("joint"), np.random.default_rng(4)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(2000)]
    (folder / "a.txt").write_text(" ".join(words))
    flags = (f"--text={folder / 'a.txt'}", "--windows=8", "--window_length=48", "--check_length=64")
    budget = ("--budget=3bpc", "--force", f"--out={folder / 'run'}")
    assert turboq("plan", f"--model={MODEL}", *budget, *flags) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def within(run, **wanted):
    statistics, geometry = load_statistics(run), model_geometry(load_model(MODEL, resident=False))
    wanted = Wanted(budget=Budget.parse("3bpc"), **wanted)
    return plan_within(statistics, geometry, wanted, progress=False)


def recipe(plan):
    assert plan.provenance is not None
    assert plan.provenance.recipe is not None
    return plan.provenance.recipe["allocation"]


def test_the_command_joins_and_says_so(run, model):
    plan, _ = load(run)
    if recipe(plan)["kept"] == "chosen":
        assert [layer.joint for layer in plan.layers] == [2] * len(plan.layers)
    found = within(run)
    assert [layer.joint for layer in found.plan.layers] == [2] * len(plan.layers)
    assert recipe(found.plan)["joint"] == 2
    assert "are one vector" in summary(found.plan)
    # The greatest part is the first head's keys': it has the most bits.
    for layer in found.plan.layers:
        bits = [c.bits_per_vector for c in found.plan.codecs(layer.index, "k")]
        assert bits == sorted(bits, reverse=True)


def test_it_is_evaluated_as_it_is_stored(run, model):
    """The packed cache gives the KL of the simulated one, and so does a kernel that reads it;
    neither is that of a plan without."""
    found, alone = within(run), within(run, joint=0)
    assert alone.plan.layers[0].joint is None
    assert recipe(alone.plan)["joint"] is None
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, model.spec.vocab, (2, 40)).astype(np.int32)
    rows = [("joined", found.plan, found.arrays), ("alone", alone.plan, alone.arrays)]
    first, second = (
        {r["name"]: r["kl_mean"] for r in evaluate(
            model, rows, tokens, text="noise", attention=how, progress=False).rows}
        for how in ("simulated", "packed")
    )  # fmt: skip
    for name, kl in first.items():
        np.testing.assert_allclose(second[name], kl, rtol=TOL["kl_model_rel"])
    assert first["joined"] != first["alone"]
    (row,) = evaluate(
        model, rows[:1], tokens, text="noise", attention="triton", progress=False
    ).rows
    assert row["kl_mean"] != second["joined"]
    assert row["kl_mean"] == pytest.approx(first["joined"], rel=TOL["kl_bfloat16_rel"])
    assert model_cache.forms(found.plan.kv_layers(found.arrays)) is not None


@pytest.mark.parametrize(("heads", "form"), [(1, "before"), (2, "block:16")])
def test_rounds_measure_units(run, model, heads, form):
    statistics, geometry = load_statistics(run), model_geometry(model)
    wanted = Wanted(
        budget=Budget.parse("3bpc"), candidates=("window:2,3,4",), joint=heads, k_rope=form,
        rounds=1,
    )  # fmt: skip
    found = plan_within(
        statistics, geometry, wanted, model=model, force=True, progress=False, log=lambda _: None
    )
    assert "refined" in recipe(found.plan)["check"]["kl"]


@pytest.mark.parametrize(
    ("wanted", "joins"),
    [
        ({"candidates": ("turboquant_mse:2,3,4",)}, None),
        ({"k_rope": "after"}, None),
        ({"k_rope": "block:256"}, 2),
        ({"granularity": "per_layer"}, 2),
        ({"candidates": ("transform:2,3,4",)}, 2),
        ({"candidates": ("per_head:2,3,4",), "joint": 1}, 1),
    ],
)
def test_who_joins(run, wanted, joins):
    statistics, geometry = load_statistics(run), model_geometry(load_model(MODEL, resident=False))
    wanted = Wanted(budget=Budget.parse("3bpc"), **wanted)
    assert menu(statistics, geometry, wanted, progress=False).table.joint_heads == joins


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--budget=3bpc", "--joint=3"], "--joint=3 does not divide the 2 KV heads of layer 0"),
        (["--budget=3bpc", "--joint=two"], "--joint=two: must be a number of KV heads, or none"),
        (["--budget=3bpc", "--joint=0"], "--joint=0: must be a number of KV heads, or none"),
        (["--budget=3bpc", "--joint=2", "--k_rope=after"], "keys are joined before RoPE"),
        (["--budget=3bpc", "--joint=2", "--engine=vllm"], "--engine=vllm decides that"),
        (["--budget=2..4bpc", "--joint=2"], "--joint"),
        (["--joint=2", "--bits=3"], "--joint: needs --budget"),
    ],
)
def test_bad_flags_are_one_line(run, flags, says, tmp_path, capsys):
    out = tmp_path / "new"
    assert turboq("plan", f"--model={MODEL}", *flags, f"--statistics={run}", f"--out={out}") == 1
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_ladder_joins_nothing(run):
    """Its rungs say nothing of units, so a menu of units is refused."""
    statistics, geometry = load_statistics(run), model_geometry(load_model(MODEL, resident=False))
    wanted = Wanted(budget=Budget.parse("3bpc"), candidates=("window:2,3,4",))
    low, high = Budget.parse("2bpc"), Budget.parse("4bpc")
    ready = menu(statistics, geometry, wanted, progress=False)
    with pytest.raises(ValueError, match="2 joined heads: a ladder lowers K or V alone"):
        ladder_within(statistics, geometry, wanted, low, high, prepared=ready)
    with pytest.raises(ValueError, match="1 joined heads: a ladder"):
        ladder_within(statistics, geometry, dataclasses.replace(wanted, joint=1), low, high)


def test_none_on_the_command_line(run, tmp_path):
    flags = ("--budget=3bpc", "--joint=none", "--nocheck", f"--statistics={run}")
    assert turboq("plan", *flags, f"--out={tmp_path}") == 0
    assert {layer.joint for layer in load(tmp_path)[0].layers} == {None}


def test_who_cannot_read_it_says_so(run, tmp_path):
    found = within(run)
    for name in ("vllm", "llama.cpp", "mlx-lm"):
        with pytest.raises(TurboqError, match=f"{name} reads each head by itself.*--joint=none"):
            export(found.plan, found.arrays, ENGINES[name], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TurboqError, match=r"layer 0 joins 2 heads.*--budget"):
        fit_plan(found.plan, load_statistics(run))
    with pytest.raises(ValueError, match="joint=-1 must be"):
        Wanted(budget=Budget.parse("3bpc"), joint=-1)
