"""Hugging Face configurations of OLMo 2 and 3, SmolLM3, Granite 3, Phi-3, GLM-4, StarCoder2,
Cohere2 and gpt-oss."""

import math

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq.what_fits import from_config
from turboq_calibrate.models.config import model_spec
from turboq_calibrate.models.hf_gpt_oss import unpack
from turboq_calibrate.models.params import parameter_count

LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48}
# Published files of more families, and published counts of their weights.
PUBLISHED_MORE = {
    "OLMo-2-1124-7B": (
        {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
         "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 100352,
         "rope_theta": 500000, "attention_bias": False, "max_position_embeddings": 4096},
        7_298_617_344, 128,
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008,
         "num_attention_heads": 16, "num_hidden_layers": 36, "vocab_size": 128256,
         "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "sliding_window": None,
         "layer_types": ["full_attention"] * 36, "use_sliding_window": False},
        3_075_098_624, 128,
    ),
    "granite-3.1-8b": (
        {"model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 40,
         "vocab_size": 49155, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
         "logits_scaling": 16.0, "residual_multiplier": 0.22, "tie_word_embeddings": True,
         "rope_theta": 1e7, "rope_scaling": None},
        8_170_848_256, 128,
    ),
    "Phi-3-mini-4k": (
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
         "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
         "vocab_size": 32064, "rope_scaling": None, "sliding_window": 2047,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
        3_821_079_552, 96,
    ),
    "Phi-4-mini": (
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
         "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32,
         "vocab_size": 200064, "rope_scaling": LONG, "partial_rotary_factor": 0.75,
         "max_position_embeddings": 131072, "tie_word_embeddings": True, "mlp_bias": False},
        3_836_021_760, 128,
    ),
    "GLM-4-9B-0414": (
        {"model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696,
         "num_attention_heads": 32, "num_hidden_layers": 40, "vocab_size": 151552,
         "partial_rotary_factor": 0.5},
        9_400_279_040, 128,
    ),
    "starcoder2-3b": (
        {"model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288,
         "num_attention_heads": 24, "num_hidden_layers": 30, "vocab_size": 49152,
         "sliding_window": 4096, "mlp_type": "default", "norm_type": "layer_norm",
         "rope_theta": 999999.4420358813, "max_position_embeddings": 16384},
        3_030_371_328, 128,
    ),
    "Olmo-3-7B": (
        {"model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008,
         "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
         "vocab_size": 100278, "rope_theta": 500000, "max_position_embeddings": 65536,
         "sliding_window": 4096, "rope_scaling": {
             "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
             "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"}},
        7_298_011_136, 128,
    ),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
         "num_attention_heads": 64, "num_hidden_layers": 24, "vocab_size": 201088,
         "num_local_experts": 32, "experts_per_token": 4, "num_experts_per_tok": 4,
         "initial_context_length": 4096, "rope_theta": 150000, "swiglu_limit": 7.0,
         "sliding_window": 128, "attention_bias": True, "rope_scaling": {
             "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
             "original_max_position_embeddings": 4096, "truncate": False},
         "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
        20_914_757_184, 64,
    ),
}  # fmt: skip


def config(model_type="llama", **fields):
    """A small valid configuration."""
    base = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 100,
    }
    return base | fields


