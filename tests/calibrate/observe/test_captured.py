"""Statistics of what transformers captured (tests/golden/captured) against turboq's own pass."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as st_numpy
from stat_cases import random_windows
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import PerHead
from turboq.errors import TurboqError
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.cli import main
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.models import load_model
from turboq_calibrate.observe import captured
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

GOLDEN = Path(__file__).parents[2] / "golden"
RECIPE = ObserveRecipe(skip=2, windows_per_chunk=2, reservoir=20)
SILENT = {"log": lambda line: None}


def windows(vocab=320):
    return random_windows(vocab, count=3, length=12)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    source = captured.source_of(GOLDEN / "llama3")
    return captured.observe_captured(
        GOLDEN / "captured",
        source,
        windows(),
        tmp_path_factory.mktemp("captured"),
        RECIPE,
        **SILENT,
    )


def test_captured_statistics_are_those_of_our_own_pass(found, tmp_path):
    model = load_model(GOLDEN / "llama3")
    own = observe(model, windows(), tmp_path, RECIPE, progress=False, **SILENT)
    check_same(found, own)
    assert [x.rope_layout for x in found.geometry.layers] == ["none"] * 2


def test_latent_vectors_are_captured_where_they_are_cached(tmp_path):
    """Once per token, gradients through keys and values of all heads; and a plan of them."""
    model, text = load_model(GOLDEN / "deepseek_v2"), windows(96)
    source = captured.source_of(GOLDEN / "deepseek_v2")
    found = captured.observe_captured(
        GOLDEN / "captured_latent", source, text, tmp_path / "raw", RECIPE, **SILENT
    )
    check_same(found, observe(model, text, tmp_path, RECIPE, progress=False, **SILENT))
    (layer,) = found.geometry.layers
    assert (layer.latent, layer.kv_heads, layer.q_heads) == (True, 1, 4)
    assert (layer.k_dim, layer.v_dim, layer.rope_layout) == (8, 16, "none")
    wanted = Wanted(
        budget=Budget.parse("4bpc"), guard=False, policy=TokenPolicy(sinks=1),
        candidates=("transform:3,4",),
    )  # fmt: skip
    plan = plan_within(found, found.geometry, wanted, progress=False, **SILENT).plan
    assert plan.bytes_per_token <= 24 * 4 / 8


def check_same(found, own):
    """Moments, histograms, gradients and the sample; only the form of keys differs."""
    assert found.manifest.inputs == own.manifest.inputs
    for ours, theirs in zip(own.layers, found.layers, strict=True):
        assert theirs.rotary is None
        for side in "kvq":
            a, b = ours.sides[side].arrays, theirs.sides[side].arrays
            assert a.keys() == b.keys()
            for name in a:
                size = np.max(np.abs(a[name]))
                if a[name].dtype == np.int64:  # a value at an edge may fall into the next bin
                    assert np.abs(a[name] - b[name]).sum() <= 4
                else:
                    np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-4 * size)
        mine, other = ours.tokens(), theirs.tokens()
        for name in ("v", "g_v", "window", "position", "text"):
            x, y = getattr(mine, name), getattr(other, name)
            np.testing.assert_allclose(y, x, rtol=0, atol=TOL["model_golden"] * np.max(np.abs(x)))
        at = (other.window, other.position)
        assert not np.allclose(other.k[at[1] > 0], mine.k[at[1] > 0])  # turned


def test_plans_need_only_those(found):
    wanted = Wanted(budget=Budget.parse("4bpc"), policy=TokenPolicy(sinks=1))
    plan = plan_within(found, found.geometry, wanted, progress=False, log=lambda line: None).plan
    assert plan.bits_per_channel() <= 4
    assert {layer.k.rope for layer in plan.layers} == {"after"}


@pytest.fixture
def hybrid(tmp_path):
    """A made-up model: a layer without a cache, one that borrows, one that slides."""
    rng, folder, raw = np.random.default_rng(0), tmp_path / "model", tmp_path / "raw"
    folder.mkdir()
    config = {"model_type": "made_up", "vocab_size": 320, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"text_config": config}))
    (folder / "model.safetensors").write_bytes(st_numpy.save({"x": np.zeros(3, np.float32)}))
    captured.request(raw, windows(), RECIPE)
    empty = {"q_heads": 0, "kv_heads": 0, "k_dim": 0, "v_dim": 0, "window": None}
    full = {"q_heads": 4, "kv_heads": 2, "k_dim": 8, "v_dim": 16, "window": None}
    layers = [
        {"index": 0, "path": "a.0", **full, "borrows_cache_of": None},
        {"index": 1, "path": "layers.1", **empty, "borrows_cache_of": None},
        {"index": 2, "path": "a.2", **full, "borrows_cache_of": 0},
        {"index": 3, "path": "a.3", **full, "window": 5, "borrows_cache_of": None},
    ]
    for c, batch in enumerate((2, 1)):
        (raw / f"chunk_{c:03d}").mkdir()
        for i in (0, 2, 3):
            shapes = {"q": (4, 8), "k": (2, 8), "v": (2, 16), "g_k": (2, 8), "g_v": (2, 16)}
            arrays = {n: rng.normal(size=(batch, 12, *s)).astype("f4") for n, s in shapes.items()}
            path = raw / f"chunk_{c:03d}" / f"layer_{i:03d}.safetensors"
            path.write_bytes(st_numpy.save(arrays))
    digest = captured.hashlib.sha256((raw / captured.REQUEST).read_bytes()).hexdigest()
    record = {
        "version": 1, "request_sha256": digest, "family": "made_up", "layers": layers,
        "torch": "2", "transformers": "5",
    }  # fmt: skip
    (raw / captured.CAPTURE).write_text(json.dumps(record))
    return folder, raw


def test_layers_without_a_cache_and_borrowed_ones(hybrid, tmp_path):
    folder, raw = hybrid
    source = captured.source_of(folder)
    assert (source.family, source.context, source.name) == ("made_up", 64, "model")
    found = captured.observe_captured(raw, source, windows(), tmp_path / "out", RECIPE, **SILENT)
    assert [x.owns_cache for x in found.geometry.layers] == [True, False, False, True]
    assert [x.window for x in found.geometry.layers] == [None, None, None, 5]
    chunk = st_numpy.load_file(raw / "chunk_001" / "layer_003.safetensors")
    both = [chunk["k"], st_numpy.load_file(raw / "chunk_000" / "layer_003.safetensors")["k"]]
    want = np.concatenate(both)[:, 2:].sum(axis=(0, 1), dtype=np.float64)
    np.testing.assert_allclose(found.layers[3].k.arrays["sum"], want, rtol=1e-5, atol=1e-5)
    k, v = PerHead(dim=8, bits=3), PerHead(dim=16, bits=3)
    plan, _ = make_plan(
        found.geometry, k=k, v=v, policy=TokenPolicy(), statistics=found, k_rope="after"
    )
    assert [layer.index for layer in plan.layers] == [0, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: (raw / "chunk_001" / "layer_000.safetensors").unlink(), "is missing: run hf"),
        (lambda raw: edit(raw, "k", lambda x: x[:1]), r"k is float32\[1, 12, 2, 8\], not float32"),
        (lambda raw: edit(raw, "g_v", lambda x: x * np.nan), r"NaN or infinity in g_v of layer 3"),
        (lambda raw: edit(raw, "v", None), "array v is missing"),
        (lambda raw: record(raw, version=2), "version"),
        (lambda raw: record(raw, request_sha256="0"), "is of another request"),
        (lambda raw: record(raw, more=1), "more"),
    ],
)
def test_damaged_captures_are_refused(hybrid, tmp_path, damage, message):
    folder, raw = hybrid
    damage(raw)
    with pytest.raises(TurboqError, match=message):
        captured.observe_captured(
            raw, captured.source_of(folder), windows(), tmp_path / "out", RECIPE, **SILENT
        )


def edit(raw, name, change):
    path = raw / "chunk_000" / "layer_003.safetensors"
    arrays = st_numpy.load_file(path)
    if change is None:
        del arrays[name]
    else:
        arrays[name] = np.ascontiguousarray(change(arrays[name]), np.float32)
    path.write_bytes(st_numpy.save(arrays))


def record(raw, **fields):
    path = raw / captured.CAPTURE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_request_is_not_overwritten(tmp_path):
    path = captured.request(tmp_path, windows(), RECIPE)
    assert path.read_bytes() == (GOLDEN / "captured" / captured.REQUEST).read_bytes()
    assert captured.request(tmp_path, windows(), RECIPE) == path
    assert not captured.is_captured(tmp_path)
    with pytest.raises(TurboqError, match="is of other text or another recipe"):
        captured.request(tmp_path, windows(), ObserveRecipe(skip=2, windows_per_chunk=1))


def test_the_program_stands_alone():
    """It parses as Python 3.11, imports nothing of turboq, and names files as we do."""
    tree = ast.parse(captured.PROGRAM.read_text(), feature_version=(3, 11))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert not any(name.startswith(("turboq", "jax")) for name in imported)
    beside = sorted(p.name for p in captured.PROGRAM.parent.glob("*.py"))
    assert beside == ["__init__.py", "capture.py"]  # run by its path, it finds these first
    values = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        for target in node.targets
    }
    assert values["VERSION"] == captured.VERSION
    text = captured.PROGRAM.read_text()
    assert f'REQUEST, CAPTURE = "{captured.REQUEST}", "{captured.CAPTURE}"' in text


def test_the_command(tmp_path, capsys):
    """The request and what to run; then, with a capture, statistics that `plan` takes."""
    model, raw, out = tmp_path / "model", tmp_path / "raw", tmp_path / "out"
    shutil.copytree(GOLDEN / "llama3", model)
    text = tmp_path / "text.txt"
    text.write_text("What attention sees of a model. " * 60)
    words = ["calibrate", f"--model={model}", f"--captured={raw}", f"--out={out}", f"--text={text}"]
    words += ["--windows=2", "--window_length=16", "--check_length=0", "--check_windows=0"]
    assert main.run(words) == 0
    assert f"hf/capture.py --model={model} --folder={raw}" in capsys.readouterr().out
    assert not out.exists() or not list(out.glob("statistics/*.json"))
    assert main.run([*words, "--shard=0/2"]) == 1
    assert "--captured takes no --shard" in capsys.readouterr().err
    assert main.run([*words[:-1], "--text=self:0"]) == 1
    assert "the model writes no text" in capsys.readouterr().err
