"""Hugging Face configurations: real models' geometry, v4 and v5 key names, and refusals."""

import collections
import json
from pathlib import Path

import pytest

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope, Scaling
from turboq.what_fits import from_config
from turboq_calibrate.models import cache_check
from turboq_calibrate.models.config import model_spec
from turboq_calibrate.models.families import FAMILIES, WRAPPERS
from turboq_calibrate.models.params import parameter_count
from turboq_calibrate.models.spec import Experts

GOLDEN = Path(__file__).parents[2] / "golden"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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


# (published configuration in the v4 key names, published parameter count, head_dim, context)
PUBLISHED = {
    "Llama-3.1-8B": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_ROPE,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "hidden_act": "silu",
        },
        8_030_261_248,
        128,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "num_hidden_layers": 24,
            "vocab_size": 151936,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 24,
        },
        494_032_768,
        64,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_hidden_layers": 28,
            "vocab_size": 151936,
            "head_dim": 128,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        596_049_920,
        128,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "is_llama_config": True,
            "rope_interleaved": False,
        },
        134_515_008,
        64,
    ),
}
# Published files of mixtures of experts; counts are of all experts.
PUBLISHED_MOE = {
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
         "num_local_experts": 8, "rope_theta": 1e6, "sliding_window": None,
         "router_aux_loss_coef": 0.02},
        46_702_792_704, Experts(count=8, chosen=2, intermediate=14336, renormalised=True),
    ),
    "Qwen1.5-MoE-A2.7B": (
        {"model_type": "qwen2_moe", "hidden_size": 2048, "num_attention_heads": 16,
         "num_hidden_layers": 24, "vocab_size": 151936, "num_experts": 60, "rope_theta": 1e6,
         "use_sliding_window": False, "max_window_layers": 21, "norm_topk_prob": False},
        14_315_784_192,
        Experts(count=60, chosen=4, intermediate=1408, renormalised=False, shared=5632),
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32,
         "head_dim": 128, "num_hidden_layers": 48, "vocab_size": 151936, "num_experts": 128,
         "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        30_532_122_624, Experts(count=128, chosen=8, intermediate=768, renormalised=True),
    ),
}  # fmt: skip
GEMMA_27B = {
    "model_type": "gemma3", "vision_config": {"hidden_size": 1152}, "image_token_index": 262144,
    "text_config": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "head_dim": 128,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        "model_type": "gemma3_text",
    },
}  # fmt: skip
# Published files leave most fields to the family's defaults; counts are of the decoder alone.
PUBLISHED_GEMMA = {
    "gemma-2-2b": (
        {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid"},
        2_614_341_888, 256**-0.5, {4096: 13, None: 13},
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
         "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512,
         "vocab_size": 262144, "sliding_window_pattern": 6, "rope_theta": 1000000,
         "rope_local_base_freq": 10000, "rope_scaling": None, "attn_logit_softcapping": None},
        999_885_952, 256**-0.5, {512: 22, None: 4},
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}},
        3_880_263_168, 256**-0.5, {1024: 29, None: 5},
    ),
    "gemma-3-27b": (GEMMA_27B, 27_009_346_304, 168**-0.5, {1024: 52, None: 10}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    settings, parameters, head_dim = PUBLISHED[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert spec.layers[0].head_dim == head_dim
    assert spec.context == settings["max_position_embeddings"]
    assert len(set(spec.layers)) == 1  # hashable and equal: one compile
    assert spec.layers[0].window is None
    assert spec.path(2) == "model.layers.2.self_attn"


@pytest.mark.parametrize("name", PUBLISHED_GEMMA)
def test_published_gemma(name):
    settings, parameters, scale, windows = PUBLISHED_GEMMA[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert collections.Counter(layer.window for layer in spec.layers) == windows
    assert len(set(spec.layers)) == 2
    assert spec.tied_embeddings
    assert spec.embed_scale == spec.hidden**0.5
    for layer in spec.layers:
        full = layer.window is None
        assert (layer.scale, layer.activation, layer.norm_offset) == (scale, "gelu_tanh", 1.0)
        if "gemma-3" in name:
            assert layer.rope.theta == (1e6 if full else 1e4)
            scaled = full and "1b" not in name
            assert layer.rope.scaling == (SCALED if scaled else None)
    assert spec.layers[-1].softcap == (50.0 if name == "gemma-2-2b" else None)
    assert spec.logit_softcap == (30.0 if name == "gemma-2-2b" else None)


@pytest.mark.parametrize("name", PUBLISHED_MOE)
def test_published_mixtures(name):
    settings, parameters, experts = PUBLISHED_MOE[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert {layer.experts for layer in spec.layers} == {experts}
    assert {layer.window for layer in spec.layers} == {None}
    assert spec.norm_eps == (1e-5 if name == "Mixtral-8x7B" else 1e-6)
    assert spec.layers[0].qkv_bias == (name == "Qwen1.5-MoE-A2.7B")


def test_some_layers_are_dense():
    fields = {"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 16}
    spec = model_spec(config("qwen3_moe", **fields, num_hidden_layers=6), "x")
    assert [layer.experts is None for layer in spec.layers] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert [layer.intermediate for layer in spec.layers] == [96, 0, 96, 96, 96, 0]
    on = {"use_sliding_window": True, "sliding_window": 7}
    spec = model_spec(config("qwen3_moe", **fields, **on), "x")
    assert [layer.window for layer in spec.layers] == [7, 7, 7]
    spec = model_spec(config("qwen2_moe", num_experts=4, **on), "x")
    assert [layer.window for layer in spec.layers] == [7, None, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "num_experts is missing"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts=4 and num_local_experts=8 con"),
        ({"num_experts": 4}, "num_experts_per_tok=8 of 4 experts"),
        ({"num_experts": 8, "norm_topk_prob": "yes"}, "norm_topk_prob='yes' must be true or false"),
        ({"num_experts": 8, "mlp_only_layers": "all"}, "mlp_only_layers='all' must be a list of"),
        ({"num_experts": 8, "decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a positive"),
    ],
)
def test_bad_mixtures(fields, message):
    with pytest.raises(TurboqError, match=message):
        model_spec(config("qwen3_moe", **fields), "some/folder")


SCALED = Scaling(type="linear", factor=8.0)


def gemma(**fields):
    """A small Gemma 3 configuration."""
    return config("gemma3_text", **fields)


def test_gemma_3_names_its_rotary_embeddings_by_kind_of_layer():
    linear = {"rope_type": "linear", "factor": 8.0}
    same = [
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_scaling": linear, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        {"rope_parameters": {"full_attention": linear}},
        {"rope_parameters": {"full_attention": linear, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_parameters": {"full_attention": linear}, "rope_scaling": linear},
    ]
    for fields in same:
        pattern = {"sliding_window_pattern": 3}
        layers = model_spec(gemma(**pattern, **fields), "x").layers
        assert [layer.window for layer in layers] == [4096, 4096, None], fields
        assert layers[0].rope == Rope(theta=1e4, dim=256), fields
        assert layers[2].rope == Rope(theta=1e6, dim=256, scaling=SCALED), fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, "must be given for full_attention and sliding"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 2.0}},
             "rope_local_base_freq": 3.0},
            "sliding layers: rope_theta=3.0 and 2.0 among",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "ntk", "factor": 2.0}}}, "'ntk'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
        ({"sliding_window": None}, "names sliding_attention but sliding_window is null"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be a positive"),
        ({"sliding_window_pattern": 6, "_sliding_window_pattern": 5}, "pattern=5 contradict"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a positive number"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be a positive"),
    ],
)  # fmt: skip
def test_what_gemma_3_does_not_do_is_refused(fields, message):
    with pytest.raises(TurboqError, match=message):
        model_spec(gemma(**fields), "some/folder")


