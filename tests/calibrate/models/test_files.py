"""Model files: shards, header against the gguf package, weight types, and every kind of damage."""

import functools
import json
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from turboq.errors import TurboqError
from turboq.numbers.rope import Scaling
from turboq_calibrate.models import embed_tokens, gguf_header, load_model
from turboq_calibrate.models.gguf_file import GGUFFile

GOLDEN = Path(__file__).parents[2] / "golden"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def copy_of(tmp_path, family):
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    return folder


def refuses(path, *fragments):
    """Loading ends with one line that holds every fragment."""
    with pytest.raises(TurboqError) as caught:
        load_model(path)
    message = str(caught.value)
    for fragment in fragments:
        assert str(fragment) in message
    assert "\n" not in message


def rewrite(folder, change, file="model.safetensors"):
    """Passes a checkpoint's tensors through `change`."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


# ---- Hugging Face folders


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
    refuses(folder, index_path, "outside the folder")
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": "x"}'):
        index_path.write_text(text)
        refuses(folder, index_path, "not a safetensors index")


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
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    refuses(folder, "model_type 'gpt_oss' is not supported (supported: llama, mistral")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuses(folder, "tensor model.layers.2.input_layernorm.weight is missing")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refuses(folder, "model.layers.1.", "has no place")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    refuses(folder, "shape [96, 32], the configuration needs [97, 32]")


# ---- GGUF files


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_header_agrees_with_the_gguf_package(family):
    path = GOLDEN / family / "model.gguf"
    metadata, tensors, _ = gguf_header.read(path)
    reader = gguf.GGUFReader(path)
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata == expected
    assert list(tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        info = tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.kind, info.start, info.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )


@functools.cache
def parts_of(family):
    """Metadata fields and tensors of a golden GGUF file, to be written again with a change."""
    reader = gguf.GGUFReader(GOLDEN / family / "model.gguf")
    fields = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    return str(reader.fields["general.architecture"].contents()), fields, tensors


def write(path, family="qwen3", *, arch=None, fields=None, tensors=None):
    """A golden GGUF file with fields and tensors added, replaced, or (None) left out."""
    original, old_fields, old_tensors = parts_of(family)
    writer = gguf.GGUFWriter(path, arch or original)
    for name, (value, types) in old_fields.items():
        if name not in (fields or {}):
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, value in (fields or {}).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    for name, (value, kind) in (old_tensors | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


F32 = gguf.GGMLQuantizationType.F32
K_NAME = "blk.1.attn_k.weight"
K_SHAPE = (24, 32)


def test_written_again_it_is_the_same_model(tmp_path):
    copy = load_model(write(tmp_path / "copy.gguf"))
    for name, value in load_model(GOLDEN / "qwen3" / "model.gguf").layer(1).items():
        np.testing.assert_array_equal(copy.layer(1)[name], value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qwen3.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
        ({"qwen3.block_count": 10**9}, "1000000000 layers but"),
        ({"qwen3.block_count": 1}, "has no place in a qwen3 decoder"),
        ({"qwen3.embedding_length": None}, "field qwen3.embedding_length is missing"),
        ({"qwen3.embedding_length": 0}, "embedding_length=0 must be a positive"),
        ({"qwen3.embedding_length": "a"}, "embedding_length='a' must be a positive"),
        ({"qwen3.attention.head_count": 3}, "3 query heads are not a multiple of 2"),
        ({"qwen3.attention.head_count": [4]}, "attention.head_count=None must be a positive"),
        ({"qwen3.attention.head_count_kv": [2, 0]}, "attention.head_count_kv=0 must be a positive"),
        ({"qwen3.attention.key_length": 16}, "shape [48, 32], the configuration needs [64, 32]"),
        ({"qwen3.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"qwen3.rope.dimension_count": 6}, "rotary embedding of 6 of 12 channels"),
        ({"qwen3.rope.scaling.type": "yarn"}, "rope scaling type 'yarn' is not supported"),
        ({"qwen3.rope.scaling.type": "linear"}, "qwen3.rope.scaling.factor is missing"),
        ({"qwen3.expert_count": 8}, "qwen3.expert_count is set, which is not supported"),
        ({"qwen3.final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ({"split.count": 2}, "is one of 2 parts"),
    ],
)
def test_bad_gguf_metadata(tmp_path, fields, message):
    path = write(tmp_path / "bad.gguf", fields=fields)
    refuses(path, path, message)


def test_linear_scaling_and_windows_are_read(tmp_path):
    fields = {
        "qwen3.rope.scaling.type": "linear",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.attention.sliding_window": 6,
    }
    layer = GGUFFile(write(tmp_path / "m.gguf", fields=fields)).spec.layers[0]
    assert layer.rope.scaling == Scaling(type="linear", factor=4.0)
    assert layer.window == 6


def test_unsupported_architecture(tmp_path):
    path = write(tmp_path / "bad.gguf", arch="gemma3")
    refuses(path, path, "architecture 'gemma3' is not supported (supported: llama, qwen2, qwen3)")


@pytest.mark.parametrize(
    ("tensors", "fragments"),
    [
        ({K_NAME: (None, F32)}, [K_NAME, "missing"]),
        ({"token_embd.weight": (None, F32)}, ["token_embd.weight", "missing"]),
        ({"output_norm.weight": (None, F32)}, ["output_norm.weight", "missing"]),
        ({K_NAME: (np.zeros((5, 32), np.float32), F32)}, [K_NAME, "[5, 32]", "[24, 32]"]),
        ({K_NAME: (np.full(K_SHAPE, np.nan, np.float32), F32)}, [K_NAME, "768 NaN or infinite"]),
        ({K_NAME: (np.full(K_SHAPE, np.inf, np.float16), None)}, [K_NAME, "768 NaN or infinite"]),
        ({K_NAME: (np.zeros(K_SHAPE, np.int8), None)}, [K_NAME, "type I8", "cannot dequantise"]),
        ({"blk.0.attn_sinks.weight": (np.ones(4, np.float32), F32)}, ["attn_sinks", "no place"]),
        ({"rope_freqs.weight": (np.zeros(6, np.float32), F32)}, ["rope_freqs", "positive"]),
        ({"rope_freqs.weight": (np.ones(5, np.float32), F32)}, ["rope_freqs", "[5]", "[6]"]),
    ],
)
def test_bad_gguf_tensors(tmp_path, tensors, fragments):
    path = write(tmp_path / "bad.gguf", tensors=tensors)
    refuses(path, path, *fragments)


def test_frequencies_and_linear_scaling_together_are_refused(tmp_path):
    fields = {"qwen3.rope.scaling.type": "linear", "qwen3.rope.scaling.factor": 4.0}
    tensors = {"rope_freqs.weight": (np.ones(6, np.float32), F32)}
    path = write(tmp_path / "bad.gguf", fields=fields, tensors=tensors)
    refuses(path, path, "both rope_freqs.weight and linear rope scaling")


def test_every_truncation_of_a_gguf_file_is_noticed(tmp_path):
    whole = (GOLDEN / "llama3" / "model.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"")
    refuses(path, path, "is empty")
    for length in [1, 3, 4, 7, 20, *range(24, len(whole) - 32, 997), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(TurboqError, match=r"truncated|not a GGUF file"):
            GGUFFile(path)
    path.write_bytes(b"GGML" + whole[4:])
    refuses(path, path, "is not a GGUF file")
    for version in (1, 4, 3 << 24):  # the last is a big-endian 3
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        refuses(path, path, f"version {version} is not supported")


def test_damaged_gguf_headers_never_crash(tmp_path, rng):
    """Random bytes anywhere in the header: a clear error, or a model that still loads."""
    whole = bytearray((GOLDEN / "llama3" / "model.gguf").read_bytes())
    header = min(t.start for t in gguf_header.read(GOLDEN / "llama3" / "model.gguf")[1].values())
    path, refused = tmp_path / "damaged.gguf", 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(4, header, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 7, 0x7F, 0x80, 0xFF])
        path.write_bytes(damaged)
        try:
            source = GGUFFile(path)
            source.layer(0), source.head()
        except TurboqError:
            refused += 1
    assert refused > 60


def by_hand(kind, raw):
    """Q8_0 = d * q, Q4_0 = d * (q - 8), Q4_1 = d * q + m, written out for blocks of 32 weights."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    rows = raw.reshape(raw.shape[0], -1, size)
    d = rows[..., :2].copy().view(np.float16).astype(np.float64)
    if kind == "Q8_0":
        return (d * rows[..., 2:].view(np.int8)).reshape(raw.shape[0], -1)
    codes = rows[..., 2 if kind == "Q4_0" else 4 :]
    q = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float64)
    if kind == "Q4_0":
        return (d * (q - 8)).reshape(raw.shape[0], -1)
    return (d * q + rows[..., 2:4].copy().view(np.float16).astype(np.float64)).reshape(
        raw.shape[0], -1
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_against_formulas_written_by_hand(tmp_path, rng, kind):
    weight = rng.standard_normal(K_SHAPE).astype(np.float32)
    type_ = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(weight, type_)
    path = write(tmp_path / "q.gguf", tensors={K_NAME: (raw, type_)})
    got = np.asarray(load_model(path, resident=False).layer(1)["k"])
    np.testing.assert_allclose(got, by_hand(kind, raw), rtol=2**-22, atol=2**-22)


READABLE = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")
]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_weight_type_of_the_package_is_read(tmp_path, rng, kind):
    """Random blocks of each type come through in place, row by row (qwen3 does not permute)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = max(block, 32)
    raw = rng.integers(0, 60, (4, width // block * size), dtype=np.uint8)
    want = gguf.quants.dequantize(raw, kind)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "qwen3")
    writer.add_tensor("pad", np.ones(3, np.float32))
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = object.__new__(GGUFFile)
    source.path = tmp_path / "t.gguf"
    source.metadata, source._tensors, source._data = gguf_header.read(source.path)
    got = source._read("t", (4, width))
    assert got.dtype == np.float32
    assert got.flags.owndata or got.base.flags.owndata  # never a view of the mapped file
    np.testing.assert_array_equal(got, want.reshape(4, width))


def test_llama_rows_are_put_back_and_others_left_alone():
    """The converter's row order, spelled out for one head of six channels: 0 3 1 4 2 5."""
    from turboq_calibrate.models.gguf_file import unpermute

    stored = np.array([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]], np.float32)
    np.testing.assert_array_equal(unpermute(stored, 1)[:, 0], np.arange(6))
    two = np.concatenate([stored, stored + 10])
    np.testing.assert_array_equal(unpermute(two, 2)[6:, 0], np.arange(10, 16))


def test_bfloat16_arrays_come_out_of_safetensors():
    """The assumption the loader makes of the safetensors package."""
    with safe_open(GOLDEN / "llama3" / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor(K_PROJ).dtype == ml_dtypes.bfloat16
