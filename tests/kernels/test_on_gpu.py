"""scripts/on_gpu end to end on a CPU, and what its table and timing say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turboq_kernels.bench import methods, timing

ROOT = Path(__file__).parents[2]


def test_tiny_run(tmp_path):
    out = tmp_path / "speed.json"
    done = subprocess.run(
        ["./scripts/on_gpu", "--tiny", f"--out={out}"], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"TURBOQ_PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert {check["op"]: check["error"] for check in report["checks"]} == dict.fromkeys(
        ("decode", "history", "own", "encode", "columns"), ""
    )
    assert report["copy_gb_per_s"] > 0
    assert report["floor_us"] > 0
    exact, packed, *chunk = report["rows"]
    assert (exact["method"], packed["method"]) == ("bf16 xla", "3 bits")
    assert exact["bytes"] == 2 * 512 * 16 * 2
    assert packed["bytes"] == 2 * 512 * (16 * 3 // 8 + 2)  # codes and a float16 scale
    assert exact["vs_bf16"] == 1.0
    assert packed["us_range"][0] <= packed["us"] <= packed["us_range"][1]
    assert [(row["method"], row["chunk"]) for row in chunk] == [("bf16 xla", 40), ("3 bits", 40)]
    assert chunk[1]["bytes"] == packed["bytes"]
    (encode,) = report["encode"]
    assert encode["us"] > 0, encode
    assert "3 bits" in done.stdout
    assert "launch floor" in done.stdout


def test_no_time_left_is_reported(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-c", LATE, str(out)]
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skipped all B=1 S=512 T=1: no time left" in done.stdout


LATE = """
import sys
sys.path.insert(0, "experiments")
sys.argv = ["decode_speed", "--tiny", "--seconds=0", f"--out={sys.argv[1]}"]
import decode_speed
from absl import app
decode_speed._checks = decode_speed._floors = lambda run: run.report.update(
    copy_gb_per_s=1, floor_us=1)
app.run(decode_speed.main)
"""


def test_calls_rotate_through_more_than_the_cache():
    """Every job's copies are larger than any L2, or the job alone is."""
    for method in methods.all_methods():
        job = method.job(methods.Shape(batch=1, tokens=4096))
        assert job.resident >= timing.COLD_BYTES, method.name
        assert job.calls >= 8


@pytest.mark.parametrize(("nbytes", "calls"), [(1e6, 1000), (1e9, 20), (1e12, 8)])
def test_a_dispatch_is_long_enough(nbytes, calls):
    assert timing.count(nbytes) == calls
