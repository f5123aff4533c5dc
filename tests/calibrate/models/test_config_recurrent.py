"""Hugging Face configurations of Qwen3-Next and Qwen3.5."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq_calibrate.models import load_model
from turboq_calibrate.models.config import model_spec
from turboq_calibrate.models.params import parameter_count
from turboq_calibrate.models.spec import DeltaNet, Experts, Mamba

GOLDEN = Path(__file__).parents[2] / "golden"
FULL, LINEAR = "full_attention", "linear_attention"
QWEN3_5 = {
    "attn_output_gate": True, "full_attention_interval": 4, "vocab_size": 248320,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "head_dim": 256, "hidden_act": "silu",
    "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "mtp_num_hidden_layers": 1,
    "max_position_embeddings": 262144, "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 1e7, "rope_type": "default"},
}  # fmt: skip
# Published files and counts of the decoder's weights.
PUBLISHED = {
    "Qwen3-Next-80B-A3B": (
        {"model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120,
         "num_hidden_layers": 48, "num_attention_heads": 16, "vocab_size": 151936,
         "full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_theta": 1e7,
         "rope_scaling": None, "decoder_sparse_step": 1, "mlp_only_layers": [],
         "max_position_embeddings": 262144, "norm_topk_prob": True},
        79_674_391_296, 32,
        Experts(count=512, chosen=10, intermediate=512, renormalised=True, shared=512),
    ),
    "Qwen3.5-0.8B": (
        {"model_type": "qwen3_5", "vision_config": {"depth": 12}, "tie_word_embeddings": True,
         "text_config": QWEN3_5 | {
            "model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24,
            "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
            "linear_num_value_heads": 16, "tie_word_embeddings": True}},
        752_393_024, 16, None,
    ),
    "Qwen3.5-27B": (
        {"model_type": "qwen3_5", "text_config": QWEN3_5 | {
            "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 17408,
            "num_attention_heads": 24, "linear_num_value_heads": 48,
            "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 16}},
        26_895_998_464, 48, None,
    ),
    "Qwen3.5-35B-A3B": (
        {"model_type": "qwen3_5_moe", "text_config": QWEN3_5 | {
            "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40,
            "num_attention_heads": 16, "linear_num_value_heads": 32, "num_experts": 256,
            "num_experts_per_tok": 8}},
        34_660_610_688, 32,
        Experts(count=256, chosen=8, intermediate=512, renormalised=True, shared=512),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    settings, parameters, value_heads, experts = PUBLISHED[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert spec.context == 262144
    assert [layer.recurrent is None for layer in spec.layers] == [False, False, False, True] * (
        len(spec.layers) // 4
    )
    delta, full = spec.layers[0], spec.layers[3]
    assert delta.recurrent == DeltaNet(
        key_heads=16, value_heads=value_heads, key_dim=128, value_dim=128, kernel=4
    )
    assert (delta.kv_heads, delta.rope, delta.output_gate) == (0, None, False)
    assert (full.rope, full.head_dim) == (Rope(theta=1e7, dim=64), 256)
    assert (full.qk_norm, full.output_gate, full.norm_offset) == ("head", True, 1.0)
    assert {layer.experts for layer in spec.layers} == {experts}


def config(model_type="qwen3_5_text", **fields):
    return {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100,
    } | fields  # fmt: skip


def test_layer_types_and_interval():
    def kinds(**fields):
        layers = model_spec(config(num_hidden_layers=5, **fields), "x").layers
        return "".join("a" if layer.recurrent is None else "d" for layer in layers)

    assert kinds() == "dddad"
    assert kinds(full_attention_interval=2) == "dadad"
    types = [FULL, LINEAR, LINEAR, FULL, LINEAR]
    assert kinds(layer_types=types) == "addad"
    with pytest.raises(TurboqError, match="layer_types and full_attention_interval=2 contradict"):
        kinds(layer_types=types, full_attention_interval=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "must name one of full_attention, linear_att"),
        ({"layer_types": [LINEAR] * 2}, "for each of the 3 layers"),
        ({"layer_types": [[LINEAR]] * 3}, "for each of the 3 layers"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads=24 must be a multiple of"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0 must be a positive"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' must be silu"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"sliding_window": 512}, "sliding_window=512 is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"num_experts": 8}, "num_experts=8 is not supported"),
        ({"model_type": "qwen3_5_moe_text", "mlp_only_layers": [1]}, "mlp_only_layers is not"),
        ({"model_type": "qwen3_5_moe_text", "decoder_sparse_step": 2}, "decoder_sparse_step other"),
        ({"model_type": "qwen3_5_moe_text", "norm_topk_prob": False}, "norm_topk_prob=False is"),
    ],
)
def test_what_is_not_done_is_refused(fields, message):
    with pytest.raises(TurboqError, match=message):
        model_spec(config() | fields, "x")


def test_drafting_layers_are_left_out_and_other_tensors_refused(tmp_path):
    folder = GOLDEN / "qwen3_next"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.norm.weight"]
    save_file(tensors | {"mtp.norm.weight": norm}, tmp_path / "model.safetensors")
    assert load_model(tmp_path).spec.layers == load_model(folder, resident=False).spec.layers
    bias = {"model.layers.0.linear_attn.conv1d.bias": norm}
    save_file(tensors | bias, tmp_path / "model.safetensors")
    with pytest.raises(TurboqError, match=r"conv1d.bias \(1 in all\) has no place in a qwen3_next"):
        load_model(tmp_path)
    settings = json.loads((folder / "config.json").read_text()) | {"linear_key_head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TurboqError, match=r"conv1d.weight has shape \[40, 1, 4\].*\[48, 1, 4\]"):
        load_model(tmp_path)


MIXER, ATTENTION = "mamba", "attention"
# As published: layers by their names before transformers 5.
GRANITE = {
    "model_type": "granitemoehybrid", "attention_bias": False, "attention_dropout": 0.0,
    "attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_act": "silu",
    "hidden_size": 1536, "init_method": "mup", "initializer_range": 0.1,
    "intermediate_size": 512, "layer_types": [
        ATTENTION if i in (5, 15, 25, 35) else MIXER for i in range(40)],
    "logits_scaling": 6, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 48, "mamba_proj_bias": False, "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 6,
    "num_hidden_layers": 40, "num_key_value_heads": 4, "num_local_experts": 64,
    "output_router_logits": False, "position_embedding_type": "nope", "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 1024, "tie_word_embeddings": True, "use_cache": True,
    "vocab_size": 100352,
}  # fmt: skip


def test_granite_4_tiny():
    spec = model_spec(GRANITE, "granite-4.0-h-tiny")
    mixers = [layer.recurrent for layer in spec.layers]
    assert [i for i, mixer in enumerate(mixers) if mixer is None] == [5, 15, 25, 35]
    assert mixers[0] == Mamba(
        heads=48, head_dim=64, groups=1, state_dim=128, kernel=4, conv_bias=True, bias=False,
        step_limits=(0.0, float("inf")),
    )  # fmt: skip
    full = spec.layers[5]
    assert (full.rope, full.kv_heads, full.head_dim, full.scale) == (None, 4, 128, 0.0078125)
    assert full.experts == Experts(
        count=64, chosen=6, intermediate=512, renormalised=True, shared=1024, shared_gate=False
    )
    assert (spec.embed_scale, full.residual_scale, spec.logit_scale) == (12, 0.22, 1 / 6)
    # By hand: embedding and norms, 36 mixers, 4 of attention, 40 of experts.
    mixer = 1536 * (2 * 3072 + 2 * 128 + 48) + 5 * (3072 + 2 * 128) + 3 * 48 + 3072 + 3072 * 1536
    experts = 3 * 1536 * (64 * 512 + 1024) + 64 * 1536
    attention = 2 * 1536 * 1536 + 2 * 512 * 1536
    assert parameter_count(spec) == (
        100352 * 1536 + 81 * 1536 + 36 * mixer + 4 * attention + 40 * experts
    )


def test_granite_4_micro_has_attention_alone():
    fields = {"layer_types": [ATTENTION] * 40, "num_local_experts": 0, "mamba_n_heads": 7}
    spec = model_spec(GRANITE | fields | {"position_embedding_type": "rope"}, "granite-4.0-micro")
    assert {layer.recurrent for layer in spec.layers} == {None}
    assert {layer.experts for layer in spec.layers} == {None}
    assert spec.layers[0].intermediate == 1024
    assert spec.layers[0].rope == Rope(theta=1e4, dim=128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mamba_n_heads": 50},
            "mamba_expand . hidden_size=3072 must be a multiple of mamba_n_hea",
        ),
        ({"mamba_n_groups": 5}, "mamba_n_heads=48 must be a multiple of mamba_n_groups=5"),
        ({"mamba_d_head": 32}, "mamba_d_head=32 must be 64"),
        ({"mamba_d_state": 0}, "mamba_d_state=0 must be"),
        ({"mamba_conv_bias": 1}, "mamba_conv_bias=1 must be true or false"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' must be silu"),
        ({"layer_types": None}, "layer_types and layers_block_type are missing"),
        ({"layer_types": [MIXER] * 40}, "no layer"),
        ({"layer_types": [MIXER] * 39}, "for each of the 40 layers"),
        ({"layer_types": ["conv"] * 40}, "must name one of full_attention, linear_attention"),
        ({"layers_block_type": [ATTENTION] * 40}, "layer_types and layers_block_type contradict"),
        ({"time_step_limit": [1.0, 0.5]}, "time_step_limit=.1.0, 0.5. must be two numbers"),
        ({"time_step_limit": [0.0, None]}, "must be two numbers"),
        (
            {"position_embedding_type": "alibi"},
            "position_embedding_type='alibi' must be rope, nope",
        ),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
)
def test_what_is_wrong_of_granite_4_is_refused(fields, message):
    with pytest.raises(TurboqError, match=message):
        model_spec(GRANITE | fields, "x")
