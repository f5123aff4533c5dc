"""What programs of `experiments/` share; bad input to them is one line."""

from __future__ import annotations

import ast
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quality_cases
from absl import flags

import turboq
from turboq.cache.layer import TokenPolicy
from turboq.codecs import KiviKey, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import save, uniform_plan
from turboq_calibrate.measure.quality_table import read_quality
from turboq_calibrate.measure.storage_columns import exact_tokens
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.tasks.results import read_results, write_results

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


def test_a_command_names_no_folder_of_this_machine(program, monkeypatch):
    """Paths of the repository from its root, of others the name; labels, numbers and lists stay."""
    root = EXPERIMENTS.parent
    line = [
        str(EXPERIMENTS / "tasks.py"), f"--model={root / 'runs' / 'a'}", "--statistics=runs/b",
        "--text=/books/my novel.txt,topics:heldout,/books/two.txt", "--rows=kivi 2b",
        "--plan=learned 2.25=/plans/c", "--lengths=1024,4096", "--out", "/else/d", "--budgets=1.25",
        "--text=../texts/e.txt",
    ]  # fmt: skip
    monkeypatch.chdir(root)
    assert program.command(line) == (
        "python experiments/tasks.py --model=runs/a --statistics=runs/b "
        "'--text=my novel.txt,topics:heldout,two.txt' '--rows=kivi 2b' '--plan=learned 2.25=c' "
        "--lengths=1024,4096 --out d --budgets=1.25 --text=e.txt"
    )
    monkeypatch.chdir(EXPERIMENTS)
    assert program.command(["tasks.py", "--out=../runs/a"]) == (
        "python experiments/tasks.py --out=runs/a"
    )


def test_the_processor_is_named(program, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 2 GHz\nprocessor\t: 1\n")
    assert program.cpu(info) == "Some CPU: 2 GHz"
    assert program.cpu(tmp_path / "none") == platform.machine()


def test_results_say_how_they_were_made(program, tmp_path, monkeypatch):
    """And readers of strict files keep it."""
    monkeypatch.setattr(sys, "argv", [str(EXPERIMENTS / "tasks.py"), f"--out={tmp_path}"])
    made = program.provenance()
    assert made["command"] == f"python experiments/tasks.py --out={tmp_path.name}"
    assert datetime.date.fromisoformat(made["date"])
    assert made["cores"] == os.cpu_count()
    assert made["cpu"]
    assert made["versions"] == {
        "python": platform.python_version(), "turboq": turboq.__version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }  # fmt: skip
    program.write_quality(quality_cases.quality([quality_cases.row("a")]), tmp_path)
    assert read_quality(tmp_path).table["x-made"]["command"] == made["command"]
    write_results(quality_cases.task_results() | {program.MADE: made}, tmp_path)
    assert read_results(tmp_path)["x-made"] == made
    program.write_json(tmp_path / "new" / "a.json", {"rows": []})
    assert json.loads((tmp_path / "new" / "a.json").read_text()).keys() == {"rows", "x-made"}


def test_every_program_writes_how_its_result_was_made():
    """Of those with the shared main: no file of results but through what adds it."""
    programs = [p for p in EXPERIMENTS.glob("*.py") if "main(run, OUT)" in p.read_text()]
    assert len(programs) > 10
    for path in programs:
        tree = ast.parse(path.read_text())
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }
        assert called & {"write_json", "write_quality", "provenance"}, path.name
        assert "quality_table.write_quality" not in path.read_text(), path.name
        assert "atomic_write" not in called, path.name


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
