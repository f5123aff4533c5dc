"""`turboq plan --budget`: from a model or its statistics to a checked plan within its budget."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from turboq_calibrate.choose import check
from turboq_calibrate.choose import plan_within as within
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, menu, plan_within
from turboq_calibrate.choose.solver.problem import Infeasible, Problem
from turboq_calibrate.choose.solver.solve import allocate
from turboq_calibrate.cli import main as cli
from turboq_calibrate.measure.storage_columns import layer_loss
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.statistics_files import load_statistics
from turboq_calibrate.observe.texts import long_check

MODEL = Path(__file__).parents[2] / "golden" / "llama3"
OBSERVE = ("--windows=2", "--window_length=24", "--check_length=48", "--reservoir=64")
LEARNED = ("--budget=3bpc", "--candidates=transform:2,3,4")
DATA_FREE = "--candidates=turboquant_mse:2,3,4"


def turboq(command, *argv) -> int:
    return cli.run([command, *(str(a) for a in argv)])


def plan(*argv) -> int:
    return turboq("plan", f"--model={MODEL}", *argv)


def written(folder: Path) -> list[str]:
    """Hashes of a plan's two files."""
    names = ("plan.json", "plan.safetensors")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def allocation(folder: Path) -> dict:
    """What the plan says of how it was chosen."""
    found = load(folder)[0].provenance
    assert found is not None
    assert found.recipe is not None
    return found.recipe["allocation"]


@pytest.fixture(scope="module")
def layout():
    return model_geometry(load_model(MODEL, resident=False))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """Two files of random words."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(4)
    for name in ("a", "b"):
        words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(400)]
        (folder / f"{name}.txt").write_text(" ".join(words))
    return f"--text={folder / 'a.txt'}", f"--text={folder / 'b.txt'}"


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory) -> Path:
    """Calibrated and planned by one command."""
    out = tmp_path_factory.mktemp("plan") / "run"
    assert plan(*LEARNED, *texts, *OBSERVE, f"--out={out}") == 0
    return out


def made_up(monkeypatch, kl):
    """The check measures `kl(plan, tokens, text)`, by the plan's name, instead of evaluating."""
    asked = []

    def evaluate_texts(model, rows, texts, **how):
        asked.append([name for name, _, _ in rows])
        found = [
            {"name": name, "text": text, "kl_mean": kl(name, windows.shape[1], text)}
            for name, _, _ in rows
            for text, windows in texts.items()
        ]
        return type("Quality", (), {"rows": found})

    monkeypatch.setattr(check, "evaluate_texts", evaluate_texts)
    return asked


def test_a_learned_plan_within_a_budget(run, texts):
    found, _ = load(run)
    assert found.bytes.bits_per_channel <= 3
    assert found.provenance is not None
    assert found.provenance.tokens == 2 * 24
    names = [Path(text.removeprefix("--text=")).name for text in texts]
    assert [text.name for text in found.provenance.texts] == names
    report = allocation(run)
    assert report["budget"] == "3bpc"
    assert set(report["held_out"]) == {"0", "0.2", "0.4", "0.6"}
    assert f"{report['shrink']:g}" in report["held_out"]
    assert set(report["predicted_by_text"]) == set(names)
    # Every plan that was tried is measured on every text, two of them at the longer length.
    checked, kept = report["check"], report["kept"]
    assert checked["kept"] == kept
    assert set(checked["kl"]) == {"chosen", "per_head 2b", "turboquant_mse 2b"}
    short = {name: [at["24"] for at in of.values()] for name, of in checked["kl"].items()}
    assert all(len(each) == 2 for each in short.values())
    refused = {name for name, _, _ in checked["refused"]}
    able = {n: sum(e) for n, e in short.items() if n not in {*refused, "turboquant_mse 2b"}}
    assert kept == min(able, key=lambda name: able[name])
    long = {name for name, of in checked["kl"].items() for at in of.values() if "48" in at}
    assert long == {kept, "turboquant_mse 2b", *refused}
    assert found.quality is not None
    assert {m.text: m.kl_mean for m in found.quality.measured} == {
        f"{text} (held back, {n} tokens)": kl
        for text, at in checked["kl"][kept].items()
        for n, kl in at.items()
    }


