"""What programs of `experiments/` share; bad input to them is one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags

from turboq.cache.layer import TokenPolicy
from turboq.codecs import KiviKey, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import save, uniform_plan
from turboq_calibrate.measure.storage_columns import exact_tokens
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
MODEL = Path(__file__).parent / "golden" / "llama3"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return {name: importlib.import_module(name) for name in ("field_rows", "program")}


@pytest.fixture(scope="module")
def field_rows(modules):
    return modules["field_rows"]


@pytest.fixture(scope="module")
def program(modules):
    return modules["program"]


def rows_flag(*given):
    values = flags.FlagValues()
    flag = flags.DEFINE_multi_string("rows", [], "", flag_values=values)
    values(["program", *(f"--rows={entry}" for entry in given)])
    return flag


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


def test_the_target_is_met_by_loss_or_by_gain(field_rows):
    found = {
        (where, name): (float(np.mean(values)), values)
        for where, pair in {"a": ([1.0, 3.0], [2.0, 4.0]), "b": ([2.0, 2.0], [1.0, 1.0])}.items()
        for name, values in zip(field_rows.TARGET, pair, strict=True)
    }
    found["c", field_rows.TARGET[0]] = (1.0, [1.0])  # the other row was not measured there
    ours, theirs = field_rows.TARGET
    first, second = field_rows.targets(found, ".1f")
    assert first.startswith(f"a: {ours} 2.0, {theirs} 3.0, difference -1.0000")
    assert (first[-5:], second[-8:]) == (": met", ": MISSED")
    first, second = field_rows.targets(found, ".1f", more_is_better=True)
    assert (first[-8:], second[-5:]) == (": MISSED", ": met")


def test_lists_are_repeated_flags_and_commas(program):
    known = ("learned 2.25", "kivi 2b", "nova")
    assert program.named(rows_flag("learned 2.25,kivi 2b", "nova"), known) == list(known)
    assert program.items(rows_flag()) == program.items(rows_flag("")) == []
    with pytest.raises(TurboqError, match="--rows: 'nova,,kivi 2b' has an empty item"):
        program.items(rows_flag("nova,,kivi 2b"))
    with pytest.raises(TurboqError, match=r"--rows: 'kivi' is none of learned 2\.25, kivi 2b"):
        program.named(rows_flag("nova", "kivi"), known)


def test_only_chosen_rows_are_made(field_rows):
    """Of heads of 16 channels no GGML block can be made: those rows fail, the others do not."""
    made = field_rows.makers(model_geometry(load_model(MODEL, resident=False)), None)
    _, plan, _ = made["turboquant_mse 2b"]()
    assert plan.layers[0].k.codec.bits == 2
    with pytest.raises((TurboqError, ValueError), match="16"):
        made["q4_0 rotated"]()


def test_rows_with_as_many_exact_tokens_as_kivi_are_made_by_name(field_rows, monkeypatch):
    """By default none; the learned one is asked for with 31 recent tokens, TurboQuant made so."""
    geometry = model_geometry(load_model(MODEL, resident=False))
    made, asked = field_rows.makers(geometry, None), []
    rows = [f"{name} (31 recent exact)" for name in ("learned 2.25", "turboquant_mse 2b")]
    assert [name for name in made if name not in field_rows.usual(made)] == rows
    assert "kivi 2b" in field_rows.usual(made)
    name, plan, arrays = made[rows[1]]()
    assert name == rows[1]
    kivi = TokenPolicy(sinks=4), KiviKey(dim=16, bits=2, group=32)
    theirs = uniform_plan(geometry, k=kivi[1], v=TurboQuantMSE(dim=16, bits=2), policy=kivi[0])
    counts = [exact_tokens(one.kv_layers(arrays)) for one in (plan, theirs)]
    assert counts == [[4, 31], [4, 31]]

    def within(statistics, geometry, wanted, **options):
        asked.append(wanted)
        return SimpleNamespace(plan=plan, arrays={})

    monkeypatch.setattr(field_rows, "plan_within", within)
    assert made[rows[0]]() == (rows[0], plan, {})
    assert made["learned 2.25"]()[0] == "learned 2.25"
    assert [wanted.policy.recent for wanted in asked] == [31, 0]
    assert len({wanted.budget.text for wanted in asked}) == 1


def test_a_written_plan_keeps_what_its_row_says(field_rows, tmp_path):
    geometry = model_geometry(load_model(MODEL, resident=False))
    codec = TurboQuantMSE(dim=16, bits=2)
    save(uniform_plan(geometry, k=codec, v=codec, policy=field_rows.POLICY), {}, tmp_path)
    row = "learned 2.25 (31 recent exact)"
    made = field_rows.makers(geometry, None, [f"{row}={tmp_path},learned 2.25={tmp_path}"])
    assert made["learned 2.25"]()[1].tokens == field_rows.POLICY
    with pytest.raises(TurboqError, match=r"recent=0.* must be .*recent=31"):
        made[row]()


@pytest.mark.parametrize(
    ("program", "model", "flag", "says"),
    [
        ("long_context", "llama3", "--lengths=abc", "--lengths: 'abc' must be a number"),
        ("sliding_layers", "gemma3", "--apart=foo", "--apart: 'foo' is none of turboquant_mse 2b"),
    ],
)
def test_bad_input_is_one_line_before_statistics_are_read(program, model, flag, says):
    line = [sys.executable, str(EXPERIMENTS / f"{program}.py"), f"--model={MODEL.parent / model}"]
    line += ["--statistics=none", "--lengths=8", flag]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"{program}: error: {says}")