@pytest.mark.parametrize(
    ("fields", "text", "message"),
    [
        ({}, None, "text_config is missing"),
        ({}, {"model_type": "llama"}, "text_config of model_type 'llama' is not supported in 'ge"),
        ({}, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config={'quant_method': 'fp8'} and text_config",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "weights are quantized"),
    ],
)
def test_parts_of_a_model_that_also_sees(fields, text, message):
    inside = {} if text is None else {"text_config": text}
    with pytest.raises(TurboqError, match=message):
        model_spec({"model_type": "gemma3", **fields, **inside}, "some/folder")


def test_the_outer_configuration_says_whether_the_head_is_the_embedding():
    """As in transformers 5, whose files always have it."""
    text = {"tie_word_embeddings": True, **config("mistral", sliding_window=None)}
    assert model_spec({"model_type": "mistral3", "text_config": text}, "x").tied_embeddings
    said = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": False}
    assert not model_spec(said, "x").tied_embeddings


def test_queries_that_grow():
    """Ministral 3 alone and inside Mistral 3; by its class's numbers where the file has none."""
    fields = config("ministral3", head_dim=16)
    assert model_spec(fields, "x").layers[0].query_growth == (0.1, 16384)
    inside = {"model_type": "mistral3", "text_config": fields}
    assert model_spec(inside, "x").layers == model_spec(fields, "x").layers
    grown = {"rope_type": "default", "llama_4_scaling_beta": 0.1}
    with pytest.raises(TurboqError, match=r"llama_4_scaling_beta=0\.1 is not supported"):
        model_spec(config("mistral", rope_parameters=grown), "x")
    with pytest.raises(TurboqError, match="rope llama_4_scaling_beta=None must be a positive"):
        model_spec(config("ministral3", rope_parameters={"rope_type": "default"}), "x")


@pytest.mark.parametrize(
    "family", ["llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen2_window", "qwen3"]
)
def test_v4_key_names_mean_the_same(family):
    new = json.loads((GOLDEN / family / "config.json").read_text())
    old = dict(new)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        old["rope_scaling"] = scaling | {"type": rope["rope_type"]}
    old.pop("layer_types", None)
    assert model_spec(old, "x") == model_spec(new, "x")


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {**LINEAR, "rope_theta": 1e6}, "rope_scaling": {**LINEAR}},
        {"rope_parameters": {**LINEAR}, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {**LINEAR, "type": "linear", "rope_theta": 1000000}},
        {"rope_parameters": {}, "rope_scaling": LINEAR},
        {"rope_parameters": None, "rope_scaling": LINEAR},
    ],
)
def test_rope_said_twice_in_agreement_is_read(fields):
    rope = model_spec(config(rope_theta=1e6, **fields), "x").layers[0].rope
    assert rope == Rope(theta=1e6, dim=16, scaling=Scaling(type="linear", factor=2.0))


