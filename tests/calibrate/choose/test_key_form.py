"""Keys asked for before RoPE, of models without any: refused by name; by default stored as is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from stat_cases import random_windows

from turboq.codecs import PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import head_plan, load, uniform_plan
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.cli import main as cli
from turboq_calibrate.fit.plan import fit_plan, make_plan
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import captured
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

GOLDEN = Path(__file__).parents[2] / "golden"
NONE = GOLDEN / "granite_hybrid"  # position_embedding_type null
SOME = GOLDEN / "smollm3"  # layer 3 of five has no rotary embedding
RECIPE = ObserveRecipe(skip=2, reservoir=40)
SAYS = "but keys of {} carry no rotary embedding .*leave --k_rope away, or --k_rope=after"
TURNED = ("before", "block:16")


def turboq(*argv) -> int:
    return cli.run([str(a) for a in argv])


def seen(model, out):
    return observe(model, random_windows(model.spec.vocab), out, RECIPE, progress=False)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return seen(load_model(NONE), tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return seen(load_model(SOME), tmp_path_factory.mktemp("some"))


@pytest.fixture(scope="module")
def as_captured(tmp_path_factory):
    """Keys of a model with rotary embeddings, as transformers hands them to attention."""
    return captured.observe_captured(
        GOLDEN / "captured", captured.source_of(GOLDEN / "llama3"),
        random_windows(320, count=3, length=12), tmp_path_factory.mktemp("captured"),
        ObserveRecipe(skip=2, windows_per_chunk=2, reservoir=20), log=lambda line: None,
    )  # fmt: skip


def chosen(statistics, geometry=None, **wanted):
    wanted = Wanted(budget=Budget.parse("4bpc"), candidates=("per_head:2,3",), **wanted)
    return plan_within(statistics, geometry or statistics.geometry, wanted, progress=False)


def test_what_an_engine_decides_is_not_asked_for():
    for own in ({"k_rope": "before"}, {"candidates": ("per_head:2,3",)}):
        with pytest.raises(ValueError, match=r"self\.engine='vllm' decides these"):
            Wanted(budget=Budget.parse("4bpc"), engine="vllm", **own)


def forms(plan) -> list[str]:
    return [layer.k.rope for layer in plan.layers]


@pytest.mark.parametrize("form", TURNED)
@pytest.mark.parametrize(
    "flags", [["--budget=3bpc"], ["--budget=2..4bpc"], ["--codec=turboquant_mse", "--bits=3"]]
)
def test_the_command_refuses_before_it_observes(form, flags, tmp_path, capsys):
    out = tmp_path / "new"
    words = ("plan", f"--model={NONE}", f"--k_rope={form}", f"--out={out}")
    assert turboq(*words, *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    said = "granite_hybrid carry no rotary embedding (captured keys are stored as they come): "
    assert f"k_rope: {form}, but keys of {said}leave --k_rope away, or --k_rope=after" in line
    assert not out.exists()


@pytest.mark.parametrize("form", TURNED)
def test_the_command_refuses_statistics_too(form, without, as_captured, tmp_path, capsys):
    for folder, name in ((without.folder, "granite_hybrid"), (as_captured.folder, "llama3")):
        words = ("plan", "--nocheck", f"--statistics={folder}", f"--k_rope={form}")
        assert turboq(*words, "--budget=4bpc", f"--out={tmp_path / 'new'}") == 1
        assert re.search(SAYS.format(name), capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_by_default_such_keys_are_stored_as_they_are(without, tmp_path):
    assert forms(chosen(without).plan) == forms(chosen(without, k_rope="after").plan) == ["after"]
    words = ("plan", "--nocheck", f"--statistics={without.folder}", "--candidates=per_head:2,3")
    for flags in ((), ("--k_rope=after",)):
        assert turboq(*words, *flags, "--budget=4bpc", f"--out={tmp_path}") == 0
        assert forms(load(tmp_path)[0]) == ["after"]
    assert turboq(*words, "--budget=3..3.5bpc", f"--out={tmp_path / 'ladder'}") == 0


@pytest.mark.parametrize("form", TURNED)
def test_every_way_in_python_refuses(form, without):
    geometry, codec = without.geometry, TurboQuantMSE(dim=16, bits=3)
    says = SAYS.format("granite_hybrid")
    for make in (
        lambda: chosen(without, k_rope=form),
        lambda: uniform_plan(geometry, k=codec, v=codec, k_rope=form),
        lambda: head_plan(geometry, lambda *place: codec, k_rope=form),
        lambda: make_plan(geometry, k=codec, v=codec, k_rope=form),
    ):
        with pytest.raises(TurboqError, match=says):
            make()


def test_some_layers_with_a_rotary_embedding_are_enough(some):
    found = chosen(some, k_rope="before").plan
    assert forms(found) == ["before"] * 3 + ["after", "before"]
    assert chosen(some).plan == found


@pytest.mark.parametrize("form", TURNED)
def test_captured_keys_stand_after_theirs(form, as_captured):
    """Also in a plan of the model itself, which knows how its keys turn."""
    geometry = model_geometry(load_model(GOLDEN / "llama3", resident=False))
    assert geometry.layers[0].turns_keys
    assert not as_captured.geometry.layers[0].turns_keys
    assert set(forms(chosen(as_captured, geometry).plan)) == {"after"}
    codec = PerHead(dim=16, bits=2)
    plan = uniform_plan(geometry, k=codec, v=codec, k_rope=form)
    for make in (
        lambda: chosen(as_captured, geometry, k_rope=form),
        lambda: fit_plan(plan, as_captured),
    ):
        with pytest.raises(TurboqError, match=SAYS.format("llama3")):
            make()
