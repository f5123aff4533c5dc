"""Ablations: every study's arms are plans of the bytes it claims; their statistics are right."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stat_cases import random_windows, side_of

from turboq import codecs
from turboq.codecs import Exact, PerHead
from turboq.numbers.rope import Rope
from turboq.plan import LayerGeometry, ModelGeometry, document, load
from turboq_calibrate.choose.plan_within import Wanted
from turboq_calibrate.cli import main as cli
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.layer_statistics import LayerStatistics
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.reservoir import Tokens
from turboq_calibrate.observe.statistics_files import MANIFEST, Manifest, Statistics

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "ablations"
STUDIES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "study")
DIM, HEADS, TOKENS = 16, 2, 64
ROPE = Rope(dim=DIM, theta=100.0)
MODEL = ROOT / "tests" / "golden" / "llama3"


class Made(Statistics):
    """Of random vectors: a layer is twice as sensitive as the one before, keys more so."""

    def __init__(self, folder: Path, seed: int):
        text = {"texts": [{"name": "made up", "sha256": "1" * 64}], "windows": 4, "window": 16}
        inputs = {"model": {"fingerprint": "0" * 64}, "text": text, "recipe": {"seed": seed}}
        self.folder, self.seed = folder / str(seed), seed
        self.folder.mkdir(exist_ok=True)
        (self.folder / MANIFEST).write_text(str(seed))
        self.manifest = Manifest(
            version=2, inputs=inputs, geometry={}, tokens=TOKENS, bins={}, windows={}, layers=()
        )
        self.layer = functools.cache(self._layer)

    def __getitem__(self, index):
        return self.layer(index)

    def _layer(self, index):
        rng = np.random.default_rng([index, self.seed])
        x, g = rng.standard_normal((2, TOKENS, HEADS, DIM)).astype(np.float32)
        g *= 2.0**index * np.array([1.0, 4.0], np.float32)[:, None]
        number = np.arange(TOKENS, dtype=np.int32)
        k, v = (x + 1, g), (x + 2, g / 8)
        tokens = Tokens(
            k=k[0], v=v[0], g_k=k[1], g_v=v[1], window=number // 16, position=number % 16 * 32,
            text=np.zeros(TOKENS, np.int32),
        )  # fmt: skip
        sides = {"k": k, "v": v, "q": (x, None), "k_before": k, "q_before": (x, None)}
        summed = {
            name: side_of(y[None], None if z is None else z[None]) for name, (y, z) in sides.items()
        }
        return LayerStatistics(sides=summed, rotary=ROPE, read_tokens=lambda: tokens)


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("study")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def arms(study, tmp_path_factory):
    """The arms of a study, over random vectors instead of a model's, made once.

    Of learned arms the plan is the `Wanted` that the command's function was called with.
    """
    folder = tmp_path_factory.mktemp("made")

    class Bench(study.Bench):
        statistics = Made(folder, 0)

        def of_text(self, text, windows):
            return Made(folder, 1000 * windows + sum(text.encode()))

    def layer(i):
        return LayerGeometry(
            index=i, path=f"model.layers.{i}.self_attn", kv_heads=HEADS, q_heads=HEADS, k_dim=DIM,
            v_dim=DIM, rope=ROPE, rope_layout="half", rope_dim=DIM,
        )  # fmt: skip

    @functools.cache
    def made(name):
        layers = tuple(map(layer, range(12 if name == "boundary_layers" else 2)))
        geometry = ModelGeometry(
            fingerprint="0" * 64, family="llama", name="made up", layers=layers
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study, "menu", lambda *_, **__: SimpleNamespace(under=lambda _: None))
            patch.setattr(study, "plan_within", asked)
            return importlib.import_module(name).arms(Bench(None, geometry, 0, folder))

    return made


def asked(statistics, geometry, wanted, **_):
    which = type(statistics).__name__ + str(statistics.folder)
    return SimpleNamespace(plan=wanted, arrays={"of": np.frombuffer(which.encode(), np.uint8)})


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A folder of statistics of a tiny model."""
    model = load_model(MODEL)
    out = tmp_path_factory.mktemp("observed")
    observe(model, random_windows(model.spec.vocab, 4, 24), out, progress=False)
    return out