def test_absent_fields_take_the_family_defaults():
    minimal = config()
    del minimal["num_key_value_heads"]
    spec = model_spec(minimal, "x")
    assert spec.layers[0].kv_heads == 4
    assert spec.layers[0].norm_eps == 1e-6
    assert spec.layers[0].rope == Rope(theta=10000.0, dim=16)
    assert not spec.tied_embeddings
    assert model_spec(config("mistral"), "x").layers[0].window == 4096
    assert model_spec(config("mistral", sliding_window=None), "x").layers[0].window is None
    assert model_spec(config("qwen3"), "x").layers[0].head_dim == 128
    assert model_spec(config("qwen2"), "x").layers[0].qkv_bias
    biased = model_spec(config("qwen3", attention_bias=True), "x").layers[0]
    assert biased.qkv_bias
    assert biased.o_bias


def test_windows_per_layer():
    on = {"use_sliding_window": True, "sliding_window": 7}
    explicit = ["sliding_attention", "full_attention", "sliding_attention"]
    cases = [
        ({**on, "max_window_layers": 2}, [None, None, 7]),
        ({**on, "max_window_layers": 0}, [7, 7, 7]),
        ({**on, "max_window_layers": 9}, [None] * 3),
        ({**on, "layer_types": explicit}, [7, None, 7]),
        ({"sliding_window": 7, "max_window_layers": 0}, [None] * 3),
        ({**on, "sliding_window": None, "max_window_layers": 0}, [None] * 3),
    ]
    for fields, expected in cases:
        spec = model_spec(config("qwen3", **fields), "x")
        assert [layer.window for layer in spec.layers] == expected, fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen4_moe"}, r"'qwen4_moe' is not supported \(nearest: qwen3_moe; `turb"),
        ({"model_type": "zzz"}, r"'zzz' is not supported \(supported: llama, mistral, .*captured`"),
        ({"attention_value_scale": 0.7}, "attention_value_scale=0.7 is not supported"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap=30.0 is not supported"),
        ({"attention_sink_size": 4}, "attention_sink_size=4 is not understood .* the cache$"),
        ({"swa_head_dim": 16}, "swa_head_dim=16 may change the cache, and is not what layers of"),
        ({"v_head_dim": 8}, "v_head_dim=8 may change the cache"),
        ({"attn_config": {"kv_n_heads": 1}}, "num_key_value_heads=2 and attn_config.kv_n_heads=1"),
        ({"num_kv_heads": 1}, "num_key_value_heads=2 and num_kv_heads=1 are at odds"),
        ({"mamba_d_state": 16}, "mamba_d_state=16 may change the cache"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"query_pre_attn_scalar": 1}, "query_pre_attn_scalar=1 is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size='many' must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is above"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of .*=3"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"sliding_window": 5}, "sliding_window and layer_types are not supported"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types is not"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "each of the 3 layers"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 3}, "layer_types must name"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "_window is off"),
        ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers=-1 must be"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional' is not"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope factor=None must be a positive"),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 0}}, "beta_fast=0 must be a positive"),
        ({"rope_scaling": {"type": "yarn", "truncate": 1}}, "truncate=1 must be true or false"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor=None must be a positive"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "must be below"),
        ({"rope_scaling": "linear"}, "rope parameters 'linear' are not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "are not supported"),
        ({"rope_scaling": []}, r"rope parameters \[\] are not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": LINEAR},
            r"rope_parameters=\{'rope_theta': 1000000.0\} and rope_scaling=\{'factor': 2.0, ",
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 4.0}},
            "'factor': 2.0, .* and rope_scaling=.*'factor': 4.0",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "theta=10000.0 and 1000"),
        (
            {"rope_scaling": {**LINEAR, "type": "yarn"}},
            "rope_type='linear' and type='yarn' contradict",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "names no rope type: the model"),
        ({"rope_theta": -1}, "rope_theta=-1 must be a positive"),
        ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers=\[1, 0, 1\] is not supported"),
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval=4 is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "must hold 0 or 1 for each of the 3"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 1]}, "must hold 0 or 1 for each"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "interval=0 must be a positive"),
        (
            {
                "model_type": "smollm3",
                "layer_types": ["sliding_attention"] * 3,
                "use_sliding_window": True,
            },
            "use_sliding_window is off or has no window",
        ),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2 is not supported"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling=0 must be a positive"),
        ({"model_type": "granite", "logit_scale": 0.5}, "logit_scale=0.5 is not supported"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        (
            {"quantization_config": {"bits": 4}},
            r"are quantized \(quant_method None\), which is not",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            r"\(quant_method 'gptq'\), which is not supported: give the checkpoint that they were",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": 1},
                }
            },
            r"quant_method 'compressed-tensors'",
        ),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000.*000 must be a positive number"),
        ({"hidden_size": 10**400}, "hidden_size=1000.*000 must be a positive whole number below"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map=.* is not supported"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    ],
)
def test_what_would_change_the_result_is_refused(fields, message):
    with pytest.raises(TurboqError, match=message) as caught:
        model_spec(config(**fields), "some/folder")
    assert "some/folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_refused_fields_pass():
    fields = {"logit_scale": 1.0, "num_experts": 0, "rope_interleaved": False, "clip_qkv": None}
    assert model_spec(config(**fields), "x") == model_spec(config(), "x")
    factors = {"residual_multiplier": None, "logits_scaling": 0, "embedding_multiplier": 1}
    assert model_spec(config(**factors), "x") == model_spec(config(), "x")
    assert model_spec(config(partial_rotary_factor=1.0), "x") == model_spec(config(), "x")


