"""GGUF files of Gemma 4: layers one by one, as the folder has them."""

import dataclasses

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, parts_of, refuses, write
from tolerances import TOL

from turboq_calibrate.models import load_model
from turboq_calibrate.what_fits.read_geometry import read_geometry

F32 = gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("family", ["gemma4", "gemma4_moe"])
def test_it_is_the_folder(family):
    folder, file = (load_model(GOLDEN / family / name) for name in ("", "model.gguf"))
    assert (file.spec.shared, file.spec.own_input) == (folder.spec.shared, folder.spec.own_input)
    assert file.spec.tied_embeddings
    for index, (layer, other) in enumerate(zip(folder.spec.layers, file.spec.layers, strict=True)):
        # Pairs that stand still turn by next to nothing.
        still = np.array(layer.rope.inv_freq or [1.0])
        turns = np.array(other.rope.inv_freq or [1.0])
        np.testing.assert_allclose(turns, still, rtol=1e-12, atol=1e-25)
        assert other.norm_eps == np.float32(layer.norm_eps)
        same = {"rope": None, "norm_eps": 1.0}
        assert dataclasses.replace(layer, **same) == dataclasses.replace(other, **same)
        weights = file.layer(index)
        assert weights.keys() == folder.layer(index).keys()
        for name, value in folder.layer(index).items():
            np.testing.assert_array_equal(weights[name], value, err_msg=name)


@pytest.mark.parametrize("family", ["gemma4", "gemma4_moe"])
def test_planner_reads_the_same_layers(family):
    path = GOLDEN / family / "model.gguf"
    layers = load_model(path, resident=False).spec.layers
    told = read_geometry(path).layers
    assert [x.stores for x in told] == [layer.owns_cache for layer in layers]
    for layer, other in zip(layers, told, strict=True):
        if layer.owns_cache:
            assert (other.kv_heads, other.k_dim, other.window) == (
                layer.kv_heads, layer.head_dim, layer.window,
            )  # fmt: skip


def test_streamed_rows_are_those_of_the_table():
    model = load_model(GOLDEN / "gemma4" / "model.gguf", resident=False)
    ids = np.array([3, 95, 3])
    for name, table in model.source.embed(["embedding", "layer_embedding"]).items():
        np.testing.assert_array_equal(model.source.embed_rows(ids, name), table[ids])


def test_values_of_keys_and_what_borrowers_do_not_use(tmp_path):
    """Full layers without values make them of keys; keys of a layer that borrows are left out."""
    path = write(tmp_path / "kv.gguf", "gemma4_moe", tensors={"blk.1.attn_v.weight": (None, F32)})
    layers = load_model(path, resident=False).spec.layers
    assert [layer.values_are_keys for layer in layers] == [False, True]
    stored = parts_of("gemma4")[2]
    extra = {f"blk.4.{n}": stored[f"blk.1.{n}"] for n in ("attn_k.weight", "attn_k_norm.weight")}
    path = write(tmp_path / "more.gguf", "gemma4", tensors=extra)
    spec = load_model(path, resident=False).spec
    assert spec.layers == load_model(GOLDEN / "gemma4" / "model.gguf", resident=False).spec.layers
    assert [layer.borrows_cache_of for layer in spec.layers] == [None] * 3 + [2, 1]


def test_experts_whose_gate_and_up_are_one_tensor(tmp_path):
    """As of Gemma 4 always, of Qwen3.5 where the converter was asked to."""
    family = "qwen3_5_moe"
    stored, tensors = parts_of(family)[2], {}
    for block in (0, 1):
        names = [f"blk.{block}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        parts = [gguf.quants.dequantize(*stored[name]) for name in names]
        tensors |= dict.fromkeys(names, (None, F32))
        both = np.concatenate(parts, axis=1)
        tensors[f"blk.{block}.ffn_gate_up_exps.weight"] = (both, F32)
    found = load_model(write(tmp_path / "one.gguf", family, tensors=tensors)).layer(1)
    want = load_model(GOLDEN / family / "model.gguf").layer(1)
    for name in ("expert_gate", "expert_up", "expert_down"):
        np.testing.assert_allclose(found[name], want[name], rtol=0, atol=TOL["gguf_copy"])


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"gemma4.attention.shared_kv_layers": 4}, ["shared_kv_layers=4 of 5 layers leaves full"]),
        ({"gemma4.attention.key_length_swa": 6}, ["rotary embedding of 8 of 6 channels"]),
        ({"gemma4.embedding_length_per_layer_input": 8}, ["per_layer_token_embd", "[96, 40]"]),
        ({"gemma4.rope.dimension_count_swa": 4}, ["rotary embedding of 4 of 8 channels"]),
    ],
)
def test_bad_files(tmp_path, fields, fragments):
    path = write(tmp_path / "bad.gguf", "gemma4", fields=fields)
    refuses(path, path, *fragments)