def test_the_same_plan_from_the_folder(run, tmp_path):
    assert plan(*LEARNED, f"--statistics={run}", f"--out={tmp_path}") == 0
    assert written(tmp_path) == written(run)


def test_shards_give_the_same_choices(run, texts, tmp_path):
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(parts):
        flags = (f"--shard={i}/2", "--chunk_windows=1", f"--out={part}")
        assert turboq("calibrate", f"--model={MODEL}", *texts, *OBSERVE, *flags) == 0
    assert turboq("merge", *parts, f"--out={tmp_path}") == 0
    assert plan(*LEARNED, f"--statistics={tmp_path}", "--nocheck", f"--out={tmp_path}") == 0
    whole = tmp_path / "whole"
    assert plan(*LEARNED, f"--statistics={run}", "--nocheck", f"--out={whole}") == 0
    assert load(tmp_path)[0].layers == load(whole)[0].layers


def test_without_a_check_no_model_is_needed(run, tmp_path, monkeypatch, capsys, layout):
    """Another budget from the folder alone, for the geometry that the folder says."""

    def fails(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("turboq_calibrate.models.load_model", fails)
    flags = ("--budget=2.5bpc", "--candidates=transform:2,3", "--nocheck")
    assert turboq("plan", *flags, f"--statistics={run}", f"--out={tmp_path}") == 0
    assert "not checked (--nocheck)" in capsys.readouterr().out
    found, _ = load(tmp_path)
    assert found.model.fingerprint == layout.fingerprint
    assert 2 <= found.bytes.bits_per_channel <= 2.5
    report = allocation(tmp_path)
    assert report["kept"] == "chosen"
    assert report["used"] == found.bytes.bits_per_token
    assert report["check"] is None
    assert found.quality is not None
    assert found.quality.measured == ()
    assert found.quality.predicted is not None
    assert found.quality.predicted.kl_mean == pytest.approx(report["predicted"])
    each = report["predicted_by_text"].values()
    assert sum(each) / 2 == pytest.approx(report["predicted"])
    layers = report["predicted_by_layer"]
    assert [row["layer"] for row in layers] == [layer.index for layer in found.layers]
    assert sum(row["k"] + row["v"] for row in layers) == pytest.approx(report["predicted"])
    assert layer_loss(found) == {side: [row[side] for row in layers] for side in ("k", "v")}


def losing(name, tokens, text):
    """Whatever is learned is better where it was calibrated, and loses at 48 tokens."""
    return {24: 1.0, 48: 5.0}[tokens] if name != "turboquant_mse 2b" else 2.0


def test_a_plan_that_loses_at_the_check_length_is_refused(run, tmp_path, monkeypatch, capsys):
    asked = made_up(monkeypatch, losing)
    flags = (*LEARNED, f"--statistics={run}", f"--out={tmp_path / 'new'}")
    assert plan(*flags) == 1
    err = capsys.readouterr().err
    assert "every plan within the budget loses to turboquant_mse 2b" in err
    assert "48 tokens of" in err
    assert "--force" in err
    assert not (tmp_path / "new").exists()
    assert [len(names) for names in asked] == [3, 2, 2]  # all, then each of two
    assert plan(*flags, "--force") == 0
    assert "--force: chosen is kept although it loses" in capsys.readouterr().out
    report = allocation(tmp_path / "new")
    assert report["kept"] == "chosen"
    assert len(report["check"]["refused"]) == 2


def test_the_next_best_plan_is_kept_where_the_best_loses(run, tmp_path, monkeypatch):
    def kl(name, tokens, text):
        if tokens == 48:
            return {"chosen": 3.0, "per_head 2b": 2.0}.get(name, 2.5)
        return {"chosen": 1.0, "per_head 2b": 1.5}.get(name, 1.75)

    asked = made_up(monkeypatch, kl)
    assert plan(*LEARNED, f"--statistics={run}", f"--out={tmp_path}") == 0
    assert [names[0] for names in asked[1:]] == ["chosen", "per_head 2b"]
    report = allocation(tmp_path)
    assert report["kept"] == "per_head 2b"
    assert [row[0] for row in report["check"]["refused"]] == ["chosen"]
    found, _ = load(tmp_path)
    assert {c.name for x in found.layers for c in found.codecs(x.index, "v")} == {"per_head"}


def test_a_uniform_rival_is_kept_with_nothing_predicted_for_it(run, tmp_path, monkeypatch, capsys):
    def kl(name, tokens, text):
        return 1.0 if name.startswith("per_head") else 2.0

    made_up(monkeypatch, kl)
    assert plan(*LEARNED, f"--statistics={run}", f"--out={tmp_path}") == 0
    assert "per_head 2b is kept" in capsys.readouterr().out
    report = allocation(tmp_path)
    assert report["kept"] == "per_head 2b"
    assert not {"used", "predicted", "bound", "predicted_by_text"} & set(report)
    found, _ = load(tmp_path)
    assert {c.name for x in found.layers for c in found.codecs(x.index, "k")} == {"per_head"}
    assert found.quality is not None
    assert found.quality.predicted is None


def test_statistics_of_another_model_are_refused_without_a_check_too(run, tmp_path, capsys):
    other = MODEL.parent / "qwen3"
    flags = (*LEARNED, f"--statistics={run}", "--nocheck", f"--out={tmp_path / 'new'}")
    assert turboq("plan", f"--model={other}", *flags) == 1
    assert "model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_policies_hide_no_error_but_a_plan_that_cannot_be(run, tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, lambda name, tokens, text: float("nan"))
    flags = ("--budget=700@150KiB", "--policies=0:0,4:0", DATA_FREE, f"--statistics={run}")
    assert plan(*flags, f"--out={tmp_path / 'new'}") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_not_finite_is_not_kept(run, tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, lambda name, tokens, text: float("nan") if tokens == 48 else 1.0)
    assert plan(*LEARNED, f"--statistics={run}", f"--out={tmp_path / 'new'}") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_worst_text_decides(run, tmp_path, monkeypatch):
    """By mean `chosen` wins, on the worst text `per_head`; predictions follow the objective."""

    def kl(name, tokens, text):
        return {"chosen": 1.0 if text.endswith("a.txt") else 3.0, "per_head 2b": 2.5}.get(name, 9.0)

    made_up(monkeypatch, kl)
    flags = (*LEARNED, f"--statistics={run}")
    kept, worst = {}, {}
    for objective in ("mean", "worst"):
        out = tmp_path / objective
        assert plan(*flags, f"--objective={objective}", f"--out={out}") == 0
        kept[objective] = allocation(out)["kept"]
        assert plan(*flags, f"--objective={objective}", "--nocheck", f"--out={out}") == 0
        assert allocation(out)["objective"] == objective
        worst[objective] = max(allocation(out)["predicted_by_text"].values())
    assert kept == {"mean": "chosen", "worst": "per_head 2b"}
    assert worst["worst"] <= worst["mean"]


def test_weights_of_texts_decide(texts, tmp_path, monkeypatch):
    """b.jsonl has three of four windows, and three quarters of every mean over the texts."""
    one, other = (Path(text.removeprefix("--text=")) for text in texts)
    rows = [json.dumps({"text": part}) for part in other.read_text().split(" ", 3)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    weighted = (f"--text={tmp_path / 'b.jsonl'}@3", f"--text={one}")
    run = tmp_path / "run"
    sizes = ("--windows=4", *OBSERVE[1:])
    assert turboq("calibrate", f"--model={MODEL}", *weighted, *sizes, f"--out={run}") == 0
    statistics = load_statistics(run)
    assert [text["windows"] for text in statistics.manifest.inputs["text"]["texts"]] == [3, 1]
    np.testing.assert_allclose(statistics.weights, [0.75, 0.25])

    def kl(name, tokens, text):
        return {"chosen": 1.0 if text == "b.jsonl" else 3.0, "per_head 2b": 1.75}.get(name, 9.0)

    made_up(monkeypatch, kl)  # chosen: mean 2, weighted mean 1.5
    flags = (f"--statistics={run}", "--budget=3bpc", DATA_FREE)
    assert plan(*flags, f"--out={tmp_path / 'checked'}") == 0
    assert allocation(tmp_path / "checked")["kept"] == "chosen"
    report = allocation(tmp_path / "checked")
    assert report["text_weights"] == {"b.jsonl": 0.75, one.name: 0.25}
    each = report["predicted_by_text"]
    assert report["predicted"] == pytest.approx(0.75 * each["b.jsonl"] + 0.25 * each[one.name])


def test_killed_and_resumed_is_the_same_plan(run, tmp_path, monkeypatch, capsys):
    calls, evaluate_texts = [], check.evaluate_texts

    def killed_at_the_second(*args, **options):
        calls.append(options["folder"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_texts(*args, **options)

    monkeypatch.setattr(check, "evaluate_texts", killed_at_the_second)
    flags = (*LEARNED, f"--statistics={run}", f"--out={tmp_path}")
    assert plan(*flags) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    assert plan(*flags) == 0
    assert written(tmp_path) == written(run)


def test_memory_at_a_context_and_named_candidates(run, tmp_path):
    flags = (DATA_FREE, "--candidates=exact", "--granularity=per_kv", "--nocheck")
    assert plan("--budget=700@150KiB", *flags, f"--statistics={run}", f"--out={tmp_path}") == 0
    found, _ = load(tmp_path)
    at = found.residency(700)
    assert at.total <= 150 * 1024
    assert allocation(tmp_path)["used"] == at.total
    for layer in found.layers:
        for side in ("k", "v"):
            assert len(set(found.codecs(layer.index, side))) == 1


@pytest.mark.parametrize("memory", ["60KiB", "150KiB"])
def test_turns_of_joined_heads_count_at_a_context(memory, run, layout, monkeypatch):
    """What a plan takes is what its budget allows; joined heads only where they lose less."""
    statistics = load_statistics(run)
    monkeypatch.setattr(within, "heads_joined", lambda *_: 1)  # of so few tokens it is none
    asked = Wanted(budget=Budget.parse(f"700@{memory}"), candidates=("window",), guard=False)

    def of(joint):
        wanted = dataclasses.replace(asked, joint=joint)
        found = plan_within(statistics, layout, wanted, progress=False)
        assert {x.joint for x in found.plan.layers} <= {joint or None} or joint is None
        assert found.plan.residency(700).total == found.allocation.used <= found.allocation.limit
        return found.allocation.cost

    each = {joint: of(joint) for joint in (None, 0, 1)}
    assert each[None] == min(each.values())


def test_rounds_refine_by_what_is_measured(run, tmp_path):
    flags = (DATA_FREE, "--budget=3.5bpc", "--rounds=1", f"--statistics={run}")
    assert plan(*flags, f"--out={tmp_path}") == 0
    report = allocation(tmp_path)
    assert "refined" in report["check"]["kl"]
    assert 1 <= len(report["refinement"]) <= 2


def test_a_plan_for_an_engine_obeys_its_rules(run, tmp_path, capsys, layout):
    flags = ("--budget=12bpc", "--engine=modelopt", "--nocheck", f"--statistics={run}")
    assert plan(*flags, f"--out={tmp_path}") == 0
    assert "sinks=0 recent=0" in capsys.readouterr().out
    found, _ = load(tmp_path)
    rules = ENGINES["modelopt"].constraints(layout, Options())
    assert any(not violations(one, found) for one in rules)
    assert found.tokens.sinks == 0


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
        (["--noforce", "--bits=3"], "--force: needs --budget"),
        (["--windows=3", "--bits=3"], "--windows: needs --budget"),
        (["--budget=3bpc", "--engine=vlm"], "did you mean vllm?"),
        (["--budget=3bpc", "--engine=vllm", "--granularity=per_kv"], "--engine=vllm decides"),
        (["--budget=3bpc", "--candidates=rabitq:3"], "'rabitq:3' is no codec, format or path"),
        (["--budget=3bpc", "--candidates=turboquant_mse:9"], "bits"),
        (["--budget=3bpc", "--candidates=transform:"], "transform:2,2.5"),
        (["--budget=3bpc", "--candidates=transform:two"], "'two' is no number"),
        (["--budget=3bpc", "--window_length=24"], "--window_length: --statistics="),
        (["--budget=3bpc", "--nocheck", "--rounds=1"], "--rounds=1 measures on the model"),
        (["--budget=700@150KiB", "--nocheck", "--policies=4:0,4:8"], "leave --nocheck out"),
        (["--budget=3bpc", "--policies=4:0,4:32"], "has no context"),
        (["--budget=700@150KiB", "--policies=4"], "must be SINKS:RECENT"),
        (["--budget=700@150KiB", "--policies=4:0,4:0"], "name one twice"),
        (["--budget=700@150KiB", "--policies=4:0", "--sinks=2"], "--policies names"),
        (["--policies=4:0"], "needs --budget"),
    ],
)
def test_bad_flags_are_one_line(run, flags, says, tmp_path, capsys):
    out = tmp_path / "new"
    assert plan(*flags, f"--statistics={run}", f"--out={out}") == 1
    err = capsys.readouterr().err
    assert says in err
    errors = [line for line in err.splitlines() if line.startswith("turboq: error: ")]
    assert len(errors) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("length", "says"), [(24, "must be more than --window_length=24"), (99999, "context")]
)
def test_a_check_length_that_checks_nothing_is_refused(length, says, texts, tmp_path, capsys):
    flags = ("--windows=2", "--window_length=24", f"--check_length={length}")
    assert plan(*LEARNED, *texts, *flags, f"--out={tmp_path / 'new'}") == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_makers(layout):
    labels = [m.label for m in makers_of(["transform:2,2.5", "per_head:3", "exact"], layout)]
    assert labels == ["transform 2", "transform 2.5", "per_head 3b", "exact"]
    assert [m.label for m in makers_of(["fp8:scale=token,none"], layout)] == [
        "fp8 scale=token",
        "fp8 scale=none",
    ]


def test_the_models_own_text_needs_no_guard(run, layout, monkeypatch):
    """What it writes is of no one kind: nothing is left out, and nothing shrunk."""
    statistics = load_statistics(run)
    wanted = Wanted(budget=Budget.parse("3bpc"), candidates=("window:2,3",))

    def guarded(*texts):
        monkeypatch.setattr(type(statistics), "texts", texts)
        return menu(statistics, layout, wanted, progress=False).guarded

    assert set(guarded("a.txt", "b.txt").held_out) == {0.0, 0.2, 0.4, 0.6}
    found = guarded("self:7", "b.txt")
    assert found.held_out == {}
    assert found.options == wanted.options


def test_default_candidates_lie_around_the_budget():
    labels = [m.label for m in default_makers(3.25, 64)]
    assert labels[0] == "window 0.25"
    assert labels[-1] == "window 6.25"
    assert len(labels) == 25
    high = [m.label for m in default_makers(16, 64)]
    assert (high[0], high[-1]) == ("window 5", "window 8")
    assert default_makers(1, 64)[0].label == "window 0.25"


def test_the_default_steps_of_another_quantizer(layout):
    """A word without numbers: steps around the budget, of that quantizer and so many states."""
    window = makers_of(["window256"], layout, bits=3.25)
    assert window[0].label == "window256 0.5"  # a run of 8 of a head dim of 16
    assert {m.label.partition(" ")[0] for m in window} == {"window256"}
    assert len(window) == len(default_makers(3.25, 16))


def test_window_plans_are_written_and_read(run, tmp_path):
    flags = ("--budget=2.5bpc", "--candidates=window", "--candidates=window16:2", "--nocheck")
    assert turboq("plan", *flags, f"--statistics={run}", f"--out={tmp_path}") == 0
    sides = [side for layer in load(tmp_path)[0].layers for side in (layer.k, layer.v)]
    codecs = {codec for side in sides for codec in (side.codec, *side.heads.values())}
    assert {c.quantizer for c in codecs} == {"window"}
    assert {c.states for c in codecs} <= {16, 64}


def test_exact_tokens_are_chosen_with_their_bytes_counted(run, tmp_path, capsys):
    """More exact tokens leave fewer bits: what wins is the least KL, and the plan says which."""
    flags = (DATA_FREE, "--granularity=uniform", f"--statistics={run}", "--force")
    policies = "--policies=0:0,4:0,4:16"
    assert plan("--budget=700@150KiB", policies, *flags, f"--out={tmp_path}") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("sinks")]
    kl = {line.split(":")[0]: float(line.split()[-1]) for line in lines}
    assert set(kl) == {"sinks 0, recent 0", "sinks 4, recent 0", "sinks 4, recent 16"}
    found, _ = load(tmp_path)
    best = min(kl, key=lambda name: kl[name])
    assert best == f"sinks {found.tokens.sinks}, recent {found.tokens.recent}"
    assert found.residency(700).total <= 150 * 1024


