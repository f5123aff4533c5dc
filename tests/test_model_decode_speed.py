"""The benchmark of whole models' decode steps: the program, its arithmetic, and what it decodes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq_calibrate.measure.generate import greedy

ROOT = Path(__file__).parents[1]
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PACKED = (
    "exact", "turboquant_mse 3b", "per_head 3b", "learned", "learned block:64", "learned block:256",
)  # fmt: skip


@pytest.fixture(scope="module")
def timed():
    folder = str(ROOT / "experiments")
    sys.path.insert(0, folder)
    yield SimpleNamespace(
        steps=importlib.import_module("timed_steps"), caches=importlib.import_module("timed_caches")
    )
    sys.path.remove(folder)


def test_tiny_run(tmp_path):
    out = tmp_path / "speed.json"
    done = subprocess.run(
        [sys.executable, "experiments/model_decode_speed.py", "--tiny", f"--out={out}"],
        cwd=ROOT, text=True, capture_output=True, check=False,
        env={"XLA_FLAGS": FAST} | os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert [row["cache"] for row in report["rows"]] == ["bf16 xla", *PACKED], report["skipped"]
    assert report["skipped"] == []
    for row in report["rows"]:
        steps, attention = np.transpose(row["rounds_ms"])
        assert row["step_ms"] == pytest.approx(np.median(steps), rel=1e-3)
        assert row["attention_ms"] == pytest.approx(np.median(attention), rel=1e-3)
        assert row["programs"] > 0
        assert row["cache"] in done.stdout
    size = {row["cache"]: row["cache_bytes"] for row in report["rows"]}
    # Two layers of 2 KV heads of 16 channels, both sides; codes and sinks of 256 slots are held.
    assert size["exact"] == 2 * 2 * 2 * 16 * 2 * (256 + 4)
    assert size["turboquant_mse 3b"] == 2 * 2 * 2 * (256 * (16 * 3 // 8 + 2) + 16 * 2 * 4)


@pytest.mark.parametrize("name", ["exact", "bf16 xla"])
def test_what_is_timed_is_what_greedy_decodes(timed, name):
    """An exact cache, a prompt: the reference is greedy's plain path, without any cache."""
    model = timed.caches.llama8b(2, tiny=True)
    prompt = np.random.default_rng(0).integers(0, model.spec.vocab, (2, 9)).astype(np.int32)
    shape = timed.steps.Shape(batch=2, context=9, rounds=2, steps=2)
    with jax.numpy_dtype_promotion("standard"):  # of JAX's own attention
        one = timed.steps.Decoding(model, timed.caches.caches(model, 2)[name], shape, prompt)
        tokens = [one.token]
        for _ in range(2):
            one.steps(1)
            tokens.append(one.token)
    want = greedy(model, prompt, 5).tokens
    np.testing.assert_array_equal(np.stack(tokens, axis=1), want[:, 2:])  # two steps were untimed


def test_a_program_compiled_in_a_timed_step_is_an_error(timed):
    timed.steps.count_programs()
    run = jax.jit(lambda x: x * 3 + 1)
    x, other = jnp.ones(5), jnp.ones(6)
    run(x)
    with timed.steps.none_compiled():
        run(x)
    with pytest.raises(TurboqError, match="1 programs were compiled in timed steps"):  # noqa: SIM117
        with timed.steps.none_compiled():
            run(other)


def test_ratios_and_shares(timed):
    """Three rounds by hand: half the time of the faster exact cache, of a step without any 4 ms."""
    ready = {
        name: SimpleNamespace(
            cache=SimpleNamespace(nbytes=lambda: 7), programs=1, shape=SimpleNamespace(batch=3)
        )
        for name in ("none", "exact", "bf16 xla", "own")
    }
    times = {
        "none": [(4.0, 0.0)] * 3,
        "exact": [(30.0, 1.0)] * 3,
        "bf16 xla": [(8.0, 6.0), (16.0, 6.0), (32.0, 6.0)],
        "own": [(4.0, 2.0), (8.0, 2.0), (16.0, 2.0)],
    }
    found = timed.steps._rows(ready, times)
    assert found["baseline"] == {"step": "bf16 xla", "attention": "exact"}
    assert found["without_cache_ms"] == 4.0
    own = found["rows"][-1]
    assert (own["cache"], own["step_ms"], own["tokens_per_s"]) == ("own", 8.0, 375.0)
    assert (own["step_ratio"], own["step_ratio_ci"]) == (2.0, [2.0, 2.0])
    assert (own["attention_ratio"], own["attention_ratio_ci"]) == (0.5, [0.5, 0.5])
    assert own["attention_share"] == 0.5


def test_no_time_left_is_reported(timed):
    model = timed.caches.llama8b(2, tiny=True)
    shape = timed.steps.Shape(batch=1, context=9, rounds=2, steps=1)
    found = timed.steps.compare(model, shape, only=("none", "exact"), seconds=0)
    assert found["rows"] == []
    assert found["skipped"] == ["none: no time left", "exact: no time left"]
