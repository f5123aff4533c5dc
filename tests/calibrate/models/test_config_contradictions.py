"""Fields of a `config.json` that say one thing differently: what the error says to do is right."""

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config import model_spec

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 100, "head_dim": 16, "max_position_embeddings": 8192,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LINEAR_2, LINEAR_4 = ({"rope_type": "linear", "factor": x, "rope_theta": 1e4} for x in (2.0, 4.0))
BOTH = f"rope_parameters={quoted(LINEAR_2)} and rope_scaling={quoted(LINEAR_4)}"
LINEAR, FULL = "linear_attention", "full_attention"
HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
GRANITE = {
    "mamba_n_heads": 8, "mamba_d_state": 8, "num_local_experts": 0, "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
}  # fmt: skip

# model type, its two fields, the one that is not read (a path), the words of the error.
READ = {
    "rope": (
        "llama", {"rope_parameters": LINEAR_2, "rope_scaling": LINEAR_4}, ("rope_parameters",),
        BOTH, "rope_scaling",
    ),
    "theta": (
        "llama", {"rope_parameters": LINEAR_2, "rope_theta": 5e5}, ("rope_theta",),
        "rope_theta=500000.0 and 10000.0 among the rope parameters", "the latter",
    ),
    "part": (
        "glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5}, ("partial_rotary_factor",),
        "partial_rotary_factor=0.5 and 0.25 among the rope parameters", "the latter",
    ),
    "theta of sliding layers": (
        "gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "default",
        "rope_theta": 2e4}, "full_attention": {"rope_type": "default", "rope_theta": 3e4}},
        "rope_local_base_freq": 7e4, "sliding_window": 64}, ("rope_local_base_freq",),
        "rope_theta=70000.0 and 20000.0 among the rope parameters", "the latter",
    ),
    "kind of rope": (
        "llama", {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
        ("rope_scaling", "type"), "rope_type='linear' and type='dynamic'", "rope_type",
    ),
    "pattern": (
        "gemma3_text", {"sliding_window_pattern": 2, "_sliding_window_pattern": 3,
        "sliding_window": 64}, ("_sliding_window_pattern",),
        "sliding_window_pattern=2 and _sliding_window_pattern=3", "sliding_window_pattern",
    ),
    "interval": (
        "qwen3_next", {"full_attention_interval": 4, "layer_types": [LINEAR, FULL] * 2, **HYBRID},
        ("full_attention_interval",), "layer_types and full_attention_interval=4", "layer_types",
    ),
    "kinds": (
        "granitemoehybrid", {"layer_types": [LINEAR, FULL] * 2,
        "layers_block_type": [FULL, LINEAR] * 2, **GRANITE}, ("layer_types",),
        "layer_types and layers_block_type", "layers_block_type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_copy_of_the_file_as_advised_is_what_transformers_reads(name):
    family, fields, unread, said, used = READ[name]
    file = {"model_type": family, **SMALL, **fields}
    with pytest.raises(TurboqError) as caught:
        model_spec(file, "x")
    assert str(caught.value).endswith(
        f": {said} contradict each other: transformers reads {used}, as does a copy of the "
        "file without the other here"
    )
    config = CONFIG_MAPPING[family](**json.loads(json.dumps(SMALL | fields)))
    ours = json.loads(config.to_json_string(use_diff=False))
    for key in ("full_attention_interval", "_sliding_window_pattern", "layers_block_type"):
        ours.pop(key, None)
    ours.get("rope_parameters", {}).pop("type", None)  # transformers keeps what it does not read
    copy = json.loads(json.dumps(file))
    inner = copy
    for key in unread[:-1]:
        inner = inner[key]
    del inner[unread[-1]]
    assert model_spec(copy, "x").layers == model_spec(ours, "x").layers


SAID = {
    "experts": (
        {"model_type": "mixtral", "num_experts": 4, "num_local_experts": 8},
        "num_experts=4 and num_local_experts=8",
    ),
    "original context": (
        {"model_type": "llama", "original_max_position_embeddings": 1024, "rope_scaling": {
            "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings=1024 and 4096 among the rope parameters",
    ),
    "rope of layers by kind": (
        {"model_type": "gemma3_text", "sliding_window": 64, "rope_scaling": LINEAR_4,
         "rope_parameters": {"full_attention": LINEAR_2}},
        BOTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_no_reader_can_decide_is_the_authors(name):
    """Transformers reads now the one, now the other, by model type: no copy is advised."""
    fields, said = SAID[name]
    with pytest.raises(TurboqError) as caught:
        model_spec({**SMALL, **fields}, "x")
    assert str(caught.value).endswith(
        f": {said} contradict each other: the model's authors must mend the file"
    )


def test_a_factor_without_a_kind():
    with pytest.raises(TurboqError) as caught:
        model_spec({"model_type": "llama", **SMALL, "rope_scaling": {"factor": 2.0}}, "x")
    assert str(caught.value).endswith(
        "{'factor': 2.0} names no rope type: the model's authors must add it (transformers would "
        "not scale)"
    )
    fields: dict[str, Any] = SMALL | {"rope_scaling": {"factor": 2.0}}
    config = CONFIG_MAPPING["llama"](**fields)
    assert config.rope_parameters["rope_type"] == "default"


def test_quantized_weights_by_the_outer_word():
    """As transformers: what the outer configuration says is `quantization_config` of the model."""
    text = {"model_type": "mistral", **SMALL, "quantization_config": {"quant_method": "a"}}
    file = {
        "model_type": "mistral3", "text_config": text, "quantization_config": {"quant_method": "b"},
    }  # fmt: skip
    with pytest.raises(TurboqError) as caught:
        model_spec(file, "x")
    assert str(caught.value) == (
        "x: config.json: quantization_config={'quant_method': 'b'} and "
        "text_config.quantization_config={'quant_method': 'a'} contradict each other: transformers "
        "reads the outer one, as does a copy of the file without the other here"
    )