AT_700 = ("--budget=700@150KiB", DATA_FREE, "--granularity=uniform")


def policy_lines(out: str) -> dict[str, str]:
    lines = [x.partition(": ") for x in out.splitlines() if x.startswith("sinks")]
    return {name: rest for name, _, rest in lines}


def test_policies_are_compared_at_length_over_the_same_positions(
    run, tmp_path, monkeypatch, capsys
):
    """Short windows prefer 0:0, the long one 4:16, by its 27 of 47 positions that see a codec."""

    def kl(name, tokens, text):
        if name.split()[1] == "turboquant_mse":
            return 9.0
        return {"0:0": 1.0, "4:0": 2.0, "4:16": 3.0}[name.split()[0]] if tokens == 24 else 1.0

    asked = made_up(monkeypatch, kl)
    flags = (*AT_700, "--policies=0:0,4:0,4:16", f"--statistics={run}", f"--out={tmp_path}")
    assert plan(*flags) == 0
    out = capsys.readouterr().out
    shares = {"sinks 0, recent 0": 47 / 47, "sinks 4, recent 0": 43 / 47}
    shares["sinks 4, recent 16"] = 27 / 47
    assert policy_lines(out) == {
        name: f"KL at 48 tokens held back {share:.6g}" for name, share in shares.items()
    }
    assert len(asked) == 2  # short, long: all policies at once
    assert sorted(asked[0]) == sorted(asked[1])
    assert load(tmp_path)[0].tokens.recent == 16
    assert allocation(tmp_path)["check"]["judged_tokens"] == 48
    assert "judged at 48 tokens, the budget is for 700: calibrate with --check_length=256" in out


