"""A run on a mesh is the run of one device, in one process or several, killed or not."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import TOL

from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.placement import make_mesh
from turboq_calibrate.observe.statistics_files import load_statistics

WORKER = Path(__file__).parent / "mesh_worker.py"
ROOT = Path(__file__).parent.parent.parent.parent
FLAGS = os.environ.get("XLA_FLAGS", "")  # what makes compiling fast

_spec = importlib.util.spec_from_file_location("mesh_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def start(out, *, process=0, processes=1, port=0, devices=1, axis=1, event="never", count=1):
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "calibrate")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    words = [out, process, processes, port, axis, event, count]
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, words)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*workers):
    """Waits for all; returns exit codes after showing the output of those that failed."""
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    codes = [worker.returncode for worker in workers]
    for code, output in zip(codes, outputs, strict=True):
        if code:
            print(output)
    return codes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process (this one), one device, no mesh."""
    out = tmp_path_factory.mktemp("one")
    worker.run(out)
    return out


def check_equal(out, one):
    """Counts exactly; values to the rounding of float32 sums in another order."""
    got, want = load_statistics(out), load_statistics(one)
    assert got.manifest.inputs == want.manifest.inputs
    assert got.manifest.tokens == want.manifest.tokens == 18 * 10
    for i in range(len(want)):
        for side in want.layers[i].sides:
            a, b = (x.layers[i].sides[side].arrays for x in (got, want))
            for field in st.fields_of(side):
                x, y = a[field.name].astype(np.float64), b[field.name].astype(np.float64)
                if field.name == "count":
                    np.testing.assert_array_equal(x, y)
                elif field.dtype != "int64":
                    atol = TOL["mesh_sums"] * np.abs(y).max()
                    np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=field.name)
                else:
                    # Every value is counted once; one at the edge of a bin may change sides.
                    axes = tuple(range(1, x.ndim))
                    np.testing.assert_array_equal(x.sum(axis=axes), y.sum(axis=axes))
                    assert np.abs(x - y).sum() <= TOL["mesh_moved"] * y.sum(), field.name
        a, b = (vars(x.tokens(i)) for x in (got, want))
        for name, y in b.items():
            if y.dtype == np.float32:
                atol = TOL["mesh_sums"] * np.abs(y).max()
                np.testing.assert_allclose(a[name], y, rtol=0, atol=atol, err_msg=name)
            else:
                np.testing.assert_array_equal(a[name], y)


def test_two_processes_equal_one(one, tmp_path):
    port = free_port()
    both = [start(tmp_path, process=i, processes=2, port=port, devices=4, axis=2) for i in range(2)]
    assert finish(*both) == [0, 0]
    check_equal(tmp_path, one)
    fitted = [np.load(tmp_path / f"fitted_{i}.npz") for i in range(2)]
    units = [int(f["fitted"]) for f in fitted]
    layers = len(load_statistics(one))
    assert units == [layers, layers]  # K and V of every layer: half of them each
    arrays = [{n: f[n] for n in f.files if n != "fitted"} for f in fitted]
    assert arrays[0].keys() == arrays[1].keys()
    for name, value in arrays[0].items():
        np.testing.assert_array_equal(value, arrays[1][name])
    # The same arrays as from one process's fit of the same statistics.
    fitted_alone, again = worker.run(tmp_path)
    assert fitted_alone == 2 * layers
    assert again.keys() == arrays[0].keys()
    for name, value in arrays[0].items():
        np.testing.assert_array_equal(value, again[name])


def test_a_killed_job_continues_with_another_number_of_processes(one, tmp_path):
    """Both processes die on the way back; one process with eight devices takes over."""
    port = free_port()
    both = [
        start(tmp_path, process=i, processes=2, port=port, devices=2, event="gradient", count=5)
        for i in range(2)
    ]
    assert -signal.SIGKILL in finish(*both)
    with pytest.raises(ValueError, match="no finished statistics"):
        load_statistics(tmp_path)
    assert finish(start(tmp_path, devices=8, axis=2)) == [0]
    assert '"resumed"' in (tmp_path / "observe" / "events.jsonl").read_text()
    check_equal(tmp_path, one)


def test_a_mesh_must_use_all_devices():
    with pytest.raises(ValueError, match="does not use all 1 devices"):
        make_mesh(data=2, model=3)
    assert make_mesh().shape == {"data": 1, "model": 1}
