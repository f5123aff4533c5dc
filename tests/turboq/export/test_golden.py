"""What the engines really did (scripts/export_oracles) against what turboq says they do."""

import ast
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import arrays_of
from plan_cases import geometry, random_fit
from tolerances import TOL

from turboq.codecs import (
    FP8,
    NUQ,
    NVFP4,
    Ggml,
    Int4TokenHead,
    Int8TokenHead,
    PerChannel,
    PerHead,
    TurboQuantMSE,
)
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, reader_example
from turboq.export.base import entries
from turboq.export.mlx_lm import mlx_held
from turboq.export.qwix_arrays import layer_qarrays, parts
from turboq.export.reader import page
from turboq.plan import collect_arrays, head_plan, save, uniform_plan

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "export"


def golden(name: str) -> dict:
    found = json.loads((GOLDEN / f"{name}.json").read_text())
    assert found["made"]
    assert found["versions"]
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_runtime_cached_the_codes_of_our_codec(bits):
    found = golden("ort_genai")["schemes"][f"int{bits}_per_channel"]
    assert found["equal"] == found["bytes"]
    assert len(found["generated"]) == 8
    codec = PerChannel(dim=32, bits=bits)
    arrays = {"channel_scale": jnp.asarray(found["channel_scale"], jnp.float32)}
    stored = codec.encode(arrays, jnp.asarray(found["x"], jnp.float32))
    np.testing.assert_array_equal(codec.to_bytes(stored), np.array(found["codes"], np.uint8))


def test_compressed_tensors_expects_the_scales_that_we_write():
    for name, row in golden("compressed_tensors")["strategies"].items():
        assert row["strategy"] == {"tensor": "tensor", "head": "attn_head"}[name]
        assert row["expected"] == row["written"]
        assert len(row["written"]) == 6


def test_mlx_takes_the_bytes_that_the_report_predicts():
    found = golden("mlx_lm")
    assert found["dtype"] == "mlx.core.float32"
    model = geometry(layers=3, kv_heads=2, k_dim=32, v_dim=32)
    plan = uniform_plan(model, k=Ggml(dim=32, type="q8_0"), v=Ggml(dim=32, type="q8_0"))
    entry = entries(plan, {})[0]
    for nbytes, (group, bits) in zip(found["bytes_at_256"], found["settings"], strict=True):
        held = mlx_held(entry, bits, group, "float32")
        assert nbytes == 256 * 2 * 2 * held.stored_bits // 8  # 2 heads, K and V


def test_tokamax_attends_to_our_arrays_as_we_do():
    found = golden("tokamax")["largest_difference"]
    assert len(found) >= 8
    assert all(value < TOL["tokamax_f32"] for value in found.values())


def test_llama_cpp_perplexity_agrees_with_our_emulation():
    rows = golden("llama_cpp")["rows"]
    assert len(rows) == 7
    for kind, row in rows.items():
        assert row["apart"] < TOL["llama_cpp_ratio"], kind
    # Both say what the rotation is worth.
    for side in ("llama_cpp_ratio", "turboq_ratio"):
        assert rows["q4_0 unrotated"][side] > rows["q4_0"][side] > rows["q5_0"][side] > 1