def test_a_policy_that_loses_at_length_gives_way_to_the_next(run, tmp_path, monkeypatch):
    """4:0 loses least and to its own baseline, which is not that of 0:0."""

    def kl(name, tokens, text):
        policy, codec = name.split()[:2]
        return {"0:0": 2.0, "4:0": 1.0}[policy] + (codec != "turboquant_mse") * (
            1.0 if policy == "4:0" else -0.5
        )

    made_up(monkeypatch, kl)
    flags = (*AT_700, "--policies=0:0,4:0", f"--statistics={run}", f"--out={tmp_path}")
    assert plan(*flags) == 0
    assert load(tmp_path)[0].tokens.sinks == 0
    refused = {name.split()[0] for name, _, _ in allocation(tmp_path)["check"]["refused"]}
    assert refused <= {"4:0"}


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        ([], {"sinks 4, recent 0", "sinks 4, recent 32", "sinks 4, recent 128"}),
        (["--sinks=2"], set()),
    ],
)
def test_three_policies_by_default_at_a_context(flags, tried, run, tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, lambda name, tokens, text: 1.0)
    assert plan(*AT_700, *flags, f"--statistics={run}", f"--out={tmp_path}") == 0
    lines = policy_lines(capsys.readouterr().out)
    assert set(lines) == tried
    for name in tried - {"sinks 4, recent 0"}:
        assert "keeps every token of a window of 24 exact" in lines[name]


@pytest.mark.parametrize(
    ("context", "length", "wanted", "tokens"),
    [
        (8192, 512, None, 2048),
        (8192, 512, 32768, 4096),
        (2048, 512, 32768, 2048),
        (8192, 512, 1024, 1024),
        (8192, 512, 300, 0),
        (65536, 2048, 32768, 8192),
    ],
)
def test_the_long_window_follows_the_budget(context, length, wanted, tokens):
    assert long_check(context, length, wanted) == tokens


def test_what_is_calibrated_for_a_context_is_checked_there(texts, tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, lambda name, tokens, text: 1.0)
    sizes = [x for x in OBSERVE if "check_length" not in x]
    flags = (*texts, *sizes, DATA_FREE, "--budget=100@120KiB", "--granularity=uniform")
    assert plan(*flags, f"--out={tmp_path}") == 0
    (long,) = load_statistics(tmp_path).held_back.long.values()
    assert long.shape == (1, 100)
    assert allocation(tmp_path)["check"]["judged_tokens"] == 100
    assert "judged at" not in capsys.readouterr().out
