"""Exports as files: report, atomicity, refusals, and the command."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from plan_cases import geometry, hybrid, random_fit

from turboq import files
from turboq.cache.layer import TokenPolicy
from turboq.codecs import (
    FP8,
    Exact,
    Ggml,
    Int8TokenHead,
    KiviKey,
    KiviValue,
    PerHead,
    TurboQuantMSE,
)
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, engine, export, summary, write
from turboq.export.base import Held, entries, matches, status_of
from turboq.export.report import PLAN_FOLDER, Kl, engine_plan, make_report
from turboq.export.same import canonical, same
from turboq.plan import Measurement, Quality, collect_arrays, head_plan, load, save, uniform_plan
from turboq_calibrate.cli import main as cli
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

MODEL = geometry(layers=3, kv_heads=2, k_dim=64, v_dim=64)
Q8 = Ggml(dim=64, type="q8_0", rotation="walsh", rotation_block=64)


def plan_of(k, v=None, **more):
    plan = uniform_plan(MODEL, k=k, v=v or k, **more)
    return plan, collect_arrays(plan, random_fit(MODEL))


def files_of(folder):
    """Everything below a folder: name -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_report_counts_bytes_and_drops(tmp_path):
    policy = TokenPolicy(sinks=4)
    plan, arrays = plan_of(TurboQuantMSE(dim=64, bits=4), Exact(dim=64), policy=policy)
    report = export(plan, arrays, ENGINES["llama.cpp"], tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert stored == json.loads(json.dumps(report.document()))
    assert stored["engine"] == "llama.cpp"
    assert stored["status"] == "approximated"
    assert stored["counts"] == {"exact": 6, "approximated": 6, "unsupported": 0}
    # q4_0 is 18 bytes per 32 channels, bfloat16 2 per channel; 3 layers of 2 heads.
    assert stored["engine_bytes_per_token"] == 3 * 2 * (36 + 128)
    assert stored["plan_bytes_per_token"] == 3 * 2 * (34 + 128)
    head = stored["layers"][1]["k"][1]
    assert (head["head"], head["plan_bits"], head["engine_bits"]) == (1, 272, 288)
    assert "codec turboquant_mse -> q4_0 rotated" in head["dropped"]
    assert stored["calibration"] == "nothing of the plan was fitted to data"
    assert stored["layers"][1]["v"][0]["dropped"] == []
    assert stored["tokens_dropped"] == ["first 4 tokens exact -> 0"]
    assert set(stored["files"]) == set(files_of(tmp_path / "out"))


def test_what_was_fitted_and_the_engine_drops_is_said(tmp_path):
    plan, arrays = plan_of(PerHead(dim=64, bits=4))
    said = {}
    for name in ("llama.cpp", "reader"):
        report = export(plan, arrays, ENGINES[name], tmp_path / name)
        said[name] = summary(report)
        assert f"{report.engine_versions}: {report.status}" in said[name]
        assert f"checked: {report.checked}" in said[name]
    assert "not run here" in summary(export(plan, arrays, ENGINES["sglang"], tmp_path / "sglang"))
    assert "calibration has no effect here" in said["llama.cpp"]
    assert "mean, codebook" in said["llama.cpp"]
    assert "quality: not known (--measure" in said["llama.cpp"]
    assert "calibration has no effect" not in said["reader"]
    assert "is stored as the plan has it" in said["reader"]


@pytest.mark.parametrize("name", ["llama.cpp", "ollama", "mlx-lm", "vllm"])
def test_size_and_quality_choose_alike_only_where_that_is_said(tmp_path, name):
    """Of 3.25 bits an engine whose smallest type has more keeps that one, whatever is preferred."""
    said = "--prefer=size: nothing of"
    for bits in (3, 7):
        plan = plan_of(PerHead(dim=64, bits=bits))
        found = {}
        for prefer in ("quality", "size"):
            out = tmp_path / f"{prefer}{bits}"
            found[prefer] = export(*plan, ENGINES[name], out, Options(prefer=prefer))
        quality, size = found["quality"], found["size"]
        over = size.engine_bytes_per_token > size.plan_bytes_per_token
        assert any(said in note for note in size.notes) == over
        assert said not in " ".join(quality.notes)
        assert size.engine_bytes_per_token <= quality.engine_bytes_per_token
    assert size.engine_bytes_per_token < quality.engine_bytes_per_token  # of 7.25 bits


def test_measured_quality_is_in_the_report(tmp_path):
    """Of the plan and of the engine's own plan; without its codecs there is nothing to measure."""
    plan, arrays = plan_of(TurboQuantMSE(dim=64, bits=4))
    seen = []

    def measure(ours, engine):
        seen.append([p.layers[0].k.codec.name for p, _ in (ours, engine)])
        return Kl(plan=0.25, source="x", change=0.5, how="here")

    report = export(plan, arrays, ENGINES["llama.cpp"], tmp_path / "out", measure=measure)
    assert seen == [["turboquant_mse", "ggml"]]
    assert (report.kl.plan, report.kl.change) == (0.25, 0.5)
    assert "quality: KL 0.2500 -> 0.7500 nats per token (here)" in summary(report)
    six, ik = plan_of(TurboQuantMSE(dim=64, bits=6)), ENGINES["ik_llama.cpp"]  # q6_0 is its own
    with pytest.raises(TurboqError, match=r"has no codec for what ik_llama\.cpp would store"):
        export(*six, ik, tmp_path / "ik", measure=measure)
    assert not (tmp_path / "ik").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: "{", "not JSON|JSON"),
        (lambda r: json.dumps([r]), "must be an object"),
        (lambda r: json.dumps(r | {"engine": ["llama.cpp"]}), "engine: .* must be a string"),
        (lambda r: json.dumps(r | {"plan_hash": None}), "plan_hash: .* must be a string"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "kl"}), "kl: missing"),
        (lambda r: json.dumps(r)[:-1] + ', "engine": "vllm"}', "engine"),  # given twice
    ],
)
def test_a_damaged_report_is_one_line_and_stays(tmp_path, change, message):
    pair, out = plan_of(Q8), tmp_path / "out"
    path = out / "export_report.json"
    export(*pair, ENGINES["llama.cpp"], out)
    path.write_text(change(json.loads(path.read_text())))
    before = files_of(tmp_path)
    with pytest.raises(TurboqError, match=message) as error:
        export(*pair, ENGINES["llama.cpp"], out)
    assert "choose another --out, or empty it" in str(error.value)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == before


