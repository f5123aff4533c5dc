"""GGUF files of models with layers that keep a state: what the converter changes, and bad files."""

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, refuses, write
from tolerances import TOL

from turboq_calibrate.models import load_model
from turboq_calibrate.models.gguf_recurrent import restored
from turboq_calibrate.what_fits.read_geometry import read_geometry

F32 = gguf.GGMLQuantizationType.F32
HYBRIDS = ("granite_hybrid", "qwen3_next_all", "qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_hold_what_the_folder_holds(family):
    folder, file = (load_model(GOLDEN / family / name) for name in ("", "model.gguf"))
    for index, layer in enumerate(folder.spec.layers):
        ours, theirs = folder.layer(index), file.layer(index)
        assert ours.keys() == theirs.keys()
        assert file.spec.layers[index].recurrent == layer.recurrent
        for name, value in ours.items():
            whole = layer.norm_offset and name.endswith("_norm") and name != "delta_norm"
            # Norms are stored whole, the decay as an exponential.
            want = value + 1 if whole else value
            np.testing.assert_allclose(
                theirs[name], want, rtol=0, atol=TOL["gguf_copy"], err_msg=name
            )


@pytest.mark.parametrize("family", HYBRIDS)
def test_planner_reads_the_same_layers(family):
    path = GOLDEN / family / "model.gguf"
    mixers = [layer.recurrent for layer in load_model(path, resident=False).spec.layers]
    told = read_geometry(path).layers
    assert [layer.stores for layer in told] == [mixer is None for mixer in mixers]
    for layer, mixer in zip(told, mixers, strict=True):
        inputs = 0 if mixer is None else (mixer.kernel - 1) * mixer.channels
        matrix = 0 if mixer is None else np.prod(mixer.matrix)
        assert layer.state_bytes == 4 * (inputs + matrix)


def test_tiled_heads_spelled_out():
    """Two key heads with two value heads each are stored 0 2 1 3."""
    spec = load_model(GOLDEN / "qwen3_5", resident=False).spec.layers[0]
    delta, width = spec.recurrent, spec.recurrent.value_dim
    assert (delta.key_heads, delta.value_heads) == (2, 4)
    heads = np.array([0, 2, 1, 3], np.float32)
    rows, keys = np.repeat(heads, width), np.full(2 * delta.key_heads * delta.key_dim, 9.0)
    stored = dict.fromkeys(("delta_a", "delta_b", "decay_bias"), heads)
    stored |= {"delta_z": rows[:, None], "delta_out": rows[None], "log_decay": -np.exp(heads)}
    both = np.concatenate([keys, rows])[:, None]
    stored |= {"delta_qkv": both, "conv": both}
    found = restored(spec, stored, tiled=True, file=GOLDEN)
    for name in ("delta_a", "delta_b", "decay_bias", "log_decay"):
        np.testing.assert_allclose(found[name], [0, 1, 2, 3], atol=TOL["gguf_copy"])
    each = np.repeat(np.arange(4), width)
    for name in ("delta_z", "delta_out"):
        np.testing.assert_array_equal(found[name].reshape(-1), each)
    for name in ("delta_qkv", "conv"):
        np.testing.assert_array_equal(found[name].reshape(-1), [*keys, *each])


def test_older_files_keep_one_matrix_by_key_head(tmp_path):
    """Qwen3-Next's first conversions: `ssm_in` is what the checkpoint has."""
    want = load_model(GOLDEN / "qwen3_next_all" / "model.gguf").layer(0)
    delta = load_model(GOLDEN / "qwen3_next_all", resident=False).spec.layers[0].recurrent
    key, value = delta.key_dim, 2 * delta.value_dim
    parts = np.split(np.asarray(want["delta_qkv"]), np.cumsum([2 * key, 2 * key]))
    parts.append(np.asarray(want["delta_z"]))
    rows = [
        part.reshape(2, size, -1)
        for part, size in zip(parts, (key, key, value, value), strict=True)
    ]
    joined = np.concatenate(rows, axis=1).reshape(-1, parts[0].shape[1])
    path = write(
        tmp_path / "old.gguf",
        "qwen3_next_all",
        tensors={
            "blk.0.ssm_in.weight": (joined, F32),
            "blk.0.attn_qkv.weight": (None, F32),
            "blk.0.attn_gate.weight": (None, F32),
        },
    )
    found = load_model(path).layer(0)
    for name, weight in want.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_drafting_layers_are_left_out(tmp_path):
    extra = {"blk.3.nextn.enorm.weight": (np.ones(32, np.float32), F32)}
    fields = {"qwen35.block_count": 4, "qwen35.nextn_predict_layers": 1}
    path = write(tmp_path / "drafts.gguf", "qwen3_5", fields=fields, tensors=extra)
    want = load_model(GOLDEN / "qwen3_5" / "model.gguf", resident=False).spec
    assert load_model(path, resident=False).spec.layers == want.layers


@pytest.mark.parametrize(
    ("family", "fields", "tensors", "fragments"),
    [
        ("qwen3_5", {"qwen35.ssm.state_size": None}, {}, ["qwen35.ssm.state_size is missing"]),
        ("qwen3_5", {"qwen35.ssm.group_count": 3}, {}, ["ssm.group_count=3 must each be a mult"]),
        ("qwen3_5", {"qwen35.ssm.inner_size": 18}, {}, ["ssm.inner_size=18, ssm.time_step_rank=4"]),
        ("qwen3_5", {"qwen35.attention.recurrent_layers": [True]}, {},
         ["attention.recurrent_layers must say true or false for every layer"]),
        ("qwen3_5", {"qwen35.attention.recurrent_layers": [True, True, True]}, {},
         ["tensor blk.1.attn_qkv.weight is missing"]),
        ("qwen3_5_moe", {"qwen35moe.full_attention_interval": 3}, {},
         ["tensor blk.1.attn_qkv.weight is missing"]),
        ("qwen3_5", {}, {"blk.0.ssm_a": (np.zeros(4, np.float32), F32)}, ["ssm_a", "negative"]),
        ("granite_hybrid", {}, {"blk.0.ssm_conv1d.weight": (None, F32)}, ["ssm_conv1d", "missing"]),
        ("granite_hybrid", {"granitehybrid.attention.head_count_kv": [0, 3, 0]}, {},
         ["2 query heads are not a multiple of 3"]),
        ("granite_hybrid", {"granitehybrid.ssm.state_size": 8}, {},
         ["ssm_in.weight has shape [156, 32], the configuration needs [164, 32]"]),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, family, fields, tensors, fragments):
    path = write(tmp_path / "bad.gguf", family, fields=fields, tensors=tensors)
    refuses(path, path, *fragments)