@pytest.mark.parametrize("name", PUBLISHED_MORE)
def test_published_models_of_more_families(name):
    settings, parameters, head_dim = PUBLISHED_MORE[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert {layer.head_dim for layer in spec.layers} == {head_dim}
    mixed = {None} if settings["model_type"] in ("olmo3", "gpt_oss") else set()
    assert {layer.window for layer in spec.layers} == {settings.get("sliding_window")} | mixed
    if "Phi" in name:  # the longest short sequence
        assert spec.context == 4096


def test_starcoder2_may_have_no_biases():
    layer = model_spec(config("starcoder2", use_bias=False), "x").layers[0]
    assert (layer.qkv_bias, layer.o_bias, layer.mlp_bias) == (False, False, False)
    assert layer.norm_eps == 1e-5
    with pytest.raises(TurboqError, match="attention_bias=True is not supported"):
        model_spec(config("starcoder2", attention_bias=True), "x")


def test_layers_without_rotary_embedding():
    def layers(**fields):
        return model_spec(config("smollm3", num_hidden_layers=4, **fields), "x").layers

    def turned(**fields):
        return [layer.rope is not None for layer in layers(**fields)]

    assert turned() == [True, True, True, False]
    assert turned(no_rope_layer_interval=2) == [True, False, True, False]
    assert turned(no_rope_layers=[0, 1, 1, 0], no_rope_layer_interval=2) == [
        False,
        True,
        True,
        False,
    ]
    assert {layer.window for layer in layers(sliding_window=7)} == {None}
    on = {"use_sliding_window": True, "sliding_window": 7}
    assert [layer.window for layer in layers(**on)] == [None, None, None, 7]
    types = ["sliding_attention", *["full_attention"] * 3]
    mixed = layers(**on, layer_types=types)
    assert [(layer.window, layer.rope is None) for layer in mixed] == [
        (7, False), (None, False), (None, False), (None, True),
    ]  # fmt: skip


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4 + [2.0] * 4, "long_factor": [4.0] * 8}


def phi(**fields):
    """A small Phi-3 configuration of heads of 16 channels."""
    return config("phi3", max_position_embeddings=16384, **fields)


def test_longrope_is_read_as_of_short_sequences():
    spec = model_spec(phi(rope_scaling=LONGROPE, sliding_window=9, auto_map={"A": "b.C"}), "x")
    layer = spec.layers[0]
    assert (spec.context, layer.window, layer.rope.dim) == (4096, 9, 16)
    want = [10000.0 ** (-2 * i / 16) / (1 if i < 4 else 2) for i in range(8)]
    assert layer.rope.inv_freq == pytest.approx(want, rel=1e-12)
    assert layer.rope_magnitude == pytest.approx((1 + math.log(4) / math.log(4096)) ** 0.5)
    old = model_spec(phi(rope_scaling={**LONGROPE, "type": "su"}), "x").layers[0]
    assert (old.rope, old.rope_magnitude) == (layer.rope, layer.rope_magnitude)
    said = model_spec(phi(rope_scaling={**LONGROPE, "attention_factor": 1.5}), "x").layers[0]
    assert said.rope_magnitude == 1.5
    part = {"partial_rotary_factor": 0.5, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    partial = model_spec(phi(rope_scaling={**LONGROPE, **part}), "x").layers[0]
    assert (partial.rope.dim, partial.head_dim) == (8, 16)
    plain = model_spec(phi(partial_rotary_factor=0.5), "x")
    assert (plain.layers[0].rope, plain.context) == (Rope(theta=10000.0, dim=8), 16384)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}},
            r"short_factor=\[1.0\] must hold 8",
        ),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7 + [0]}}, "long_factor=0 must be"),
        (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 9}},
            "=4096 and 9 among",
        ),
        ({"rope_scaling": {**LONGROPE, "type": "ntk"}}, "linear, dynamic, llama3, yarn, longrope"),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor=1.5 of head_dim=16 must be an even",
        ),
        ({"partial_rotary_factor": 0.45}, "must be an even number of channels, at most all"),
        (
            {"model_type": "llama", "rope_scaling": LONGROPE},
            "original_max_position_embeddings is missing",
        ),
    ],
)
def test_what_phi_3_does_not_do_is_refused(fields, message):
    with pytest.raises(TurboqError, match=message):
        model_spec(phi() | fields, "some/folder")


def yarn(**fields):
    """Frequencies over those of the base, and the factor on what is rotated."""
    told = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **fields}
    layer = model_spec(config(rope_scaling=told, max_position_embeddings=16384), "x").layers[0]
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    return np.array(layer.rope.inv_freq) / plain, layer.rope_magnitude


