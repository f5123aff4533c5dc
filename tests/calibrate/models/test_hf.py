"""Hugging Face folders: shards, stored types, what names mean, and every kind of damage."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from model_files import GOLDEN, copy_of, refuses, rewrite
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from turboq.errors import TurboqError, TurboqWarning
from turboq.export import vllm_scales
from turboq.export.checkpoint import merged_index
from turboq_calibrate.cli.inspect import describe
from turboq_calibrate.models import embed_tokens, load_model
from turboq_calibrate.models.params import parameter_count

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def test_shards_and_one_file_are_the_same_model(tmp_path):
    sharded = GOLDEN / "qwen3"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(sharded / "config.json", whole)
    tensors = {}
    for shard in sharded.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, whole / "model.safetensors")
    one, many = load_model(whole), load_model(sharded)
    for i in range(2):
        for name, value in one.layer(i).items():
            np.testing.assert_array_equal(value, many.layer(i)[name])
    assert one.fingerprint != many.fingerprint
    assert [f.name for f in many.source.files] == [
        "config.json",
        *sorted(p.name for p in sharded.glob("*.safetensors")),
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("family", ["llama", "llama3", "smollm2"])
def test_stored_types_become_float32_exactly(family):
    """float32, bfloat16 and float16 files, against NumPy's own reading of the raw bytes."""
    kinds = {"llama": ("F32", "<f4"), "llama3": ("BF16", "<u2"), "smollm2": ("F16", "<f2")}
    kind, raw_type = kinds[family]
    path = GOLDEN / family / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    info = json.loads(raw[8 : 8 + length])[K_PROJ]
    assert info["dtype"] == kind
    start, end = (8 + length + offset for offset in info["data_offsets"])
    want = np.frombuffer(raw[start:end], raw_type).reshape(info["shape"])
    if kind == "BF16":  # the upper half of a float32
        want = (want.astype(np.uint32) << 16).view(np.float32)
    got = np.asarray(load_model(GOLDEN / family, resident=False).layer(1)["k"])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_fingerprint_follows_the_contents(tmp_path):
    folder = copy_of(tmp_path, "llama")
    before = load_model(folder, resident=False).fingerprint
    assert before == load_model(GOLDEN / "llama", resident=False).fingerprint
    assert len(before) == 64
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1  # the same names and sizes, one bit of one weight
    (folder / "model.safetensors").write_bytes(raw)
    changed = load_model(folder, resident=False).fingerprint
    assert changed != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert load_model(folder, resident=False).fingerprint not in (before, changed)


def test_redundant_tensors_are_ignored(tmp_path):
    folder = copy_of(tmp_path, "smollm2")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()  # tied anyway
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, add)
    want = load_model(GOLDEN / "smollm2").layer(0)["q"]
    np.testing.assert_array_equal(load_model(folder).layer(0)["q"], want)


def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path, rng):
    """As by transformers: it ties only where the two are equal, and says so where not."""
    folder, head = copy_of(tmp_path, "smollm2"), "lm_head.weight"
    own = rng.standard_normal((96, 36)).astype(np.float16)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    rewrite(folder, lambda t: t.update({head: own}))
    with pytest.warns(TurboqWarning, match=r"ties the head to the embedding, but .* another lm_"):
        model = load_model(folder)
    np.testing.assert_array_equal(model.head_params()["unembedding"], own.astype(np.float32))
    want = load_model(GOLDEN / "smollm2")
    embedding = want.embed_params()["embedding"]
    np.testing.assert_array_equal(model.embed_params()["embedding"], embedding)
    assert parameter_count(model.spec) == parameter_count(want.spec) + own.size
    # One weight in the last rows is enough.
    near = np.asarray(embedding).astype(np.float16)
    near[-1, -1] += 1
    rewrite(folder, lambda t: t.update({head: near}))
    with pytest.warns(TurboqWarning, match="another lm_head"):
        load_model(folder, resident=False)
    rewrite(folder, lambda t: t.update({head: near[:-1]}))
    refuses(folder, head, "shape [95, 36]")