def test_supported_families_are_the_documented_ones():
    assert [*FAMILIES, *WRAPPERS] == [
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "olmo2", "olmo3"),
        *(
            "smollm3",
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "phi3",
            "glm",
            "glm4",
            "glm4_moe",
            "starcoder2",
        ),
        "cohere2",
        *("mixtral", "qwen2_moe", "qwen3_moe"),
        *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        *("deepseek_v2", "deepseek_v3", "kimi_k2", "gpt_oss"),
        *("gemma2", "gemma3_text", "gemma4_text"),
        *("gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe"),
    ]


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))
def test_the_planner_reads_the_same_layers(folder):
    """`what_fits` knows many more families and no weights; where both read one, they must agree."""
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    planned = from_config(config, folder)
    spec = model_spec(config, folder)
    assert [(x.kv_heads, x.k_dim, x.v_dim, x.window) for x in planned.layers] == [
        (0, 0, 0, None)
        if x.borrows_cache_of is not None  # counted once, where it is owned
        else (x.kv_heads, x.head_dim, x.v_head_dim, x.window)
        if x.latent is None
        else (1, x.head_dim + x.v_head_dim, 0, None)  # one vector
        for x in spec.layers
    ]
    # With longrope a model is read up to where longer sequences rotate otherwise.
    scaled = config.get("rope_parameters", {}).get("rope_type") == "longrope"
    original = config["original_max_position_embeddings"] if scaled else planned.context
    assert spec.context == original


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 1}, "layer 0 of qwen3 .* 2 KV heads, .* says 1 KV heads, K 128"),
        ({"head_dim": 32}, "K 128 and V 128 wide but its file says 2 KV heads, K 32 and V 32"),
        ({"num_hidden_layers": 2}, "3 layers, but 2 with a cache"),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
            "layer 2 of qwen3 .* V 128 wide but .* V 128 wide, window 9: this is not supported",
        ),
    ],
)
def test_a_cache_that_the_planner_reads_otherwise(change, words):
    spec = model_spec(config("qwen3"), "x")
    assert cache_check.check(spec, lambda: from_config(config("qwen3"), "x")) is spec
    with pytest.raises(TurboqError, match=words):
        cache_check.check(spec, lambda: from_config(config("qwen3", **change), "x"))
