"""Runs a program with the GPU compiler, which CPU machines have as a plugin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(program: str) -> str:
    """What a program printed; skips where it exits with `turboq_kernels.aot.cuda.missing()`.

    A subprocess: the plugin must not meet a JAX that has begun, nor jaxtyping's import hook.
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    if "the GPU compiler is not installed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