def stored(arm):
    """All of a plan but where it comes from, and its arrays."""
    if isinstance(arm.plan, Wanted):
        said = repr(arm.plan)
    else:
        said = json.dumps({key: document(arm.plan)[key] for key in ("tokens", "layers")})
    return said, tuple((n, x.tobytes()) for n, x in sorted(arm.arrays.items()))


def bits(arm):
    plan = arm.plan
    return plan.budget if isinstance(plan, Wanted) else plan.bytes.bits_per_channel


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_distinct_plans_with_known_baselines(arms, name):
    assert f"python experiments/ablations/{name}.py" in importlib.import_module(name).__doc__
    names = [arm.name for arm in arms(name)]
    assert len(set(names)) == len(names) >= 4
    assert {arm.baseline for arm in arms(name)} - {None} <= set(names)
    assert any(arm.baseline for arm in arms(name))
    assert len(set(map(stored, arms(name)))) == len(names)


@pytest.mark.parametrize(
    "name",
    ["key_mean", "scale_rules", "rotation_kinds", "codebook_source", "boundary_layers",
     "calibration_size_and_domain", "sinks_and_window", "learned_parts"],
)  # fmt: skip
def test_arms_and_their_baselines_store_equal_bytes(arms, name):
    known = {arm.name: bits(arm) for arm in arms(name)}
    for arm in arms(name):
        assert arm.baseline is None or known[arm.name] == known[arm.baseline]


@pytest.mark.parametrize(
    "flags",
    [("--budget=3bpc", "--candidates=transform:2,3,4", "--nocheck"), ("--codec=per_head:3",)],
    ids=["budget", "codec"],
)
def test_arms_are_the_plans_of_the_command(study, observed, tmp_path, monkeypatch, flags):
    out = tmp_path / "plan"
    command = ["plan", f"--statistics={observed}", f"--model={MODEL}", f"--out={out}", *flags]
    assert cli.run(command) == 0
    monkeypatch.setattr(study, "STATISTICS", SimpleNamespace(value=[str(observed)]))
    bench = study.Bench(None, model_geometry(load_model(MODEL, resident=False)), 0, tmp_path)
    if len(flags) > 1:
        arm = bench.learned("learned", 3, candidates=("transform:2,3,4",))
    else:
        arm = bench.arm("per_head", PerHead(dim=bench.dim, bits=3))
    plan, arrays = load(out)
    assert (arm.plan.layers, arm.plan.tokens) == (plan.layers, plan.tokens)
    assert arm.arrays.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(arm.arrays[name], values)


def test_each_learned_part_changes_one_thing(arms):
    found = {arm.name: arm for arm in arms("learned_parts")}
    changed = []
    for arm in found.values():
        if arm.baseline is None:
            assert arm.plan == Wanted(budget=arm.plan.budget)  # the command's defaults
            continue
        base = found[arm.baseline]
        one = [f.name for f in dataclasses.fields(Wanted)
               if getattr(arm.plan, f.name) != getattr(base.plan, f.name)]  # fmt: skip
        one += [] if np.array_equal(arm.arrays["of"], base.arrays["of"]) else ["statistics"]
        assert len(one) == 1, arm.name
        if arm.plan.k_rope == "after" or "statistics" in one:
            assert base.plan.joint == 0, f"{arm.name} stores heads apart, {base.name} may not"
        changed += one
    assert set(changed) == {
        "granularity", "statistics", "k_rope", "candidates", "options", "joint",
    }  # fmt: skip


def test_without_gradients_nothing_of_them_is_left(study, tmp_path):
    module = importlib.import_module("learned_parts")
    made = Made(tmp_path, 0)
    seen = {side: module.WithoutGradients(made).layers[1].observed(side) for side in "kv"}
    queries = np.einsum("nkd,nke->kde", made[1].tokens().k - 1, made[1].tokens().k - 1) / TOKENS
    np.testing.assert_allclose(seen["k"].metric, queries, rtol=1e-5)
    np.testing.assert_array_equal(seen["v"].metric, np.broadcast_to(np.eye(DIM), (HEADS, DIM, DIM)))
    for side in "kv":
        assert not seen[side].gradients
        np.testing.assert_array_equal(seen[side].x, made[1].observed(side).x)
        np.testing.assert_array_equal(seen[side].weighted_mean, seen[side].mean)