def test_quality_is_never_invented(tmp_path):
    quality = Quality(measured=(Measurement(text="held out", kl_mean=0.25),))
    exact, nothing = plan_of(Int8TokenHead(dim=64), quality=quality), plan_of(Q8)
    reordered = plan_of(Q8, quality=quality)

    def kl(name, pair):
        folder = tmp_path / f"{name} {pair[0].layers[0].k.codec.name}"
        return export(*pair, ENGINES[name], folder).kl

    found = kl("vllm", exact)
    assert (found.plan, found.source, found.change) == (0.25, "held out", 0.0)
    found = kl("llama.cpp", exact)
    assert (found.plan, found.change) == (0.25, None)
    assert "turboq evaluate" in found.how
    # GGUF files of llama models permute K, so even the same codec has other values there.
    found = kl("llama.cpp", reordered)
    assert (found.plan, found.change) == (0.25, None)
    assert "order" in found.how
    assert (
        make_report(
            *nothing, ENGINES["ollama"], ENGINES["ollama"].project(*nothing, Options()), []
        ).kl.plan
        is None
    )


def test_engine_plan_is_what_the_engine_runs(tmp_path):
    plan, arrays = plan_of(TurboQuantMSE(dim=64, bits=4))
    export(plan, arrays, ENGINES["llama.cpp"], tmp_path / "out")
    runs, _ = load(tmp_path / "out" / PLAN_FOLDER)
    assert runs.layers[0].k.codec == dataclasses.replace(Q8, type="q4_0")
    assert runs.model == plan.model
    assert runs.tokens.sinks == 0
    assert runs.quality is None


def test_engine_plan_has_the_arrays_of_overridden_heads():
    def choose(layer, side, head):
        return FP8(dim=64, scale="head") if head else Exact(dim=64)

    plan = head_plan(MODEL, choose)
    arrays = collect_arrays(plan, random_fit(MODEL))
    found = engine_plan(plan, arrays, ENGINES["reader"].project(plan, arrays, Options()))
    assert found is not None
    assert found[1].keys() == arrays.keys()
    assert all(np.array_equal(found[1][name], arrays[name]) for name in arrays)


def test_an_earlier_export_of_the_same_plan_is_replaced(tmp_path):
    pair, out = plan_of(Q8), tmp_path / "out"
    export(*pair, ENGINES["llama.cpp"], out)
    first = files_of(out)
    (out / "stray").write_text("left over")
    export(*pair, ENGINES["llama.cpp"], out)
    assert files_of(out) == first
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("what", ["other plan", "other engine", "other files", "a file"])
def test_a_folder_with_something_else_is_refused(tmp_path, what):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("x")
    elif what == "other files":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        other = plan_of(Int8TokenHead(dim=64)) if what == "other plan" else plan_of(Q8)
        export(*other, ENGINES["ollama" if what == "other engine" else "llama.cpp"], out)
    before = files_of(tmp_path)
    with pytest.raises(TurboqError, match="choose another --out"):
        export(*plan_of(Q8), ENGINES["llama.cpp"], out)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("again", [False, True])