SYMMETRIC = {
    "per_channel": PerChannel(dim=64, bits=4),
    "int8": Int8TokenHead(dim=64),
    "int4": Int4TokenHead(dim=64),
    "fp8 head": FP8(dim=64, scale="head"),
    "fp8 token": FP8(dim=64, format="e5m2", scale="token"),
    "fp8 none": FP8(dim=64, scale="none"),
    "nvfp4": NVFP4(dim=64),
    "q8_0": Ggml(dim=64, type="q8_0"),
    "q5_0": Ggml(dim=64, type="q5_0", rotation="walsh"),
    "q4_0": Ggml(dim=64, type="q4_0"),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_qarray_parts_are_the_codec_s_values(name):
    codec, rng = SYMMETRIC[name], np.random.default_rng(4)
    arrays = {k: jnp.asarray(v[0]) for k, v in arrays_of(codec, rng).items()}
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)

    def run(arrays, x):
        stored = codec.encode(arrays, x)
        return parts(codec, arrays, stored), codec.dequantize(arrays, stored)

    (value, scale, zero), expected = jax.jit(run)(arrays, x)
    assert value.dtype.itemsize == 1
    assert scale.ndim == value.ndim
    assert all(n % m == 0 for n, m in zip(value.shape, scale.shape, strict=True))

    def spread(tile):
        tile = np.asarray(tile, np.float64)
        for axis in range(tile.ndim):
            tile = np.repeat(tile, value.shape[axis] // tile.shape[axis], axis=axis)
        return tile

    centred = np.asarray(value).astype(np.float64) - (0 if zero is None else spread(zero))
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(centred * spread(scale), expected, rtol=TOL["qarray_f32"])
    assert zero is None or zero.dtype == value.dtype


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    model = geometry(layers=1, kv_heads=2, k_dim=64, v_dim=64)
    plan = uniform_plan(model, k=Int8TokenHead(dim=64), v=Int8TokenHead(dim=64))
    x = jnp.zeros((1, 4, 2, 64))
    with pytest.raises(TurboqError, match=r"qwix is not installed: pip install qwix tokamax"):
        layer_qarrays(plan.kv_layer(0, {}), x, x)


# The reader: a plan in both of its forms, decoded without turboq.

READ = {
    "per_head": PerHead(dim=64, bits=3),
    "per_head, one scale": PerHead(dim=64, bits=2, scale="head", rotation="haar", seed=3),
    "turboquant_mse": TurboQuantMSE(dim=64, bits=4),
    "per_channel": PerChannel(dim=64, bits=5),
}


def test_the_reader_imports_nothing_else_and_is_short():
    source = Path(reader_example.__file__).read_text()
    assert len(source.splitlines()) <= 165
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names == {"json", "pathlib", "struct", "numpy"}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("overridden", [False, True])
def test_the_reader_decodes_pages(name, overridden, tmp_path):
    model, codec = geometry(layers=2, kv_heads=2, k_dim=64, v_dim=64), READ[name]

    def choose(layer, side, head):
        return NUQ(dim=64, bits=2) if overridden and head == 0 else codec

    plan = head_plan(model, choose)
    arrays = collect_arrays(plan, random_fit(model))
    save(plan, arrays, tmp_path)
    read, tensors = reader_example.read_plan(tmp_path)
    assert reader_example.codec_of(read, 1, "v", 1) == codec.config()
    entry = next(e for e in entries(plan, arrays) if e.place == (1, "v", 1))
    fields = page(entry)
    codes = reader_example.unpack(fields["codes"])
    of = reader_example.arrays_of(read, tensors, 1, "v", 1)
    scale = fields["scale"][:, 0] if "scale" in fields else None
    found = reader_example.decode(codec.config(), of, codes, scale)
    largest = np.abs(fields["decoded"]).max()
    np.testing.assert_allclose(found, fields["decoded"], atol=TOL["rotate_f32"] * largest)


def test_the_reader_s_export_runs_on_its_own(tmp_path):
    from turboq.export import export

    model = geometry(layers=1, kv_heads=1, k_dim=64, v_dim=64)
    plan = uniform_plan(model, k=TurboQuantMSE(dim=64, bits=3), v=TurboQuantMSE(dim=64, bits=3))
    export(plan, {}, ENGINES["reader"], tmp_path / "out", Options())
    script = runpy.run_path(str(tmp_path / "out" / "read_plan.py"))
    read, tensors = script["read_plan"](tmp_path / "out" / "engine_plan")
    fields = np.load(tmp_path / "out" / "page.npz")
    codes = script["unpack"](fields["codes"])
    arrays = script["arrays_of"](read, tensors, 0, "k", 0)
    codec = script["codec_of"](read, 0, "k", 0)
    found = script["decode"](codec, arrays, codes, fields["scale"][:, 0])
    np.testing.assert_allclose(found, fields["decoded"], atol=TOL["rotate_f32"] * 4)
