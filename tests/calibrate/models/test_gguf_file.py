"""GGUF files: header against the gguf package, weight types, and every kind of damage."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, refuses, write

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope, Scaling, inverse_frequencies
from turboq_calibrate.models import gguf_header, load_model
from turboq_calibrate.models.gguf_architectures import ARCHITECTURES
from turboq_calibrate.models.gguf_file import GGUFFile
from turboq_calibrate.models.gguf_spec import Geometry
from turboq_calibrate.what_fits.read_geometry import read_geometry


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
        ({"qwen3.rope.scaling.type": "longrope"}, "scaling type 'longrope' is not supported"),
        ({"qwen3.rope.scaling.type": "yarn"}, "qwen3.rope.scaling.factor is missing"),
        ({"qwen3.rope.scaling.type": "linear"}, "qwen3.rope.scaling.factor is missing"),
        ({"qwen3.expert_count": 8}, "qwen3.expert_count is set, which is not supported"),
        ({"qwen3.final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ({"split.count": 2}, "is one of several files and not named NAME-00001-of-00002"),
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


def spec_of(tmp_path, family, **fields):
    fields = {f"{family}.{key.replace('__', '.')}": value for key, value in fields.items()}
    return GGUFFile(write(tmp_path / "m.gguf", family, fields=fields)).spec


def test_what_llama_cpp_builds_into_gemma(tmp_path):
    """Defaults, periods and a scale that files do not say."""
    bare = dict.fromkeys(("attention__sliding_window", "attn_logit_softcapping",
                          "final_logit_softcapping"))  # fmt: skip
    spec = spec_of(tmp_path, "gemma2", **bare)
    assert [layer.window for layer in spec.layers] == [4096, None, 4096]
    assert (spec.layers[0].softcap, spec.logit_softcap) == (50.0, 30.0)
    spec = spec_of(tmp_path, "gemma2", attn_logit_softcapping=0.0)
    assert spec.layers[0].softcap is None
    spec = spec_of(tmp_path, "gemma3", attention__sliding_window=None)
    assert {layer.window for layer in spec.layers} == {None}
    assert {layer.rope.theta for layer in spec.layers} == {5e4}
    spec = spec_of(tmp_path, "gemma3", attention__sliding_window_pattern=2)
    assert [layer.window for layer in spec.layers] == [5, None] * 3 + [5]
    spec = spec_of(tmp_path, "gemma3", attention__sliding_window_pattern=[True] * 3 + [False] * 4)
    assert [layer.window for layer in spec.layers] == [5] * 3 + [None] * 4
    spec = spec_of(tmp_path, "gemma3", rope__freq_base_swa=7e3)
    assert [layer.rope.theta for layer in spec.layers] == [7e3] * 5 + [5e4, 7e3]
    with pytest.raises(TurboqError, match="must say true or false for every layer"):
        spec_of(tmp_path, "gemma3", attention__sliding_window_pattern=[True, False])


def test_what_llama_cpp_builds_into_others(tmp_path):
    """OLMo 2's architecture is OLMo 3's too; Granite's switch of its rotary embedding."""
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    spec = spec_of(tmp_path, "olmo2", attention__sliding_window=6, **scaled)
    assert [layer.window for layer in spec.layers] == [6, 6]
    assert {layer.rope for layer in spec.layers} == {Rope(theta=5e5, dim=8)}
    spec = spec_of(tmp_path, "olmo2", attention__sliding_window=6,
                   attention__sliding_window_pattern=[True, False], **scaled)  # fmt: skip
    assert spec.layers[1].rope.scaling == Scaling(type="linear", factor=4.0)
    spec = spec_of(tmp_path, "granite", rope__scaling__finetuned=False)
    assert {layer.rope for layer in spec.layers} == {None}
    bare = dict.fromkeys(("embedding_scale", "residual_scale", "attention__scale"))
    spec = spec_of(tmp_path, "granite", **bare, logit_scale=8.0)
    layer = spec.layers[0]
    assert (spec.embed_scale, layer.residual_scale, layer.scale) == (1.0, 1.0, 8**-0.5)
    assert spec.logit_scale == 0.125
    for family in ("phi3", "starcoder2"):  # llama.cpp ignores the windows they were trained with
        spec = spec_of(tmp_path, family, attention__sliding_window=4)
        assert {layer.window for layer in spec.layers} == {4}
    assert spec_of(tmp_path, "phi3").context == 80
    with pytest.raises(TurboqError, match=r"scaling.original_context_length is missing"):
        spec_of(tmp_path, "phi3", rope__scaling__original_context_length=None)