def test_a_write_that_fails_leaves_nothing_or_the_earlier_export(tmp_path, monkeypatch, again):
    pair, out = plan_of(Q8), tmp_path / "out"
    if again:
        export(*pair, ENGINES["lmstudio"], out)
    before = files_of(tmp_path)

    def full(*arguments):
        raise TurboqError("cannot write: No space left on device")

    monkeypatch.setattr(write, "save", full)
    with pytest.raises(TurboqError, match="No space"):
        export(*pair, ENGINES["lmstudio"], out)
    assert files_of(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if again else [])


def without_renameat2(monkeypatch):
    """A system that has no call to exchange two folders."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())


def test_an_export_is_replaced_on_any_system(tmp_path, monkeypatch):
    without_renameat2(monkeypatch)
    pair, out = plan_of(Q8), tmp_path / "out"
    export(*pair, ENGINES["llama.cpp"], out)
    first = files_of(out)
    (out / "stray").write_text("left over")
    export(*pair, ENGINES["llama.cpp"], out)
    assert files_of(out) == first
    assert os.listdir(tmp_path) == ["out"]


def test_a_swap_that_fails_puts_the_earlier_export_back(tmp_path, monkeypatch):
    without_renameat2(monkeypatch)
    pair, out = plan_of(Q8), tmp_path / "out"
    export(*pair, ENGINES["lmstudio"], out)
    before, replace = files_of(tmp_path), os.replace

    def failing(source, target):
        if str(target) == str(out) and "old" not in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(TurboqError, match="No space"):
        export(*pair, ENGINES["lmstudio"], out)
    assert files_of(tmp_path) == before


def test_unknown_engines_name_the_nearest():
    with pytest.raises(TurboqError, match=r"did you mean vllm\?.*llama\.cpp"):
        engine("vlm")


@pytest.mark.parametrize(
    ("name", "codec", "says"),
    [
        ("ort-genai", TurboQuantMSE(dim=64, bits=4), "per_channel"),
        ("modelopt", Int8TokenHead(dim=64), "static ranges"),
        ("qwix", TurboQuantMSE(dim=64, bits=4), "a QArray cannot hold"),
        ("sglang", KiviKey(dim=64, bits=4), None),
    ],
)
def test_plans_that_an_engine_cannot_hold(name, codec, says, tmp_path):
    pair = plan_of(codec, KiviValue(dim=64, bits=4) if isinstance(codec, KiviKey) else None)
    if says is None:
        assert export(*pair, ENGINES[name], tmp_path / "out").status == "approximated"
        return
    with pytest.raises(TurboqError, match=says):
        export(*pair, ENGINES[name], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_engine_that_would_quantize_nothing_is_refused(tmp_path):
    model = geometry(layers=2, kv_heads=1, k_dim=80, v_dim=80)
    plan = uniform_plan(model, k=TurboQuantMSE(dim=80, bits=4), v=TurboQuantMSE(dim=80, bits=4))
    with pytest.raises(TurboqError, match="head dim 80 is no multiple of ggml's blocks of 32"):
        export(plan, {}, ENGINES["llama.cpp"], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_status():
    plan, arrays = plan_of(FP8(dim=64, scale="head"))
    entry = entries(plan, arrays)[0]
    other = {"scale": np.asarray(entry.arrays["scale"] * np.float32(2))}
    tensor = FP8(dim=64, scale="tensor")
    assert status_of(entry, Held(format="", codec=tensor, arrays=entry.arrays)) == "exact"
    assert status_of(entry, Held(format="", codec=tensor, arrays=other)) == "approximated"
    plain = Held(format="", codec=Exact(dim=64))
    assert status_of(entry, plain) == "approximated"
    assert status_of(entry, dataclasses.replace(plain, reduced=False)) == "unsupported"


def test_equal_codecs_of_different_descriptions():
    f16 = Ggml(dim=64, type="f16")
    assert same(f16, {}, Exact(dim=64, dtype="float16"), {})
    assert not same(dataclasses.replace(f16, rotation="walsh"), {}, f16, {})
    assert canonical(Q8) == canonical(dataclasses.replace(Q8, rotation_block=0, seed=5))
    assert canonical(Q8) != canonical(dataclasses.replace(Q8, rotation="hadamard"))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_what_it_is_and_survives_odd_models(name):
    found = ENGINES[name]
    assert found.name == name
    assert found.title
    assert found.versions
    if found.name != "reader":  # turboq's own
        assert re.search(r"\d+\.\d+\.\d+|\b[0-9a-f]{8,9}\b|(commit|version) not rec", found.checked)
        assert re.search(r"2026-11-\d\d|November 2026", found.checked)
    # Those that docs/how-to/engine.md names under "What was run", and our own.
    ran = name in ("transformers", "ort-genai", "mlx-lm", "qwix", "llama.cpp", "reader")
    assert found.said == found.checked + "; the engine itself not run here" * (not ran)
    model = hybrid()  # head dims 16, 24 and 8, a window, a layer without a cache, a borrower
    plan = uniform_plan(model, k=Exact(dim=16), v=Exact(dim=8))
    try:
        report = make_report(plan, {}, found, found.project(plan, {}, Options()), [])
    except TurboqError:
        return
    assert report.counts["unsupported"] == 0
    assert [layer.index for layer in report.layers] == [0, 2]


def turboq(*arguments):
    return cli.run([str(a) for a in arguments])


def test_command(tmp_path, capsys):
    plan, arrays = plan_of(Q8)
    save(plan, arrays, tmp_path / "plan")
    out = tmp_path / "out"
    command = ("export", "--engine=llama.cpp", f"--plan={tmp_path}/plan", f"--out={out}")
    assert turboq(*command) == 0
    printed = capsys.readouterr().out
    assert "llama-server -m MODEL.gguf -ctk q8_0 -ctv q8_0 -fa on" in printed
    assert (out / "export_report.json").is_file()
    assert turboq("export", "--engine=list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ENGINES)
    assert turboq("export", "--engine=vlm", f"--plan={tmp_path}/plan", "--out=x") == 1
    assert "did you mean vllm?" in capsys.readouterr().err
    assert turboq("export", "--engine=vllm", f"--plan={tmp_path}/plan") == 1
    assert "--out" in capsys.readouterr().err
    assert turboq("export", "--engine=vllm", "--plan=nowhere", f"--out={out}") == 1
    assert "nowhere" in capsys.readouterr().err


def test_command_checks_the_checkpoint(tmp_path, capsys):
    source = Path(__file__).resolve().parents[2] / "golden" / "llama3"
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    model = model_geometry(load_model(str(folder), resident=False))
    plan = uniform_plan(model, k=FP8(dim=16, scale="head"), v=FP8(dim=16, scale="head"))
    save(plan, collect_arrays(plan, random_fit(model)), tmp_path / "plan")
    start = ("export", "--engine=vllm", f"--plan={tmp_path}/plan", f"--checkpoint={folder}")
    assert turboq(*start, f"--out={tmp_path}/out") == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert turboq(*start, f"--out={tmp_path}/other") == 1
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_command_exports_to_its_own_overlay_again(tmp_path, capsys):
    """Of a checkpoint with a quantization_config only the geometry is compared with the plan."""
    source = Path(__file__).resolve().parents[2] / "golden" / "llama3"
    model = model_geometry(load_model(str(source), resident=False))
    plan = uniform_plan(model, k=FP8(dim=16, scale="head"), v=FP8(dim=16, scale="head"))
    save(plan, collect_arrays(plan, random_fit(model)), tmp_path / "plan")
    start = ("export", "--engine=vllm", f"--plan={tmp_path}/plan")
    assert turboq(*start, f"--checkpoint={source}", f"--out={tmp_path}/out") == 0
    overlay = tmp_path / "overlay"
    shutil.copytree(source, overlay)
    shutil.copytree(tmp_path / "out", overlay, dirs_exist_ok=True)
    assert turboq("inspect", overlay) == 0
    capsys.readouterr()
    assert turboq(*start, f"--checkpoint={overlay}", f"--out={tmp_path}/again") == 0
    assert "only its geometry is compared" in capsys.readouterr().out
    first, again = (
        json.loads((f / "config.json").read_text()) for f in (overlay, tmp_path / "again")
    )
    assert first == again
    scales = [f / "kv_scales.safetensors" for f in (overlay, tmp_path / "again")]
    assert scales[0].read_bytes() == scales[1].read_bytes()


def test_options_that_mean_nothing_to_an_engine_are_refused(tmp_path):
    for option in ({"tensor_parallel": 2}, {"rope_envelope": True}, {"checkpoint": tmp_path}):
        with pytest.raises(TurboqError, match="means nothing to ollama"):
            export(*plan_of(Q8), ENGINES["ollama"], tmp_path / "out", Options(**option))
    with pytest.raises(TurboqError, match="dtype='int8'"):
        Options(dtype="int8")
    with pytest.raises(TurboqError, match="prefer='speed'"):
        Options(prefer="speed")
    with pytest.raises(TurboqError, match="tensor_parallel=0"):
        Options(tensor_parallel=0)


def test_formats_match_in_fields_that_came_later_too():
    """Or a fitted mean would be dropped by an engine that has the plain codec."""
    plain = TurboQuantMSE(dim=64, bits=4)
    (rule,) = matches((plain,))
    assert rule(plain)
    assert not rule(dataclasses.replace(plain, mean=True))
