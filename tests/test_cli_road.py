"""The whole road through the command, on a tiny checkpoint: calibrate to report, and bad input."""

import json
import shutil
from pathlib import Path

import pytest
from quality_cases import task_results

from turboq.plan import load
from turboq_calibrate.cli import main as cli
from turboq_calibrate.tasks.results import write_results

MODEL = Path(__file__).parent / "golden" / "llama3"
SMALL = ("--windows=3", "--window_length=48")
CALIBRATE = (*SMALL, "--text=topics:calibration")


def turboq(*argv) -> int:
    return cli.run([str(a) for a in argv])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run folder."""
    out = tmp_path_factory.mktemp("road") / "run"
    model = f"--model={MODEL}"
    assert turboq("calibrate", model, *CALIBRATE, "--chunk_windows=2", f"--out={out}") == 0
    assert (
        turboq("plan", model, f"--statistics={out}", "--k_bits=3", "--v_bits=2", f"--out={out}")
        == 0
    )
    baselines = "--baselines=exact,turboquant_mse:3"
    assert turboq("evaluate", model, f"--plan=mine={out}", baselines, *SMALL, f"--out={out}") == 0
    assert turboq("report", f"--run={out}") == 0
    return out


def test_plan_is_what_the_flags_said(run):
    plan, arrays = load(run)
    assert len(plan.layers) == 2
    for layer in plan.layers:
        assert (layer.k.codec.name, layer.k.codec.config()["bits"]) == ("per_head", 3)
        assert (layer.v.codec.name, layer.v.codec.config()["bits"]) == ("per_head", 2)
    assert plan.tokens.sinks == 4
    assert plan.provenance is not None
    assert plan.provenance.tokens == 3 * 48
    assert plan.provenance.texts[0].name == "topics:calibration"
    assert arrays["layers.1.v.codebook"].shape == (2, 4)


def test_quality_and_report(run):
    table = json.loads((run / "quality.json").read_text())
    assert table["schema"] == 2
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["exact", "turboquant_mse 3b", "mine"]
    # 2 layers * 2 heads * D=16: codes, and a 16-bit scale per vector of K and of V.
    assert rows["mine"]["bytes_per_token"] == 2 * 2 * (16 * (3 + 2) + 2 * 16) / 8
    assert rows["exact"]["kl_mean"] < rows["turboquant_mse 3b"]["kl_mean"]
    command = json.loads((run / "run.json").read_text())["command"].split()
    assert command[:2] == ["turboq", "evaluate"]
    assert {f"--plan=mine={run}", "--windows=3", f"--out={run}"} <= set(command)
    assert (run / "report.html").stat().st_size > 1000
    assert not (run / "unfinished").exists()


def test_a_second_evaluation_writes_the_same_bytes(run, tmp_path):
    baselines = "--baselines=exact,turboquant_mse:3"
    args = (f"--model={MODEL}", f"--plan=mine={run}", baselines, *SMALL, f"--out={tmp_path}")
    assert turboq("evaluate", *args) == 0
    assert (tmp_path / "quality.json").read_bytes() == (run / "quality.json").read_bytes()


def test_a_baseline_is_fitted_and_a_list_is_a_list(run, tmp_path):
    """A fitted baseline is the plan that `turboq plan` fits; plans are separated by commas."""
    plans = f"--plan=mine={run},again={run / 'plan.json'}"
    baseline = ("--baselines=per_head:3/per_head:2", f"--statistics={run}")
    args = (f"--model={MODEL}", plans, *baseline, *SMALL, f"--out={tmp_path}")
    assert turboq("evaluate", *args) == 0
    rows = {r["name"]: r for r in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    assert list(rows) == ["per_head 3b/per_head 2b", "mine", "again"]
    assert len({row["kl_mean"] for row in rows.values()}) == 1


def test_an_export_is_measured_before_it_is_written(run, tmp_path, capsys):
    """The report's KL are those of `turboq evaluate` on the plan and on the engine's own."""
    out, model = tmp_path / "vllm", f"--model={MODEL}"
    export = ("export", "--engine=vllm", f"--plan={run}", f"--out={out}")
    assert turboq(*export, "--windows=3") == 1
    assert "--windows: needs --measure" in capsys.readouterr().err
    assert turboq(*export, "--measure", model, *SMALL) == 0
    kl = json.loads((out / "export_report.json").read_text())["kl"]
    plans = f"--plan=plan={run},engine={out / 'engine_plan'}"
    assert turboq("evaluate", model, plans, *SMALL, f"--out={tmp_path / 'q'}") == 0
    rows = json.loads((tmp_path / "q" / "quality.json").read_text())["rows"]
    assert kl["plan"] == rows[0]["kl_mean"]
    assert kl["plan"] + kl["change"] == pytest.approx(rows[1]["kl_mean"])
    assert kl["source"] == "topics:heldout"


def test_every_text_is_measured_by_itself(run, tmp_path, capsys):
    """Plans by texts; a text's rows are those of a run with that text alone."""
    (tmp_path / "long.txt").write_text(" ".join(f"{n} squared is {n * n}." for n in range(400)))
    texts = {
        "long.txt": f"--text={tmp_path / 'long.txt'}",
        "topics:heldout": "--text=topics:heldout",
    }
    args = (f"--model={MODEL}", f"--plan=mine={run}", "--windows=2", "--window_length=48")
    assert turboq("evaluate", *args, *texts.values(), f"--out={tmp_path / 'both'}") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["plan", "bits/ch"]
    assert printed[1].split()[-2:] == list(texts)
    assert printed[3].count("*") == 1
    both = json.loads((tmp_path / "both" / "quality.json").read_text())
    for source, text in texts.items():
        assert turboq("evaluate", *args, text, f"--out={tmp_path / 'one'}") == 0
        one = json.loads((tmp_path / "one" / "quality.json").read_text())
        assert [row for row in both["rows"] if row["text"] == source] == one["rows"]
        assert [t for t in both["texts"] if t["text"] == source] == one["texts"]
        assert both["head_errors"][source] == one["head_errors"][source]
    assert turboq("report", f"--run={tmp_path / 'both'}") == 0


