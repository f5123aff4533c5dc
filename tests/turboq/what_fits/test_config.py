"""Cache geometry from config.json and GGUF metadata: transformers' classes as oracle, hostility."""

import collections
import json

import pytest
from transformers import CONFIG_MAPPING

from turboq.errors import TurboqError
from turboq.what_fits import CacheLayer, from_config, from_metadata

Shape = tuple[str, int, int, int | None]  # kind, KV heads, dim, window

# model_type -> fields that differ from the class's defaults.
FAMILIES: dict[str, dict] = {
    "llama": {"num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral": {},
    "mixtral": {"sliding_window": 100},
    "phi3": {"sliding_window": 2047, "num_key_value_heads": 8},
    "qwen2": {"num_attention_heads": 64},
    "qwen3": {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 5},
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": 128},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 5},
    "qwen3_next": {"num_hidden_layers": 12},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "gemma2": {"num_hidden_layers": 7},
    "gemma3_text": {"num_hidden_layers": 34, "sliding_window": 1024},
    "gemma3n_text": {},
    "gemma4_text": {"num_hidden_layers": 14, "num_kv_shared_layers": 4},
    "gpt_oss": {"num_hidden_layers": 5},
    "cohere2": {"num_key_value_heads": 8},
    "llama4_text": {"num_hidden_layers": 8},
    "olmo3": {},
    "smollm3": {"use_sliding_window": True, "sliding_window": 512},
    "afmoe": {"num_key_value_heads": 4},
    "cwm": {"num_hidden_layers": 9},
    "exaone4": {"num_hidden_layers": 9},
    "exaone_moe": {"num_hidden_layers": 6, "num_key_value_heads": 8},
    "granite_swa": {"num_hidden_layers": 9},
    "minimax": {"num_hidden_layers": 5},
    "mimo_v2_flash": {"num_hidden_layers": 13},
    "phimoe": {"sliding_window": 99},
    "dots1": {},
    "vaultgemma": {"num_hidden_layers": 7},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4, "num_hidden_layers": 8},
}


