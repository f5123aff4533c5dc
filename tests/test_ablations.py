"""Ablations: every study's arms are plans of the bytes it claims; their statistics are right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from turboq import codecs
from turboq.codecs import Exact
from turboq.codecs.observed import Observed
from turboq.plan import LayerGeometry, ModelGeometry

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "ablations"
STUDIES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "study")
DIM, HEADS, LAYERS = 16, 2, 12


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("study")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(study):
    """A bench over random vectors instead of a model's."""
    geometry = ModelGeometry(
        fingerprint="0" * 64,
        family="llama",
        name="made up",
        layers=tuple(
            LayerGeometry(
                index=i, path=f"model.layers.{i}.self_attn", kv_heads=HEADS, q_heads=4, k_dim=DIM,
                v_dim=DIM,
            )
            for i in range(LAYERS)
        ),
    )  # fmt: skip

    class Made(study.Bench):
        def observed(self, index, side, *, texts=study.CALIBRATION, windows=8):
            rng = np.random.default_rng([index, side == "v", windows, *"".join(texts).encode()])
            x, g = rng.standard_normal((2, HEADS, 64, DIM)).astype(np.float32)
            # A layer twice as sensitive as the one before, so that granularities differ.
            g *= 2.0**index * np.array([1.0, 4.0], np.float32)[:, None, None]
            return Observed.of(x + len(texts[0]), g if side == "k" else g / 8)

    return Made(None, geometry, 0, 64, Path())


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_distinct_plans_with_known_baselines(study, bench, name):
    module = importlib.import_module(name)
    assert f"python experiments/ablations/{name}.py" in module.__doc__
    arms = module.arms(bench)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names) >= 4
    assert {arm.baseline for arm in arms} - {None} <= set(names)
    assert any(arm.baseline for arm in arms)
    assert len({study._hash(arm) for arm in arms}) == len(arms)


@pytest.mark.parametrize(
    "name",
    ["key_mean", "scale_rules", "rotation_kinds", "codebook_source", "boundary_layers",
     "calibration_size_and_domain", "sinks_and_window", "per_head_vs_uniform"],
)  # fmt: skip
def test_arms_and_their_baselines_store_equal_bytes(study, bench, name):
    arms = {arm.name: arm for arm in importlib.import_module(name).arms(bench)}
    for arm in arms.values():
        if arm.baseline is not None:
            bits, base = (a.plan.bytes.bits_per_channel for a in (arm, arms[arm.baseline]))
            # Segments are whole bytes wide: budgets are met to one step of the smallest unit.
            step = 0.25 if arm.plan.layers[0].k.codec.name == "transform" else 0
            assert abs(bits - base) <= step


def test_key_mean_switches_only_the_means_it_names(study, bench):
    arms = {a.name: a.arrays for a in importlib.import_module("key_mean").arms(bench)}
    k, v = "layers.3.k.mean", "layers.3.v.mean"
    assert np.all(arms["no mean"][k] == 0)
    assert np.all(arms["no mean"][v] == 0)
    assert np.all(arms["K mean"][k] != 0)
    assert np.all(arms["K mean"][v] == 0)
    np.testing.assert_array_equal(arms["K mean"][k], arms["both means"][k])
    book = "layers.3.k.codebook"
    np.testing.assert_array_equal(arms["no mean"][book], arms["both means"][book])


def test_qjl_leaves_values_exact(study, bench):
    for arm in importlib.import_module("qjl").arms(bench):
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


def test_a_study_runs_and_continues(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A cache of keys and values. " * 40)
    command = [
        sys.executable, str(FOLDER / "key_mean.py"), f"--model={ROOT}/tests/golden/llama3",
        f"--text={text}", "--length=16", "--windows=2", "--seeds=2", f"--out={tmp_path}/out",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "out" / "key_mean.json").read_bytes()
    result = json.loads(first)
    assert [row["arm"] for row in result["rows"]] == ["no mean", "K mean", "V mean", "both means"]
    assert all(len(row["kl_windows"]) == 4 for row in result["rows"])
    assert (tmp_path / "out" / "key_mean.svg").read_text().count("<svg") == 1
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(parts) == 2
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "key_mean.json").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()} == parts
