"""What `experiments/long_context.py` and `tasks.py` share; bad input to them is one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
MODEL = Path(__file__).parent / "golden" / "llama3"


@pytest.fixture(scope="module")
def field_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return importlib.import_module("field_rows")


def test_a_difference_is_paired(field_rows):
    """Windows that differ by nats, and a row that is always 0.25 better."""
    base = 10 * np.arange(6.0)
    assert field_rows.paired(base - 0.25, base) == (
        -0.25,
        "difference -0.2500 (-0.2500 .. -0.2500)",
    )
    mean, said = field_rows.paired([1.0], [0.5])
    assert (mean, said) == (0.5, "difference +0.5000 (one alone, no interval)")


@pytest.mark.parametrize("entry", ["foo", "learned 9=runs/a", "=runs/a"])
def test_a_plan_without_a_rows_name_is_refused(entry, field_rows):
    geometry = model_geometry(load_model(MODEL, resident=False))
    with pytest.raises(TurboqError, match=r"must be NAME=FOLDER, NAME of learned 2\.25"):
        field_rows.makers(geometry, None, [entry])


@pytest.mark.parametrize(
    ("program", "flag", "says"),
    [("long_context", "abc", "'abc' must be a number"), ("tasks", "", "is empty")],
)
def test_lengths_that_are_none_are_one_line(program, flag, says):
    line = [sys.executable, str(EXPERIMENTS / f"{program}.py"), f"--model={MODEL}"]
    done = subprocess.run(
        [*line, "--statistics=none", f"--lengths={flag}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"{program}: error: --lengths")
    assert says in error
