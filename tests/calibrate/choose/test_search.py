"""`turboq plan --budget`: from a model to a plan within its budget, for people and for engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from allocate_cases import units
from plan_cases import geometry

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options
from turboq.plan import load
from turboq.plan.violations import violations, violations_of
from turboq_calibrate.candidates.makers import default_makers, engine_menu, makers_of
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.solver.problem import Infeasible, Problem
from turboq_calibrate.choose.solver.solve import allocate
from turboq_calibrate.cli import main as cli
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

MODEL = Path(__file__).parents[2] / "golden" / "llama3"
SMALL = ("--windows=2", "--window_length=24", "--rounds=0")


def turboq(*argv) -> int:
    return cli.run(["plan", f"--model={MODEL}", *(str(a) for a in argv)])


@pytest.fixture(scope="module")
def layout():
    return model_geometry(load_model(MODEL, resident=False))


def test_a_learned_plan_within_a_budget(tmp_path, capsys):
    flags = ("--candidates=transform:2,3,4", "--rounds=1")
    assert turboq("--budget=3bpc", *SMALL[:2], *flags, f"--out={tmp_path}") == 0
    text = capsys.readouterr().out
    plan, _ = load(tmp_path)
    assert plan.bytes.bits_per_channel <= 3
    assert f"{plan.bytes_per_token:g} B per token, " in text
    assert {layer.k.codec.name for layer in plan.layers} == {"transform"}
    assert plan.provenance is not None
    assert plan.provenance.tokens == 24  # the other window only checks
    kept = plan.provenance.recipe["allocation"]
    assert kept["budget"] == "3bpc"
    assert kept["used"] == plan.bytes.bits_per_token
    assert set(kept["checked"]) == {"solved", "refined", "uniform"}
    assert kept["checked"][kept["kept"]] == min(kept["checked"].values())
    assert len(kept["refinement"]) >= 1
    assert plan.quality is not None
    assert plan.quality.predicted is not None
    assert plan.quality.predicted.kl_mean == kept["predicted"]
    assert plan.quality.measured[0].kl_mean == kept["checked"][kept["kept"]]


def test_memory_at_a_context_and_named_candidates(tmp_path):
    flags = ("--candidates=turboquant_mse:2,3,4", "--candidates=exact", "--granularity=per_kv")
    assert turboq("--budget=700@150KiB", *flags, *SMALL, f"--out={tmp_path}") == 0
    plan, _ = load(tmp_path)
    at = plan.residency(700)
    assert at.total <= 150 * 1024
    assert plan.provenance is not None
    assert plan.provenance.recipe["allocation"]["used"] == at.total
    for layer in plan.layers:
        for side in ("k", "v"):
            assert len(set(plan.codecs(layer.index, side))) == 1


def test_a_plan_for_an_engine_obeys_its_rules(tmp_path, capsys, layout):
    assert turboq("--budget=12bpc", "--engine=modelopt", *SMALL, f"--out={tmp_path}") == 0
    assert "sinks=0 recent=0" in capsys.readouterr().out
    plan, _ = load(tmp_path)
    rules = ENGINES["modelopt"].constraints(layout, Options())
    assert any(not violations(one, plan) for one in rules)
    assert plan.tokens.sinks == 0


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_engine_gets_a_plan_that_its_rules_allow(name, rng):
    """Made-up costs on a model of 6 layers; `violations` judges, which knows nothing of solving."""
    layout = geometry(layers=6, kv_heads=2, k_dim=64, v_dim=64)
    formats = ENGINES[name].formats(layout, Options())
    pairs = {f: pair for f, pair in formats.items() if all(c.block == 1 for c in pair)}
    if not pairs:
        with pytest.raises(TurboqError, match=f"engine {name}: no candidates"):
            engine_menu(name, layout, TokenPolicy())
        return
    menu = engine_menu(name, layout, TokenPolicy())
    assert [maker.label for maker in menu.makers] == list(pairs)
    assert set(menu.left_out) == set(formats) - set(pairs)
    places = units(6, 2)
    codecs = tuple(tuple(pair[u.side == "v"] for pair in pairs.values()) for u in places)
    sizes = np.array([[codec.bits_per_vector for codec in row] for row in codecs])
    costs = rng.random((len(places), 1)) * 4.0 ** -(sizes / 64)
    of = Problem(units=places, labels=tuple(pairs), codecs=codecs, costs=costs, sizes=sizes)
    for share in (0.4, 1.0):  # of the way from the smallest to the largest
        low, high = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
        try:
            found = allocate(of, int(low + share * (high - low)), menu.constraints)
        except Infeasible as error:  # forced exact layers may need more: then they are given it
            found = allocate(of, error.smallest or 0, menu.constraints)
        placed = {
            (u.layer, u.side, u.head): row[c]
            for u, row, c in zip(places, codecs, found.chosen, strict=True)
        }
        assert any(not violations_of(rules, placed) for rules in menu.constraints)
        assert found.gap <= 1e-4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--budget=1.5bpc", "--candidates=turboquant_mse:4"], "smallest feasible budget is"),
        (["--budget=3"], "none of 4680B"),
        (["--budget=3bpc", "--bits=3"], "--bits: --budget chooses codecs"),
        (["--granularity=per_kv", "--bits=3"], "--granularity: needs --budget"),
        (["--budget=3bpc", "--engine=vlm"], "did you mean vllm?"),
        (["--budget=3bpc", "--engine=vllm", "--granularity=per_kv"], "--engine=vllm decides"),
        (["--budget=3bpc", "--candidates=rabitq:3"], "known codecs are"),
        (["--budget=3bpc", "--candidates=turboquant_mse:9"], "bits"),
        (["--budget=3bpc", "--candidates=transform"], "transform:2,2.5"),
        (["--budget=3bpc", "--candidates=transform:two"], "'two' is no number"),
        (["--budget=3bpc", "--windows=1"], "--windows=1 must be more than"),
    ],
)
def test_bad_flags_are_one_line(flags, says, tmp_path, capsys):
    small = () if "--windows=1" in flags else SMALL[:1]
    extra = (*small, "--window_length=24", "--rounds=0") if "--budget" in flags[0] else ()
    assert turboq(*flags, *extra, f"--out={tmp_path}") == 1
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") - err.count("\r") <= 3  # progress lines apart
    assert not (tmp_path / "plan.json").exists()


def test_makers(layout):
    labels = [m.label for m in makers_of(["transform:2,2.5", "per_head:3", "exact"], layout)]
    assert labels == ["transform 2", "transform 2.5", "per_head 3", "exact"]
    assert [m.label for m in makers_of(["fp8:scale=token,none"], layout)] == [
        "fp8 token",
        "fp8 none",
    ]


def test_default_candidates_lie_around_the_budget(layout):
    for text in ("3.25bpc", "52B", "4096@210kB"):  # 3.25, 3.25 and 3.2 bits per channel
        labels = [m.label for m in default_makers(Budget.parse(text), layout)]
        assert labels[0] == "transform 1.25" if text != "4096@210kB" else "transform 1.125"
        assert len(labels) == 9
    high = [m.label for m in default_makers(Budget.parse("16bpc"), layout)]
    assert high[-1] == "transform 8"


def test_exact_tokens_are_chosen_with_their_bytes_counted(tmp_path, capsys):
    """More exact tokens leave fewer bits: what wins is the least KL, and the plan says which."""
    flags = ("--candidates=turboquant_mse:2,3,4", "--granularity=uniform")
    policies = "--policies=0:0,4:0,4:16"
    assert turboq("--budget=700@150KiB", policies, *flags, *SMALL, f"--out={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()[:3]
    kl = {line.split(":")[0]: float(line.split()[-1]) for line in lines}
    assert set(kl) == {"sinks 0, recent 0", "sinks 4, recent 0", "sinks 4, recent 16"}
    plan, _ = load(tmp_path)
    best = min(kl, key=lambda name: kl[name])
    assert best == f"sinks {plan.tokens.sinks}, recent {plan.tokens.recent}"
    assert plan.residency(700).total <= 150 * 1024


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget=3bpc", "--policies=4:0,4:32"), "has no context"),
        (("--budget=700@150KiB", "--policies=4"), "must be SINKS:RECENT"),
        (("--budget=700@150KiB", "--policies=4:0,4:0"), "name one twice"),
        (("--budget=700@150KiB", "--policies=4:0", "--sinks=2"), "--policies names"),
        (("--policies=4:0",), "needs --budget"),
    ],
)
def test_bad_policies_are_one_line(tmp_path, capsys, flags, message):
    assert turboq(*flags, "--candidates=turboquant_mse:2,3", *SMALL, f"--out={tmp_path}/p") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p" / "plan.json").exists()