def test_lengths_and_tasks(run, tmp_path, capsys):
    """Every length is a text of its own, the same as with --window_length; tasks are drawn too."""
    args = (f"--model={MODEL}", f"--plan=mine={run}", "--windows=2", f"--out={tmp_path}")
    assert turboq("evaluate", *args, "--window_length=48", "--steps=3") == 0
    (alone,) = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert alone["steps"]["positions"] == 2 * 3
    assert turboq("evaluate", *args, "--lengths=32", "--lengths=48", "--steps=3") == 0
    table = json.loads((tmp_path / "quality.json").read_text())
    assert [t["window_tokens"] for t in table["texts"]] == [32, 48]
    assert table["rows"][1] == alone | {"text": "topics:heldout at 48"}
    tasks = ("--tasks=arithmetic,common_words", "--lengths=256", "--samples=2")
    assert turboq("tasks", *args[:2], *tasks, f"--out={tmp_path}") == 0
    assert (
        "counted for nothing: arithmetic (3 needed), common_words (3 needed)"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "unfinished").exists()
    assert turboq("report", f"--run={tmp_path}") == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>Tasks</h2>") == page.count("<h2>Quality</h2>") == 1
    (tmp_path / "quality.json").unlink()
    assert turboq("report", f"--run={tmp_path}") == 0
    assert "<h2>Quality</h2>" not in (tmp_path / "report.html").read_text()


def test_inspect_tells_kinds_apart(run, capsys):
    assert turboq("inspect", run, MODEL, MODEL / "model.gguf", run / "plan.json") == 0
    text = capsys.readouterr().out
    assert f"{run}: plan" in text
    assert f"{run}: statistics" in text
    assert f"{MODEL}: model" in text
    assert f"{MODEL}/model.gguf: model" in text
    assert text.count(": plan\n") == 2
    assert f"{run}: evaluation of 3 plans" in text


def test_inspect_says_what_commands_wrote(run, tmp_path, capsys):
    """Each by its folder and by its file, a configuration whatever it is called."""
    out = tmp_path / "out"
    assert turboq("export", "--engine=reader", f"--plan={run}", f"--out={out}") == 0
    write_results(task_results(), tmp_path)
    shutil.copy(MODEL / "config.json", tmp_path / "mine.json")
    capsys.readouterr()
    for paths, says in (
        ((run / "quality.json",), [f"evaluation of 3 plans, model {MODEL.name}", "mine: KL 0."]),
        ((tmp_path, tmp_path / "tasks.json"), ["results of 2 tasks", "needle", "turboq report"]),
        ((out, out / "export_report.json"), ["export of", "in the plan sha256:", "readers"]),
        ((MODEL / "config.json",), [f"{MODEL}: model", "layers: 2"]),
        ((tmp_path / "mine.json",), ["mine.json: model", "a configuration by itself"]),
    ):
        for path in paths:
            assert turboq("inspect", path) == 0
            found = capsys.readouterr().out
            assert all(words in found for words in says), found