def test_names_of_other_checkpoints_are_hinted_at(tmp_path):
    folder = copy_of(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    refuses(folder, "lm_head.weight is missing", '"tie_word_embeddings": true')
    inner = {f"language_model.{name}": value for name, value in tensors.items()}
    save_file(inner, folder / "model.safetensors")
    refuses(folder, "names begin with 'language_model.model.'", "save the decoder by itself")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    refuses(folder, "names begin with '' here")
    save_file({"tok_embeddings.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    refuses(folder, "names of another library, such as 'tok_embeddings.weight'")


def test_an_overlay_for_vllm_is_read_as_the_model_it_is(tmp_path):
    """Scales of the cache say nothing of the weights; any other quantization_config is refused."""
    folder = copy_of(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    settings = vllm_scales.BASE | {"kv_cache_scheme": vllm_scales.scheme("attn_head")}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    one = {"model.layers.0.self_attn.k_scale": np.ones((2, 1, 1), np.float32)}
    save_file(one, folder / "kv_scales.safetensors")
    index = merged_index(folder, one, "kv_scales.safetensors", 8)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, want = load_model(folder), load_model(GOLDEN / "llama")
    assert dataclasses.replace(model.spec, name="llama") == want.spec
    for name, value in want.layer(1).items():
        np.testing.assert_array_equal(model.layer(1)[name], value)
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, "self_attn.k_scale", "has no place")


def test_a_root_of_the_hubs_cache_names_its_snapshot(tmp_path):
    root = tmp_path / "models--some-org--Small-Model"
    snapshot = root / "snapshots" / ("ab" * 20)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("ab" * 20)
    (root / "snapshots" / ("ff" * 20)).mkdir(parents=True)
    shutil.copytree(GOLDEN / "llama", snapshot)
    refuses(root, "has no config.json", f"give its snapshot {snapshot})")
    with pytest.raises(TurboqError, match=r"is no plan .* give its snapshot"):
        describe(str(root), 8)
    assert load_model(snapshot, resident=False).spec.name == "Small-Model"


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.pop(K_PROJ), ["model.safetensors", K_PROJ, "missing"]),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].T.copy()[:5]}),
            [K_PROJ, "shape [5, 32]", "[32, 32]"],
        ),
        (lambda t: t[K_PROJ].__setitem__((3, 4), np.nan), [K_PROJ, "1 NaN or infinite"]),
        (lambda t: t[K_PROJ].__setitem__((3, slice(2)), np.inf), [K_PROJ, "2 NaN or infinite"]),
        (lambda t: t["model.norm.weight"].__setitem__(0, -np.inf), ["model.norm.weight", "1 NaN"]),
        (
            lambda t: t["model.embed_tokens.weight"].__setitem__((9, 9), np.nan),
            ["model.embed_tokens.weight", "1 NaN"],
        ),
        (lambda t: t["lm_head.weight"].__setitem__((9, 9), np.nan), ["lm_head.weight", "1 NaN"]),
        (lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.int8)}), [K_PROJ, "type I8"]),
        (
            lambda t: t.update({"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}),
            ["model.layers.0.self_attn.sinks", "has no place in a llama decoder"],
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.bias": np.ones(32, np.float32)}),
            ["k_proj.bias", "has no place"],
        ),
    ],
)
def test_bad_tensors(tmp_path, change, fragments):
    folder = copy_of(tmp_path, "llama")
    rewrite(folder, change)
    refuses(folder, folder / "model.safetensors", *fragments)


def test_streamed_weights_are_checked_when_they_are_read(tmp_path):
    folder = copy_of(tmp_path, "llama")
    rewrite(folder, lambda t: t[K_PROJ].__setitem__((3, 4), np.nan))
    model = load_model(folder, resident=False)
    model.layer(0)
    with pytest.raises(TurboqError, match=r"layers\.1\.self_attn\.k_proj\.weight holds 1 NaN"):
        model.layer(1)
    rewrite(folder, lambda t: t["model.embed_tokens.weight"].__setitem__((9, 9), np.nan))
    with pytest.raises(TurboqError, match=r"embed_tokens\.weight holds 1 NaN"):
        embed_tokens(model, np.array([[9]]))