@pytest.mark.parametrize("layers", [46, 26])
def test_gemma_2_27b_scales_by_its_width(layers):
    """llama.cpp knows it by its 46 layers: (hidden / heads)^-1/2, not head_dim^-1/2."""
    fields = {"block_count": layers, "attention.head_count": 32, "attention.head_count_kv": 16,
              "attention.key_length": 128, "feed_forward_length": 36864}  # fmt: skip
    metadata = {f"gemma2.{key}": value for key, value in fields.items()}
    header = Geometry(
        path=Path("x.gguf"), row=ARCHITECTURES["gemma2"], tensors={}, read=np.zeros, long=False,
        metadata=metadata | {"general.architecture": "gemma2"},
    )  # fmt: skip
    want = 144**-0.5 if layers == 46 else 128**-0.5
    assert header._layer(0, 4608, 1e-6).scale == want


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, None),
        ({"scaling.type": "none"}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scaling.attn_factor": 1.0}, 4.0),
        ({"scaling.factor": 4.0, "scaling.original_context_length": 64}, 4.0),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(tmp_path, fields, factor):
    """Where no type is said it is linear; of the type "none" no factor scales."""
    fields = {f"qwen3.rope.{name}": value for name, value in fields.items()}
    rope = GGUFFile(write(tmp_path / "m.gguf", fields=fields)).spec.layers[0].rope
    want = 1e6 ** -(np.arange(0, 12, 2) / 12) / (factor or 1.0)
    np.testing.assert_allclose(inverse_frequencies(rope), want, rtol=2**-23)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling.attn_factor": 1.5}, "qwen3.rope.scaling.attn_factor=1.5 is not supported"),
        ({"scaling.factor": 0.0}, "rope.scaling.factor=0.0 must be a positive"),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, "factor=4.0 but qwen3.rope.scale_linear=2"),
        ({"freq_base_swa": 5e5}, "qwen3.rope.freq_base_swa=500000.0 is not supported"),
        ({"scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor=1.0 is not supported"),
        ({"dimension_sections": [2, 2, 2, 0]}, "dimension_sections=[2, 2, 2, 0] is not supported"),
    ],
)
def test_what_else_llama_cpp_reads_of_rope_is_refused_by_name(tmp_path, fields, message):
    fields = {f"qwen3.rope.{name}": value for name, value in fields.items()}
    path = write(tmp_path / "bad.gguf", fields=fields)
    refuses(path, path, message)


def of_unknown_type(path, name):
    """A golden file in which one tensor's type is a number that no package knows."""
    raw = bytearray((GOLDEN / "qwen3" / "model.gguf").read_bytes())
    axes = len(gguf_header.read(GOLDEN / "qwen3" / "model.gguf")[1][name].shape)
    # length and bytes of the name, number of axes, axes, type
    at = raw.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name) + 4 + 8 * axes
    assert int.from_bytes(raw[at : at + 4], "little") in (0, 1, 30)
    raw[at : at + 4] = (999).to_bytes(4, "little")
    path.write_bytes(raw)
    return path


def test_an_unknown_weight_type_is_refused_where_weights_are_needed(tmp_path):
    path = of_unknown_type(tmp_path / "new.gguf", K_NAME)
    refuses(path, path, f"tensor {K_NAME} has type 999", "install a newer gguf")
    metadata, tensors, _ = gguf_header.read(path)
    whole_metadata, whole, _ = gguf_header.read(GOLDEN / "qwen3" / "model.gguf")
    assert metadata == whole_metadata
    assert tensors[K_NAME].kind == 999
    # It is as long as the file leaves room for: what it was, and padding to 32 bytes.
    assert 0 <= tensors[K_NAME].nbytes - whole[K_NAME].nbytes < 32
    found, want = read_geometry(path), read_geometry(GOLDEN / "qwen3" / "model.gguf")
    assert found.layers == want.layers
    assert found.weights_bytes == want.weights_bytes + tensors[K_NAME].nbytes - whole[K_NAME].nbytes


def test_unsupported_architecture(tmp_path):
    path = write(tmp_path / "bad.gguf", arch="gemma3n")
    with pytest.raises(TurboqError) as caught:
        load_model(path)
    assert str(caught.value) == (
        f"{path}: architecture 'gemma3n' is not supported (nearest: gemma3; `turboq memory` counts "
        "its cache, and `turboq calibrate --captured` plans its Hugging Face folder if "
        "transformers, of the extra hf, runs it)"
    )
    path = write(tmp_path / "bad.gguf", arch="wavtokenizer-dec")
    refuses(path, "is not supported (supported: llama, qwen2, qwen3, qw", "`turboq memory` counts")


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
    refuses(path, path, "both rope_freqs.weight and another rope scaling")


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
    path.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    refuses(path, path, "is a big-endian GGUF file", "gguf-convert-endian")
    for version in (1, 4, 3 << 16):
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
    source.metadata, source._tensors, data = gguf_header.read(source.path)
    source._data, source.files = [data], [source.path]
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