def test_inspect_finds_damage(run, tmp_path, capsys):
    shutil.copytree(run / "statistics", tmp_path / "statistics")
    file = tmp_path / "statistics" / "layer_001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert turboq("inspect", tmp_path) == 1
    assert "layer_001.safetensors is damaged" in capsys.readouterr().err


def test_memory_of_a_plan_and_of_a_codec_agree(run, capsys):
    flags = ("--context=1024", "--memory_gib=0.001", "--format=json")
    assert turboq("memory", f"--plan={run}", *flags) == 0
    of_plan = json.loads(capsys.readouterr().out)
    codec = ("--codec=per_head", "--k_bits=3", "--v_bits=2", "--sinks=4")
    assert turboq("memory", f"--model={MODEL}", *codec, *flags) == 0
    of_codec = json.loads(capsys.readouterr().out)
    for found in (of_plan, of_codec):
        del found["geometry"]  # where it is from, and the model's context, which no plan knows
    assert of_codec == of_plan
    assert of_plan["bytes_per_token"] == 56
    exact_sinks = 4 * 2 * 2 * 16 * 2 * 2  # tokens, layers, heads, D, K and V, bfloat16
    assert of_plan["kv_bytes"] == 1024 * 56 + exact_sinks
    assert of_plan["max_context"] % 256 == 0


def test_memory_needs_a_geometry_not_weights(capsys):
    assert turboq("memory", f"--model={MODEL}", "--context=32768", "--format=json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_token"] == 2 * 2 * 16 * 2 * 2
    assert found["kv_bytes"] == 32768 * 256


def test_dry_run_does_not_let_the_model_write(tmp_path, capsys):
    flags = ("--text=self:3,topics:calibration", f"--out={tmp_path / 'new'}", "--dry_run")
    assert turboq("calibrate", f"--model={MODEL}", *SMALL, *flags) == 1
    assert "name another text than self:3" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "new"
    for flags in (CALIBRATE, SMALL):  # by default the model would write a part of the text
        assert turboq("calibrate", f"--model={MODEL}", *flags, f"--out={out}", "--dry_run") == 0
        assert "memory:" in capsys.readouterr().out
        assert not out.exists()


def test_calibrate_refuses_other_inputs_field_by_field(run, capsys):
    before = (run / "statistics" / "manifest.json").read_bytes()
    flags = (*CALIBRATE, "--chunk_windows=2", "--skip=5", f"--out={run}")
    assert turboq("calibrate", f"--model={MODEL}", *flags) == 1
    assert "recipe.skip: there 4, now 5" in capsys.readouterr().err
    assert (run / "statistics" / "manifest.json").read_bytes() == before