def test_key_mean_switches_only_the_means_it_names(arms):
    found = {a.name: a.arrays for a in arms("key_mean")}
    k, v = "layers.1.k.mean", "layers.1.v.mean"
    assert np.all(found["no mean"][k] == 0)
    assert np.all(found["no mean"][v] == 0)
    assert np.all(found["K mean"][k] != 0)
    assert np.all(found["K mean"][v] == 0)
    np.testing.assert_array_equal(found["K mean"][k], found["both means"][k])
    book = "layers.1.k.codebook"
    np.testing.assert_array_equal(found["no mean"][book], found["both means"][book])


def test_qjl_leaves_values_exact(arms):
    for arm in arms("qjl"):
        assert isinstance(arm.plan.layers[0].v.codec, Exact)
        assert not isinstance(arm.plan.layers[0].k.codec, codecs.Exact)


def test_contrasts_are_paired_geometric_means(study):
    def row(arm, text, kl):
        return {"arm": arm, "text": text, "kl_windows": kl}

    arms = {
        "a": study.Arm(name="a", plan=None, arrays={}),
        "b": study.Arm(name="b", plan=None, arrays={}, baseline="a"),
    }
    rows = [
        row("a", "x", [0.1, 0.2]), row("b", "x", [0.05, 0.4]),
        row("a", "y", [1.0, 1.0]), row("b", "y", [0.5, 0.5]),
    ]  # fmt: skip
    found = {c["text"]: c for c in study.contrasts(arms, rows)}
    assert set(found) == {"x", "y", "all"}
    assert found["x"]["kl_ratio"] == pytest.approx(1.0)  # halved in one window, doubled in another
    assert found["y"]["kl_ratio"] == pytest.approx(0.5)
    assert found["y"]["ratio_ci"] == pytest.approx([0.5, 0.5])
    assert found["all"]["kl_ratio"] == pytest.approx(2**-0.5)
    low, high = found["x"]["ratio_ci"]
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(2.0)


def test_a_study_runs_and_continues(observed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A cache of keys and values. " * 40)
    command = [
        sys.executable, str(FOLDER / "key_mean.py"), f"--model={MODEL}", f"--text={text}",
        f"--statistics={observed}", f"--statistics={observed}", "--length=16", "--windows=2",
        "--seeds=2", f"--out={tmp_path}/out",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out" / "key_mean.json").read_bytes()
    result = json.loads(first)
    made = result["x-made"]
    assert made["command"].startswith("python experiments/ablations/key_mean.py --model=tests/gold")
    assert made["command"].endswith(" --length=16 --windows=2 --seeds=2 --out=out")
    assert str(tmp_path) not in first.decode()
    assert [row["arm"] for row in result["rows"]] == ["no mean", "K mean", "V mean", "both means"]
    assert all(len(row["kl_windows"]) == 4 for row in result["rows"])
    assert (tmp_path / "out" / "key_mean.svg").read_text().count("<svg") == 1
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(parts) == 4  # of every seed and window
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "key_mean.json").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()} == parts


def test_the_template_runs_at_smoke_size(observed, tmp_path):
    """As it is copied; its ratios are those of the windows that it writes down."""
    text = tmp_path / "text.txt"
    text.write_text("A cache of keys and values. " * 40)
    command = [
        sys.executable, str(FOLDER.parent / "template.py"), "--smoke", f"--model={MODEL}",
        f"--statistics={observed}", f"--text={text}", f"--out={tmp_path}/out",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "template.json").read_text())
    kl = {row["name"]: np.array(row["kl_windows"]) for row in found["rows"]}
    assert list(kl) == ["2 bits", "3 bits", "4 bits"]
    assert all(len(x) == 2 for x in kl.values())
    first, second = found["contrasts"]
    assert (first["what"], second["what"]) == ("3 bits / 2 bits", "4 bits / 3 bits")
    ratio = np.sqrt(np.prod(kl["3 bits"] / kl["2 bits"]))
    assert first["kl_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert f"{first['what']:<18}" in done.stdout
    assert str(tmp_path / "out" / "template.json") in done.stdout
    assert found["x-made"]["command"] == (
        "python experiments/template.py --smoke --model=tests/golden/llama3 "
        f"--statistics={Path(observed).name} --text=text.txt --out=out"
    )
    assert str(tmp_path) not in json.dumps(found)
