"""Codecs, engines and tasks of another package: `experiments/my_codecs`, as if it was installed."""

import dataclasses
import importlib
import json
import shutil
import sys
import tomllib
import warnings
from pathlib import Path

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from plan_cases import geometry
from tolerances import TOL

from turboq.codecs import CODECS, Codec, Exact, from_config
from turboq.codecs.observed import Observed
from turboq.conformance.__main__ import main as conformance
from turboq.errors import TurboqError, TurboqWarning
from turboq.export import ENGINES, engine, export
from turboq.plan import PlanError, collect_arrays, load, save, schema, uniform_plan
from turboq_calibrate import evaluate, load_model, model_geometry
from turboq_calibrate.tasks import TASKS, tasks_of
from turboq_calibrate.tasks.examples import examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "experiments" / "my_codecs"
MODEL = ROOT / "tests" / "golden" / "llama3"
D = 16


def install(folder: Path, name: str, source: str, points: dict[str, dict[str, str]]) -> None:
    """What `pip install` leaves behind: a module, its name and version, and entry points."""
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (folder / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [
        line
        for group, entries in points.items()
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder that packages are installed to; both registries as in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (CODECS, ENGINES, TASKS):
        ours = {name: x for name, x in registry._found.items() if "." not in name}
        monkeypatch.setattr(registry, "_found", ours)
        monkeypatch.setattr(registry, "_failed", {})
        monkeypatch.setattr(registry, "_loaded", False)
    yield tmp_path
    for name in ("my_codecs", "my_tasks", "broken", "impostor"):
        sys.modules.pop(name, None)


@pytest.fixture
def sign(fresh) -> type[Codec]:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    source = (EXAMPLE / "my_codecs.py").read_text()
    install(fresh, "my_codecs", source, project["entry-points"])
    shutil.copy(EXAMPLE / "my_tasks.py", fresh)
    return CODECS["my_codecs.sign"]


def fitted(model, codec):
    seen = Observed.of(np.random.default_rng(3).normal(1, 2, (2, 512, D)).astype(np.float32))
    plan = uniform_plan(model, k=codec, v=codec)
    return plan, collect_arrays(plan, lambda layer, side, codec: codec.fit(seen))


def test_the_example_is_short():
    source = (EXAMPLE / "my_codecs.py").read_text()
    body = source[source.index("@dataclasses") : source.index("class MeanBits")]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 30


def test_the_codec_is_its_formula(sign, rng):
    """x = 3 + s * (+-1) in the rotated coordinates comes back; a sign and a float16 are stored."""
    codec = sign(dim=D)
    assert codec.bits_per_channel == 1 + 16 / D
    y = np.where(rng.random((5, D)) < 0.5, -2.0, 2.0).astype(np.float32)
    mean = jnp.full(D, 3.0)
    x = codec.backward({}, jnp.asarray(y)) + mean[None]
    found = codec.decode({"mean": mean}, codec.encode({"mean": mean}, x))
    np.testing.assert_allclose(found, x, atol=TOL["rotate_f32"])


def test_from_plan_to_quality_and_cache(sign, fresh):
    """Saved, validated, loaded, measured both ways: in one pass and from the packed cache."""
    model = load_model(MODEL)
    plan, arrays = fitted(model_geometry(model), sign(dim=D))
    save(plan, arrays, fresh / "plan")
    text = json.loads((fresh / "plan" / "plan.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(text)
    for wrong in ({"seed": "0"}, {"bits": 3}):
        broken = json.loads(json.dumps(text))
        broken["layers"][0]["k"] |= wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema()).validate(broken)
    loaded = load(fresh / "plan")
    assert loaded[0].layers == plan.layers
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab, (1, 24)).astype(np.int32)
    rows = [
        evaluate(model, [("sign", *loaded)], tokens, text="x", attention=how, progress=False).rows
        for how in ("simulated", "packed")
    ]
    assert rows[0][0]["codec"] == "my_codecs.sign"
    assert rows[0][0]["kl_mean"] == pytest.approx(rows[1][0]["kl_mean"], abs=TOL["kl_packed"])
    assert rows[0][0]["kl_mean"] > 0


def test_conformance_by_name(sign, capsys):
    assert conformance(["--codec=my_codecs.sign", "--vectors=512"]) == 0
    assert "my_codecs.sign D=128" in capsys.readouterr().out
    assert conformance(["--codec=my_codecs.sigh"]) == 2
    assert "package my_codecs 0.1 has no 'my_codecs.sigh'" in capsys.readouterr().err


def test_engine(sign, fresh):
    plan, arrays = fitted(geometry(layers=2, kv_heads=2, k_dim=D, v_dim=D), sign(dim=D))
    report = export(plan, arrays, engine("my_codecs.mean_bits"), fresh / "out")
    assert report.status == "exact"
    assert report.flags == (f"engine --bits={2 * 2 * 2 * (D + 16)}",)


def test_task(sign, fresh):
    """By name only: what a package adds must not change what "all" averages."""
    (task,) = tasks_of(["my_codecs.birthday"])
    assert "my_codecs.birthday" in list(TASKS)
    assert task not in tasks_of(["all"])
    found = examples(
        task, load_model(MODEL, resident=False).tokenizer, length=200, count=2, depths=[0.0, 1.0],
        room=16,
    )  # fmt: skip
    assert [e.task for e in found] == ["my_codecs.birthday"] * 2
    assert all(len(e.answers) == 4 and e.length <= 200 for e in found)
    with pytest.raises(TurboqError, match=r"my_codecs 0\.1 has no 'my_codecs\.birthdays'"):
        tasks_of(["my_codecs.birthdays"])
    with pytest.raises(TurboqError, match=r"must be a turboq_calibrate\.tasks\.Task"):
        TASKS.register("birthday")


def test_a_plan_of_a_codec_that_is_not_installed_names_the_package(sign, fresh, monkeypatch):
    save(*fitted(geometry(layers=1, kv_heads=2, k_dim=D, v_dim=D), sign(dim=D)), fresh / "plan")
    shutil.rmtree(fresh / "my_codecs-0.1.dist-info")
    importlib.invalidate_caches()
    monkeypatch.setattr(CODECS, "_found", {"exact": Exact})
    monkeypatch.setattr(CODECS, "_loaded", False)
    with pytest.raises(PlanError, match=r"k\.codec: .*install it \(pip install my-codecs\)"):
        load(fresh / "plan")
    with pytest.raises(TurboqError, match="of package nobody: install it"):
        engine("nobody.engine")


@pytest.mark.parametrize(
    ("name", "source", "point", "why"),
    [
        (
            "broken",
            "import nothing_here",
            '"broken.x" = broken:X',
            "No module named 'nothing_here'",
        ),
        ("broken", "1 / 0", "broken.x = broken:X", "ZeroDivisionError"),
        ("broken", "class X: name = 'broken.x'", "broken.x = broken:X", "must be a class on"),
        (
            "impostor",
            "from turboq.codecs import Exact\nclass X(Exact): name = 'exact'",
            "exact = impostor:X",
            "must be impostor.NAME",
        ),
    ],
)
def test_a_package_that_fails_is_named_and_left_out(fresh, name, source, point, why):
    left, _, right = point.partition(" = ")
    install(fresh, name, source, {"turboq.codecs": {left.strip('"'): right}})
    with pytest.warns(TurboqWarning, match=f"package {name}: .*left out.*") as said:
        names = list(CODECS)
    assert why in str(said[0].message)
    assert CODECS["exact"] is Exact
    assert not any("." in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TurboqError, match=f"of package {name}, which failed: "):
            from_config({"codec": f"{name}.x", "dim": 64})


def test_a_class_registers_itself(fresh):
    @CODECS.register
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Half(Exact):
        name = "here.half"

    assert from_config({"codec": "here.half", "dim": 64}) == Half(dim=64)
    for wrong, says in ((type("B", (Exact,), {"name": "half"}), "PACKAGE.NAME"), (3, "class on")):
        with pytest.raises(TurboqError, match=says):
            CODECS.register(wrong)
    other = type("Other", (Exact,), {"name": "here.half"})
    with pytest.raises(TurboqError, match="registered already"):
        CODECS.register(other)
