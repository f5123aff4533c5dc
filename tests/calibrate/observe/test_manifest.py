"""Damaged manifests of a statistics folder: each loads as what it says, or is one clear error."""

import copy
import json

import numpy as np
import plan_mutations
import pytest
from safetensors import numpy as st_numpy

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq.plan import LayerGeometry, ModelGeometry
from turboq.plan.json_file import read_json
from turboq_calibrate.cli.inspect import describe
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.held_back import HeldBack
from turboq_calibrate.observe.manifest import Inputs
from turboq_calibrate.observe.reservoir import Tokens

HEADS, DIM, TOKENS, WINDOWS, LENGTH = 2, 4, 3, 4, 6
TRIALS = 800
INPUTS = {
    "statistics_version": st.VERSION,
    "model": {"fingerprint": "ab" * 32, "family": "llama", "name": "tiny", "dtype": "float32"},
    "text": {
        "texts": [{"name": n, "sha256": "1" * 64, "windows": 2} for n in ("a", "b")],
        "bos": False, "held_back_sha256": "2" * 64, "tokens_sha256": "3" * 64,
        "windows": WINDOWS, "window": LENGTH,
    },
    "recipe": {"seed": 0, "skip": 1, "windows_per_chunk": 2, "reservoir": TOKENS},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The statistics of two layers, the second without RoPE, of zeros."""
    out = tmp_path_factory.mktemp("statistics")
    rows = np.zeros((TOKENS, HEADS, DIM), np.float32)
    number = np.zeros(TOKENS, np.int32)
    sample = Tokens(
        k=rows, v=rows, g_k=rows, g_v=rows, window=number, position=number, text=number
    ).to_bytes()
    layers, entries = [], []
    for i, rope in enumerate((Rope(dim=DIM, theta=100.0), None)):
        names = [s for s in st.SIDES if rope is not None or not s.endswith("_before")]
        sides = {
            s: {f.name: np.zeros(st.shape_of(f, HEADS, DIM), f.dtype) for f in st.fields_of(s)}
            for s in names
        }
        (out / files.layer_file(i)).write_bytes(files.to_bytes(sides))
        (out / files.tokens_file(i)).write_bytes(sample)
        layer = files.layer_from_sides(sides, out, rope)
        path = f"layers.{i}"
        entries.append(files.describe_layer(out, i, path, layer, sampled=True))
        layers.append(
            LayerGeometry(
                index=i, path=path, kv_heads=HEADS, q_heads=HEADS, k_dim=DIM, v_dim=DIM, rope=rope,
                rope_layout="none" if rope is None else "half",
            )
        )  # fmt: skip
    tokens = np.zeros((WINDOWS, LENGTH), np.int32)
    back = HeldBack(short={0: tokens[:1]}, long={1: tokens[:1]})
    files.write_windows(out, tokens, np.array([0, 0, 1, 1], np.int32), back)
    geometry = ModelGeometry(
        fingerprint="ab" * 32, family="llama", name="tiny", layers=tuple(layers)
    )
    files.write_manifest(out, INPUTS, geometry, WINDOWS * (LENGTH - 1), entries)
    return out


def use(folder) -> str:
    """Everything that readers take from a folder."""
    found = files.load_statistics(folder)
    for i, layer in enumerate(found):
        _ = len(found.tokens(i)), layer.k.heads
    for i in found.window_texts:
        _ = found.texts[i]
    assert found.windows.shape == (WINDOWS, LENGTH)
    _ = found.held_back.sha256, found.geometry.layers, found.sha256
    return describe(str(folder), 1)


def outcome(call) -> str | None:
    """None, or the one line of the one error that a reader may end in."""
    try:
        call()
    except TurboqError as error:
        return str(error) if "\n" not in str(error) else pytest.fail(f"two lines: {error}")
    return None


def test_the_folder_itself_loads(folder):
    assert "layers: 2" in use(folder)


def test_damaged_manifests_are_one_line(folder):
    path = folder / files.MANIFEST
    whole = path.read_bytes()
    document, rng, loaded = json.loads(whole), np.random.default_rng(7), 0
    try:
        for trial in range(TRIALS):
            if trial % 6:
                raw = json.dumps(plan_mutations.mutate(document, rng)).encode()
            else:
                raw = plan_mutations.damage(whole, rng)
            path.write_bytes(raw)
            message = outcome(lambda: use(folder))
            loaded += message is None
            assert message is None or len(message) < len(str(folder)) + 600
    finally:
        path.write_bytes(whole)
    assert 0 < loaded < TRIALS / 4  # hashes and names may change: nothing follows from them


def test_damaged_inputs_are_one_line(tmp_path):
    path, rng = tmp_path / "inputs.json", np.random.default_rng(8)
    for _ in range(TRIALS // 3):
        path.write_text(json.dumps(plan_mutations.mutate(INPUTS, rng)))
        message = outcome(lambda: read_json(path, Inputs, otherwise="remove it"))
        assert message is None or message.endswith(": remove it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["windows"].update(m["layers"][0]["tokens"]), "g_k is float32"),
        (lambda m: m["layers"].pop(), "layers: 1, but the geometry has 2"),
        (lambda m: m["layers"][0].update(k=[2, 8]), r"layers\[0\].*k_before"),
        (lambda m: m["layers"].reverse(), r"layers\[0\]: is not the geometry's layer"),
        (lambda m: m["layers"][1].update(file="../x"), r"layers\[1\]\.file: .*plain name"),
        (lambda m: m["inputs"]["text"].update(windows=5), "inputs.text.*windows.*texts have 4"),
        (lambda m: m["inputs"].pop("recipe"), "inputs.recipe: missing"),
    ],
)
def test_what_disagrees_is_named(folder, change, message):
    path = folder / files.MANIFEST
    whole = path.read_bytes()
    document = copy.deepcopy(json.loads(whole))
    change(document)
    path.write_text(json.dumps(document))
    try:
        with pytest.raises(TurboqError, match=message):
            use(folder)
    finally:
        path.write_bytes(whole)


def test_windows_of_another_shape_are_refused(folder):
    path, where = folder / files.MANIFEST, folder / files.WINDOWS
    whole, old = path.read_bytes(), where.read_bytes()
    document = json.loads(whole)
    try:
        where.write_bytes(st_numpy.save({"tokens": np.zeros((1, 2), np.int32)}))
        document["windows"] = files._describe_file(where)
        path.write_text(json.dumps(document))
        with pytest.raises(TurboqError, match=r"tokens is int32\[1, 2\]"):
            use(folder)
    finally:
        path.write_bytes(whole)
        where.write_bytes(old)