def test_huge_weights_are_not_taken_for_infinite(tmp_path):
    folder = copy_of(tmp_path, "llama")
    rewrite(folder, lambda t: t[K_PROJ].fill(3e38))  # their sum overflows float32
    assert float(load_model(folder, resident=False).layer(1)["k"][0, 0]) == np.float32(3e38)


def test_weights_out_of_range_are_refused(tmp_path):
    folder = copy_of(tmp_path, "llama")
    rewrite(folder, lambda t: t[K_PROJ].__setitem__((0, 0), 7e4))
    load_model(folder, dtype="bfloat16")
    with pytest.raises(TurboqError, match=r"weight k does not fit float16 .* 7e\+04"):
        load_model(folder, dtype="float16")
    rewrite(folder, lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.float64) * 1e300}))
    refuses(folder, K_PROJ, "NaN or infinite")


def test_truncated_and_garbage_safetensors(tmp_path):
    folder = copy_of(tmp_path, "llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, *range(1000, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refuses(folder, path, "not a safetensors file or is truncated")
    path.write_bytes(b"\xff" * 500)
    refuses(folder, path, "not a safetensors file or is truncated")
    path.unlink()
    refuses(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_bad_shards(tmp_path):
    folder = copy_of(tmp_path, "qwen3")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = folder / index["weight_map"][K_PROJ]
    saved = shard.read_bytes()
    shard.write_bytes(saved[:-1])
    refuses(folder, shard, "truncated")
    shard.unlink()
    refuses(folder, shard, "missing")
    shard.write_bytes(saved)
    rewrite(folder, lambda t: t.pop(K_PROJ), shard.name)
    refuses(folder, shard, K_PROJ, "missing")
    shard.write_bytes(saved)

    def with_map(change):
        changed = json.loads(json.dumps(index))
        change(changed["weight_map"])
        index_path.write_text(json.dumps(changed))

    with_map(lambda m: m.pop(K_PROJ))
    refuses(folder, index_path, K_PROJ, "missing")
    with_map(lambda m: m.update({K_PROJ: "../other.safetensors"}))
    refuses(folder, index_path, "must be in a file of the same folder")
    with_map(lambda m: m.update({K_PROJ: "red \x1b[31m"}))
    refuses(folder, index_path, r"not in 'red \x1b[31m'")
    with_map(lambda m: m.update({K_PROJ: "a\0b"}))
    refuses(folder, index_path, "must be in a file of the same folder")
    for text, says in {
        "{": "not valid JSON",
        "[]": "must hold a JSON object",
        "{}": "not a safetensors index",
        '{"weight_map": [1]}': "not a safetensors index",
        '{"weight_map": "x"}': "not a safetensors index",
        '{"weight_map": {"x": 3}}': "a file of the same folder, not in 3",
    }.items():
        index_path.write_text(text)
        refuses(folder, index_path, says)


def test_bad_paths_and_configurations(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere does not exist")
    refuses(tmp_path, "has no config.json")
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    refuses(other, "must be a Hugging Face folder or a .gguf file")
    folder = copy_of(tmp_path, "llama")
    for text, message in [("{", "not valid JSON"), ("[1]", "must hold a JSON object, not list")]:
        (folder / "config.json").write_text(text)
        refuses(folder, folder / "config.json", message)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refuses(folder, "config.json is not valid JSON")
    shutil.copy(GOLDEN / "llama" / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    refuses(folder, "model_type 'mamba' is not supported (supported: llama, mistral")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuses(folder, "tensor model.layers.2.input_layernorm.weight is missing")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refuses(folder, "model.layers.1.", "has no place")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    refuses(folder, "shape [96, 32], the configuration needs [97, 32]")


def test_bfloat16_arrays_come_out_of_safetensors():
    """The assumption the loader makes of the safetensors package."""
    with safe_open(GOLDEN / "llama3" / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor(K_PROJ).dtype == ml_dtypes.bfloat16