def of_class(config) -> list[Shape]:
    """What transformers' own configuration object says of every layer."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        # Families without layer_types slide everywhere once a window is set; not by a switch.
        slides = window is not None and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    out: list[Shape] = []
    for index, kind in enumerate(types):
        layer = config.per_layer_config[index] if config.model_type == "gemma4_text" else config
        heads = layer.num_key_value_heads
        dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        if index >= len(types) - shared:
            out.append(("shared", 0, 0, None))
        elif kind in ("linear_attention", "mamba"):
            out.append(("none", 0, 0, None))
        elif kind == "full_attention":
            out.append(("full", heads, dim, None))
        else:
            chunk = kind == "chunked_attention"
            out.append(
                (
                    "sliding", heads, dim,
                    config.attention_chunk_size if chunk else config.sliding_window,
                )
            )  # fmt: skip
    return out


def shapes(found) -> list[Shape]:
    return [(x.kind, x.kv_heads, x.k_dim, x.window) for x in found.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_transformers(family):
    fields = FAMILIES[family]
    config = CONFIG_MAPPING[family](**fields)
    expected = of_class(config)
    written = json.loads(config.to_json_string())
    found = from_config(written, family)
    assert shapes(found) == expected
    assert found.context == config.max_position_embeddings
    assert all(x.v_dim == getattr(config, "v_head_dim", x.k_dim) for x in found.layers if x.stores)


DERIVED = {
    "qwen3": FAMILIES["qwen3"], "qwen2_moe": FAMILIES["qwen2_moe"],
    "smollm3": FAMILIES["smollm3"], "qwen3_next": {"num_hidden_layers": 12}, "qwen3_5_text": {},
    "gemma2": {"num_hidden_layers": 7}, "gemma3_text": {}, "gemma3n_text": {},
    "gemma4_text": {"num_hidden_layers": 14}, "gpt_oss": {}, "cohere2": {}, "llama4_text": {},
    "afmoe": {}, "cwm": {}, "exaone4": {}, "exaone_moe": {}, "granite_swa": {}, "minimax": {},
    "mimo_v2_flash": {}, "olmo3": {}, "vaultgemma": {},
}  # fmt: skip


@pytest.mark.parametrize("family", DERIVED)
def test_layer_kinds_that_a_file_leaves_out(family):
    """Older files have no layer_types: the pattern of the class holds."""
    config = CONFIG_MAPPING[family](**DERIVED[family])
    expected = of_class(config)
    written = json.loads(config.to_json_string())
    for key in ("layer_types", "no_rope_layers", "per_layer_config"):
        written.pop(key, None)
    assert shapes(from_config(written, family)) == expected


# A file may leave out what is a default of its class (multimodal text_configs do).
@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"],
)  # fmt: skip
def test_defaults_are_those_of_transformers(family):
    config = CONFIG_MAPPING[family]()
    found = from_config({"model_type": "any", "text_config": {"model_type": family}}, "x")
    assert shapes(found) == of_class(config)
    assert found.context == config.max_position_embeddings
    with pytest.raises(TurboqError, match="num_hidden_layers is missing"):
        from_config({"model_type": family}, "x")  # of a file of its own the sizes are asked for


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gpt_oss", "cohere2"])
def test_defaults_beside_the_size(family):
    config = CONFIG_MAPPING[family]()
    size = {
        k: getattr(config, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    }
    assert shapes(from_config({"model_type": family, **size}, "x")) == of_class(config)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_latent_attention_keeps_one_vector(family):
    written = json.loads(CONFIG_MAPPING[family](num_hidden_layers=3).to_json_string())
    found = from_config(written, family)
    assert found.layers == (CacheLayer(kind="latent", kv_heads=1, k_dim=512 + 64),) * 3


def test_the_text_part_of_a_multimodal_file():
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    found = from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "x")
    kinds = collections.Counter(shapes(found))
    assert kinds == {("sliding", 4, 256, 1024): 29, ("full", 4, 256, None): 5}
    inner = {"model_type": "llama", **LLAMA}
    assert shapes(from_config({"model_type": "llava", "text_config": inner}, "x"))[0][1:3] == (
        2,
        16,
    )


def test_gemma_4_full_layers():
    config = {
        "model_type": "gemma4_text", "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024,
        "num_global_key_value_heads": 4, "attention_k_eq_v": True,
    }  # fmt: skip
    kinds = collections.Counter(shapes(from_config(config, "x")))
    assert kinds == {("sliding", 16, 256, 1024): 50, ("full", 4, 512, None): 10}
    config["attention_k_eq_v"] = False  # as in transformers, the head count needs the switch
    assert ("full", 16, 512, None) in shapes(from_config(config, "x"))


def test_hybrid_patterns():
    common = LLAMA | {"num_hidden_layers": 4}
    letters = from_config(
        {"model_type": "nemotron_h", **common, "hybrid_override_pattern": "M-*M"}, "x"
    )
    assert [x.kind for x in letters.layers] == ["none", "none", "full", "none"]
    period = {"model_type": "jamba", **common, "attn_layer_period": 2, "attn_layer_offset": 1}
    assert [x.kind for x in from_config(period, "x").layers] == ["none", "full"] * 2


def test_state_of_gated_delta_layers():
    """32 heads of 128 x 128 in float32 per layer, and 3 tokens of 8192 channels in 16 bits."""
    config = CONFIG_MAPPING["qwen3_5_text"]()
    found = from_config(json.loads(config.to_json_string()), "x")
    assert found.state_bytes == 24 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)


LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3 must be a whole number of 1..1024"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers=10000.* must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide the 4"),
        ({"num_key_value_heads": [2, 2]}, "num_key_value_heads=.2, 2. must be"),
        ({"hidden_size": 65}, "hidden_size=65 is not a multiple"),
        ({"head_dim": 1 << 40}, "head_dim=1099511627776 must be"),
        ({"max_position_embeddings": 1e9}, "max_position_embeddings=1000000000.0 must be"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512 is .* 'llama' .*: name --geometry=LAYERSx"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types=.* must list one kind for each of the 2",
        ),
        ({"layer_types": ["full_attention", "telepathy"]}, "layer_types names 'telepathy'"),
        ({"layer_types": ["linear_attention"] * 2}, "no layer keeps a KV cache"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is missing"),
        ({"sliding_window": 64}, "sliding_window=64 without layer_types is not understood"),
        (
            {"num_kv_shared_layers": 2, "model_type": "gemma3n_text"},
            "num_kv_shared_layers=2 leaves none",
        ),
        ({"kv_compression_ratio": 4}, "kv_compression_ratio=4 is not understood"),
        ({"is_encoder_decoder": True}, "model_type 'llama' is an encoder with a decoder"),
        ({"index_head_dim": 128}, "index_head_dim=128 is not understood"),
        ({"multi_query": True}, "multi_query=True is not understood: name --geometry=LAYERSx"),
        ({"per_layer_config": {"0": {"skip_attention": True}}}, "not understood for layer 0"),
        ({"per_layer_config": {"x": {}}}, "has the key 'x'"),
        ({"model_type": None}, "no model_type"),
        ({"hybrid_override_pattern": "MX"}, "must be 2 of the letters"),
    ],
)
def test_hostile_and_unknown_fields_are_named(change, words):
    assert len(from_config({"model_type": "llama", **LLAMA}, "x").layers) == 2
    with pytest.raises(TurboqError, match=words):
        from_config({"model_type": "llama", **LLAMA, **change}, "x")


def test_long_values_are_cut_in_errors():
    with pytest.raises(TurboqError) as caught:
        from_config({"model_type": "llama", **LLAMA, "layer_types": ["full_attention"] * 999}, "x")
    assert len(str(caught.value)) < 200


HEADER = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 4096,
    "llama.embedding_length": 64, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}  # fmt: skip


def header(arch: str, **fields) -> dict:
    """Metadata of an architecture; `a__b` stands for a.b."""
    own = {k.replace("llama.", f"{arch}."): v for k, v in HEADER.items()}
    own |= {f"{arch}.{k.replace('__', '.')}": v for k, v in fields.items()}
    return own | {"general.architecture": arch}


def test_gguf_headers():
    plain = from_metadata(HEADER, "x")
    assert shapes(plain) == [("full", 2, 16, None)] * 2
    assert (plain.context, plain.weights_bytes) == (4096, None)
    gemma = header(
        "gemma3", block_count=7, attention__sliding_window=512, attention__key_length=256,
        attention__value_length=128,
    )  # fmt: skip
    found = from_metadata(gemma, "x")
    assert [x.kind for x in found.layers] == ["sliding"] * 5 + ["full", "sliding"]
    assert (found.layers[0].k_dim, found.layers[0].v_dim) == (256, 128)
    pattern = header(
        "gemma4", block_count=4, attention__sliding_window=512, attention__shared_kv_layers=1,
        attention__sliding_window_pattern=[True, True, False, True], attention__key_length=512,
        attention__value_length=512, attention__key_length_swa=256,
        attention__value_length_swa=256, attention__head_count_kv=[2, 2, 1, 2],
    )  # fmt: skip
    assert shapes(from_metadata(pattern, "x")) == [
        ("sliding", 2, 256, 512), ("sliding", 2, 256, 512), ("full", 1, 512, None),
        ("shared", 0, 0, None),
    ]  # fmt: skip
    latent = header(
        "deepseek2", attention__kv_lora_rank=512, rope__dimension_count=64,
        attention__key_length_mla=192,
    )  # fmt: skip
    assert from_metadata(latent, "x").layers[0].k_dim == 576
    hybrid = header("qwen35", block_count=8, full_attention_interval=4)
    assert [x.kind for x in from_metadata(hybrid, "x").layers] == (["none"] * 3 + ["full"]) * 2
    lists = header("granitehybrid", attention__head_count_kv=[0, 2])
    assert [x.kind for x in from_metadata(lists, "x").layers] == ["none", "full"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.block_count": 0}, "llama.block_count=0 must be a whole number of 1..1024"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": -4}, "head_count=-4 must be"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv=3 does not divide"),
        ({"llama.attention.head_count_kv": [2]}, "has no entry for layer 1"),
        ({"llama.attention.head_count_kv": 0}, "no layer keeps a KV cache"),
        ({"llama.embedding_length": 65}, "embedding_length=65 is not a multiple"),
        ({"llama.attention.kv_lora_rank": 512}, "kv_lora_rank=512 is not understood"),
        ({"llama.attention.indexer.key_length": 128}, "indexer.key_length=128 is not understood"),
        ({"llama.attention.shared_kv_layers": 2}, "shared_kv_layers=2 may change the cache"),
        ({"general.architecture": 5}, "general.architecture is missing"),
    ],
)
def test_damaged_gguf_metadata(change, words):
    with pytest.raises(TurboqError, match=words):
        from_metadata(HEADER | change, "x")


def test_a_window_of_an_unknown_pattern_is_refused():
    with pytest.raises(TurboqError, match=r"sliding_window=64 without .*pattern is not understood"):
        from_metadata(header("newarch", attention__sliding_window=64), "x")