def test_yarn_keeps_what_turns_often_and_stretches_the_rest():
    """By hand: pair i turns 4096 f_i / 2 pi times within the original context."""
    turns = 4096 * 10000.0 ** -(np.arange(0, 16, 2) / 16) / (2 * math.pi)
    ratio, magnitude = yarn(truncate=False)
    assert magnitude == 0.1 * math.log(4) + 1
    low, high = (np.interp(-math.log(n), -np.log(turns), np.arange(8)) for n in (32, 1))
    ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(ratio, ramp / 4 + 1 - ramp, rtol=1e-9)
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(0.25)
    whole, _ = yarn()
    ramp = np.clip((np.arange(8) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    np.testing.assert_allclose(whole, ramp / 4 + 1 - ramp, rtol=1e-9)
    assert yarn(attention_factor=1.5)[1] == 1.5
    both = yarn(mscale=2.0, mscale_all_dim=1.0)[1]
    assert both == pytest.approx((0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit=5.0 is not supported: 7.0 is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        (
            {"model_type": "llama", "num_local_experts": 0,
             "quantization_config": {"quant_method": "mxfp4"}},
            "'mxfp4'",
        ),
    ],
)  # fmt: skip
def test_what_gpt_oss_does_not_do_is_refused(fields, message):
    base = config("gpt_oss", num_local_experts=4, head_dim=16)
    with pytest.raises(TurboqError, match=message):
        model_spec(base | fields, "x")


def test_mxfp4_by_its_bits():
    """Every code at two scales: sign, two bits of exponent, one of fraction, times 2^(s - 127)."""
    blocks = (np.arange(32, dtype=np.uint8) * 8 + 3).reshape(1, 2, 16)
    scales = np.array([[127, 120]], np.uint8)

    def value(code):
        sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
        size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
        return -size if sign else size

    want = [
        value(half) * 2.0 ** (int(scales[0, b]) - 127)
        for b in range(2)
        for byte in blocks[0, b].tolist()
        for half in (byte & 15, byte >> 4)
    ]
    np.testing.assert_array_equal(unpack(blocks, scales), [want])
    assert np.isnan(unpack(blocks, np.array([[127, 255]], np.uint8))[0, 32:]).all()


@pytest.mark.parametrize(
    "name", ["qk_head_dim", "qkv_dim", "meta_tokens", "lookback", "num_cycles"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_what_may_change_the_cache_is_refused_wherever_it_stands(family, name):
    """The decoder reads no such field; the planner, which reads the same file, names it."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {}
    small = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99,
        "max_position_embeddings": 128, **experts,
    }  # fmt: skip
    assert len(model_spec(small, "x").layers) == 2
    for fields, path in (({name: 32}, name), ({"more": {name: 32}}, f"more.{name}")):
        with pytest.raises(TurboqError) as caught:
            model_spec(small | fields, "x")
        assert str(caught.value) == (
            f"x: config.json: {path}=32 is not understood and may change the cache"
        )


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
def test_paligemma_is_refused_with_the_reason_and_counted(text):
    """Its prompt is read both ways: forwards alone it would be another model."""
    inner = {"model_type": text, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "sliding_window": 512, "vocab_size": 99}  # fmt: skip
    inner = inner if text == "gemma2" else {**inner, "sliding_window": None}
    file = {"model_type": "paligemma", "text_config": inner, "vision_config": {"image_size": 224}}
    with pytest.raises(TurboqError) as caught:
        model_spec(file, "x")
    assert str(caught.value) == (
        "x: model_type 'paligemma' is not supported: its Gemma or Gemma 2 reads the prompt both "
        "ways, and the decoder here reads all text forwards (`turboq memory` counts its cache)"
    )
    windows = [512, None] * 2 if text == "gemma2" else [None] * 4
    found = from_config(file, "x").layers
    assert [(x.kv_heads, x.k_dim, x.window) for x in found] == [(2, 16, w) for w in windows]