NEW = "--out={tmp}/new"
HERE = f"--model={MODEL}"
EXACT = (HERE, "--baselines=exact")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["calibrate", "--model={tmp}/absent", NEW], "absent does not exist"),
        (["calibrate", "--model={tmp}", NEW], "config.json"),
        (["calibrate", "--model={tmp}/cut.gguf", NEW], "cut.gguf"),
        (["calibrate", HERE, "--text={tmp}/empty", *SMALL, NEW], "is empty"),
        (["calibrate", HERE, "--text={tmp}/binary", *SMALL, NEW], "binary"),
        (["calibrate", HERE, "--text={tmp}/short", *SMALL, NEW], "less than one window"),
        (["calibrate", HERE, "--window_length=257", NEW], "257 tokens exceed the model's context"),
        (["calibrate", HERE, "--window_length=257", "--text=self:3", NEW], "context of 256"),
        (["plan", HERE, "--budget=3bpc", "--window_length=257", NEW], "context of 256"),
        (["calibrate", HERE, *CALIBRATE, "--out={tmp}/short"], "short is a file"),
        (["calibrate", HERE, *CALIBRATE, f"--observe_seed={2**40}", NEW], "seed="),
        (["plan", HERE, "--bits=3", NEW], "give --statistics"),
        (["plan", HERE, "--codec=per_heat", "--bits=3", NEW], "did you mean per_head"),
        (["plan", HERE, "--codec=turboquant_mse", NEW], "needs bits: turboquant_mse:3"),
        (["plan", HERE, "--codec=exact", "--bits=3", NEW], "--bits is not a field of codec exact"),
        (["plan", HERE, "--codec=exact", "--v_bits=3", NEW], "codec exact has no bits"),
        (["plan", HERE, "--codec=exact", "--dtype=int3", NEW], "int3"),
        (["plan", HERE, "--statistics={tmp}", "--bits=3", NEW], "no finished statistics"),
        (["evaluate", HERE, NEW], "nothing to evaluate"),
        (["evaluate", HERE, "--plan={tmp}", NEW], "plan.json"),
        (["evaluate", HERE, "--baselines=exact:b", NEW], "dtype='b'"),
        (["evaluate", HERE, "--baselines=exact", "--window_length=999", NEW], "context"),
        (["evaluate", *EXACT, "--lengths=24,999", NEW], "of 999 tokens exceed the model's context"),
        (["evaluate", *EXACT, "--lengths=24,two", NEW], "--lengths: 'two' must be a number"),
        (["evaluate", *EXACT, "--lengths=24,24", NEW], "given once"),
        (["evaluate", *EXACT, "--lengths=24", "--lengths=24", NEW], "given once"),
        (["evaluate", *EXACT, "--lengths=24 48", NEW], "--lengths: '24 48' is no path: of several"),
        (["evaluate", HERE, "--plan=tq3 learned", NEW], "commas stand between: tq3,learned"),
        (["evaluate", *EXACT, "--text=a.txt b.txt", NEW], "commas stand between: a.txt,b.txt"),
        (["evaluate", *EXACT, *SMALL, "--steps=48", NEW], "steps=48 must be less than the 48"),
        (["tasks", HERE, "--lengths=200", NEW], "nothing to evaluate"),
        (["tasks", *EXACT, "--tasks=needles", NEW], "unknown task 'needles': known are all"),
        (["tasks", *EXACT, "--lengths=999", NEW], "of 999 tokens exceed the model's context"),
        (["tasks", *EXACT, "--lengths=200", "--depths=x", NEW], "--depths: 'x' must be a number"),
        (
            ["tasks", *EXACT, "--lengths=200", "--depths=2", NEW],
            "--depths: '2' must be a number from 0 to 1",
        ),
        (["tasks", *EXACT, "--lengths=200", "--depths=", NEW], "--depths is empty"),
        (["tasks", *EXACT, "--lengths=", NEW], "--lengths is empty"),
        (
            ["plan", "--model={tmp}/absent", "--budget=3bpc", "--engine=nope", NEW],
            "unknown engine 'nope'",
        ),
        (["tasks", *EXACT, "--lengths=200", NEW], "its shortest prompt is"),
        (["report", "--run={tmp}"], "quality.json"),
        (["inspect", "{tmp}"], "is no plan"),
        (["inspect"], "name a path"),
        (["memory"], "give either --plan, or --model"),
        (["memory", HERE, "--plan=x"], "give either --plan, or --model"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(argv, says, tmp_path, capsys):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"a\0b" * 100)
    (tmp_path / "short").write_text("a few words")
    (tmp_path / "cut.gguf").write_bytes((MODEL / "model.gguf").read_bytes()[:900])
    assert turboq(*(a.format(tmp=tmp_path) for a in argv)) == 1
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("turboq: error: ")]) == 1, err
    assert says in err[-1]
    assert "Traceback" not in "".join(err)
    assert not (tmp_path / "new" / "plan.json").exists()


def test_statistics_of_another_model_are_refused(run, tmp_path, capsys):
    other = f"--model={MODEL.parent / 'qwen2'}"
    flags = (f"--statistics={run}", "--bits=3", f"--out={tmp_path}/new")
    assert turboq("plan", other, *flags) == 1
    err = capsys.readouterr().err
    assert "are of another model" in err
    assert "--model=..." in err
    measured = ("export", "--engine=vllm", f"--plan={run}", "--measure", *SMALL)
    for command in (("evaluate", f"--plan={run}", *SMALL), measured):
        assert turboq(*command, other, f"--out={tmp_path}/new") == 1
        err = capsys.readouterr().err
        assert "the plan is for another model" in err
        assert "--model=..." in err
