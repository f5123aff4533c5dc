"""scripts/on_gpu end to end on a CPU, and what its table and timing say."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import columns_cases
import pytest

from turboq_kernels.bench import methods, steps, timing

ROOT = Path(__file__).parents[2]


def test_tiny_run(tmp_path):
    out = tmp_path / "speed.json"
    done = subprocess.run(
        ["./scripts/on_gpu", "--tiny", "--seconds=9999", f"--out={out}"],  # a busy machine's too
        cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"TURBOQ_PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert {check["op"]: check["error"] for check in report["checks"]} == dict.fromkeys(
        ("decode", "history", "own", "encode"), ""
    )
    assert report["copy_gb_per_s"] > 0
    assert report["floor_us"] > 0
    exact, packed, column, *chunk, step, step_packed = report["rows"]
    assert (exact["method"], packed["method"]) == ("bf16 xla", "3 bits")
    assert (column["method"], step["method"]) == ("columns T=256", "step bf16 xla")
    assert column["bytes"] == 512 * (2 * (16 * 2 + 4)) // 8  # 2 bits a channel, gains of 4
    assert step["vs_bf16"] == 1.0
    assert step_packed["bytes"] == packed["bytes"] // 2  # of half the tokens
    assert exact["bytes"] == 2 * 512 * 16 * 2
    assert packed["bytes"] == 2 * 512 * (16 * 3 // 8 + 2)  # codes and a float16 scale
    assert exact["vs_bf16"] == 1.0
    assert packed["us_range"][0] <= packed["us"] <= packed["us_range"][1]
    assert [(row["method"], row["chunk"]) for row in chunk] == [("bf16 xla", 40), ("3 bits", 40)]
    assert chunk[1]["bytes"] == packed["bytes"]
    (encode,) = report["encode"]
    assert encode["us"] > 0, encode
    (model,) = report["models"]
    assert [row["cache"] for row in model["rows"]] == ["bf16 xla"]
    assert [text[:20] for text in report["skipped"]] == [
        "floors: rate of imma", "floors: rate of bmma"
    ]  # fmt: skip
    assert list(report["seconds"]) == [
        "checks", "floors", "bare", "steps", "models", "encode", "tunings"
    ]  # fmt: skip
    assert "3 bits" in done.stdout
    assert "launch floor" in done.stdout


def test_checks_of_columns_are_cases_of_their_tests(monkeypatch):
    """Each is a call of `columns_cases.check`, with arguments that it takes."""
    known, asked = inspect.signature(columns_cases.check), []
    monkeypatch.setattr(columns_cases, "check", lambda *a, **b: asked.append(known.bind(*a, **b)))
    monkeypatch.syspath_prepend(ROOT / "experiments")
    device_checks = importlib.import_module("device_checks")
    every = [x for x in device_checks.checks(False) if x[0] == "columns"]
    for _, _, options, check in every:
        check()
        found = asked[-1].arguments
        assert (found["names"], found["interpret"]) == (("triton",), False)
        assert options.items() <= (found | found.get("options", {})).items()
    assert len(asked) == len(every) > 3


def test_no_time_left_is_reported(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-c", LATE, str(out)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (
        "bare: bf16 xla, 3 bits, columns T=256 B=1 S=512 T=1: no time left",
        "steps: step bf16 xla, step 3 bits B=1 S=256 T=1: no time left",
        "models: llama8b B=2 S=40: no time left",
        "encode: B=1 T=1: no time left",
    ):
        assert f"skipped {text}" in done.stdout
        assert text in json.loads(out.read_text())["skipped"]


LATE = """
import sys
sys.path.insert(0, "experiments")
sys.argv = ["decode_speed", "--tiny", "--seconds=0", f"--out={sys.argv[1]}"]
import decode_speed
from absl import app
decode_speed._PARTS |= dict.fromkeys(
    ("checks", "floors"), lambda run: run.report.update(copy_gb_per_s=1, floor_us=1))
app.run(decode_speed.main)
"""


def test_a_group_has_its_share_and_what_earlier_ones_left():
    """Of 100 seconds: shares add up to all, and a group ends when it and those before it may."""
    done = subprocess.run(
        [sys.executable, "-c", SHARES], cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    left = json.loads(done.stdout)
    assert left == pytest.approx([17, 20, 40, 62, 92, 95, 100], abs=2)


SHARES = """
import json, sys, time
sys.path.insert(0, "experiments")
import decode_speed
from absl import flags
flags.FLAGS(["decode_speed", "--seconds=100"])
begin = time.monotonic()
print(json.dumps([decode_speed.Run(begin, {}, name).left() for name in decode_speed.GROUPS]))
"""


def test_calls_rotate_through_more_than_the_cache():
    """Every job's copies are larger than any L2, or the job alone is."""
    for method in methods.all_methods():
        job = method.job(methods.Shape(batch=1, tokens=4096))
        assert job.resident >= timing.COLD_BYTES, method.name
        assert job.calls >= 8


# Bits stored of a head's key, 128 channels: codes, and a scale or a gain of a nibble.
COLUMNS = {"T=256": 260, "T=384": 388, "T=512": 516, "mixed": 388, "joined": 324, "default": 324}
DUE = {f"columns {name}": bits for name, bits in COLUMNS.items()}
DUE |= {f"step {name}": bits for name, bits in DUE.items()}
DUE |= {"step bf16 cudnn": 2048, "step bf16 xla": 2048, "step 3 bits": 400, "step per_head 3b": 400}


def test_bytes_of_columns_and_steps():
    every = steps.column_methods() + steps.step_methods()
    assert {method.name for method in every} == set(DUE)
    for method in every:
        job = method.job(methods.Shape(batch=2, tokens=4096, heads=4))
        assert job.nbytes == 2 * 2 * 4096 * 4 * DUE[method.name] // 8, method.name
        assert job.resident == min(-(-timing.COLD_BYTES // job.nbytes), steps.COPIES) * job.nbytes
        assert job.donated == method.name.startswith("step")


@pytest.mark.parametrize(("nbytes", "calls"), [(1e6, 1000), (1e9, 20), (1e12, 8)])
def test_a_dispatch_is_long_enough(nbytes, calls):
    assert timing.count(nbytes) == calls
