"""Gemma 4 from a `config.json`: what differs from layer to layer, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from model_files import copy_of, rewrite

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope, inverse_frequencies
from turboq.what_fits import from_config
from turboq_calibrate.models import load_model
from turboq_calibrate.models.config import model_spec
from turboq_calibrate.models.geometry import spec_geometry
from turboq_calibrate.models.params import layer_shapes, parameter_count

GOLDEN = Path(__file__).parents[2] / "golden"
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "gemma-4-31b": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
        "num_attention_heads": 32, "num_key_value_heads": 16, "sliding_window": 1024,
        "attention_k_eq_v": True, "num_global_key_value_heads": 4,
        "hidden_size_per_layer_input": 0, "max_position_embeddings": 262144,
        "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0,
    },
    "gemma-4-e2b": {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
        "num_attention_heads": 8, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": [*[SLIDING] * 4, FULL] * 7, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip


MOE = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12,
}  # fmt: skip


def small(**fields):
    """A small valid configuration."""
    return {
        "model_type": "gemma4_text", "hidden_size": 32, "intermediate_size": 20, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "vocab_size": 100, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
        "layer_types": [SLIDING, FULL] * 2,
    } | fields  # fmt: skip


def test_31b_has_heads_by_layer_and_the_published_weights():
    spec = model_spec({"model_type": "gemma4_text"} | SIZES["gemma-4-31b"], "x")
    # The published count leaves out the norms of q and k and the layers' scalars.
    assert parameter_count(spec) == 30_697_309_440 + 50 * 2 * 256 + 10 * 2 * 512 + 60
    assert [layer.window for layer in spec.layers] == [*[1024] * 5, None] * 10
    sliding, full = spec.layers[0], spec.layers[5]
    assert (sliding.kv_heads, sliding.head_dim, sliding.values_are_keys) == (16, 256, False)
    assert (full.kv_heads, full.head_dim, full.values_are_keys) == (4, 512, True)
    assert (sliding.rope, sliding.scale, full.scale) == (Rope(theta=1e4, dim=256), 1.0, 1.0)
    # The first quarter of the pairs turns as in a whole head of 512, the others do not.
    turned = 1e6 ** -(np.arange(64) * 2 / 512)
    want = np.concatenate([turned, np.zeros(192)])
    np.testing.assert_allclose(inverse_frequencies(full.rope), want, rtol=1e-6)
    assert (spec.logit_softcap, spec.own_input, spec.shared) == (30.0, 0, 0)


def test_e2b_shares_caches_as_the_planner_counts_them():
    config = {"model_type": "gemma4_text"} | SIZES["gemma-4-e2b"]
    spec = model_spec(config, "x")
    borrowed = [layer.borrows_cache_of for layer in spec.layers]
    assert borrowed == [None] * 15 + [*[13] * 4, 14] * 4
    assert [i for i, layer in enumerate(spec.layers) if layer.lends] == [13, 14]
    assert {layer.intermediate for layer in spec.layers[15:]} == {2 * 6144}
    assert set(layer_shapes(spec.layers[14])) - set(layer_shapes(spec.layers[19])) == {
        "k", "v", "k_norm",
    }  # fmt: skip
    # One compiled function per kind: owners, lenders, borrowers, full and sliding.
    assert len(set(spec.layers)) == 6
    geometry = spec_geometry(spec, "f")
    planner = from_config(config, "x").layers
    stores = [(x.index, x.kv_heads, x.k_dim, x.v_dim, x.window) for x in geometry.cache_layers]
    assert stores == [
        (i, x.kv_heads, x.k_dim, x.v_dim, x.window) for i, x in enumerate(planner) if x.stores
    ]
    # The stream: the residual, K and V of a sliding and of a full layer, inputs of 35 layers.
    assert (spec.shared, spec.own_input) == (2 * 256 + 2 * 512, 256)
    assert [spec.layers[i].shared_at for i in (13, 14)] == [1536, 1536 + 2 * 256]
    assert {layer.own_input_at for layer in spec.layers} == {1536 + spec.shared}


def test_experts_are_beside_the_mlp():
    layer = model_spec(small(**MOE), "x").layers[0]
    assert (layer.intermediate, layer.experts.beside, layer.experts.chosen) == (20, True, 2)
    assert layer.experts.renormalised
    assert model_spec(small(**MOE | {"enable_moe_block": False}), "x").layers[0].experts is None


def test_transformers_own_way_to_say_it_is_the_same():
    said = small(attention_k_eq_v=True, num_global_key_value_heads=1)
    plain = {k: v for k, v in said.items() if "global" not in k}
    own = {"head_dim": 16, "num_key_value_heads": 1}
    other = model_spec(plain | {"per_layer_config": {"01": own, "3": own}}, "x")
    assert other.layers == model_spec(said, "x").layers
    assert [layer.kv_heads for layer in other.layers] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"enable_moe_block": True}, "num_experts is missing"),
        (MOE | {"top_k_experts": 5}, "top_k_experts=5 of 4 experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' is not"),
        ({"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99},
         "vocab_size_per_layer_input=99 must be vocab_size=100"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers=3 of 4 layers leaves full or sliding"),
        ({"layer_types": [FULL, SLIDING] * 2}, "layer_types must end with full_attention"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "must say the same head_dim"),
        ({"per_layer_config": {"1": {"head_dim": 4}, "3": {"head_dim": 8}}}, "must say the same"),
        ({"attention_k_eq_v": True, "num_global_key_value_heads": 3}, "multiple of the 3 KV heads"),
        ({"rope_parameters": {FULL: {"rope_type": "proportional", "partial_rotary_factor": 1.5}}},
         "partial_rotary_factor=1.5 of head_dim=16 must be at least one pair"),
        ({"rope_parameters": {SLIDING: {"rope_type": "proportional"}}},
         "rope type 'proportional' is not supported"),
        ({"global_head_dim": 15}, "head_dim=15 must be even"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_clear_line(fields, expected):
    with pytest.raises(TurboqError, match=expected):
        model_spec(small(**fields), "x")


def test_unused_weights_of_a_borrower_are_left_alone(tmp_path):
    """Published files have them, and transformers drops them; of other layers nothing is."""
    folder = copy_of(tmp_path, "gemma4")
    name = "model.layers.{}.self_attn.v_norm.weight"
    rewrite(folder, lambda t: t.update({name.format(3): np.ones(8, np.float32)}))
    assert load_model(folder, resident=False).spec.layers[3].borrows_cache_of == 2
    rewrite(folder, lambda t: t.update({name.format(2): np.ones(8, np.float32)}))
    with pytest.raises(TurboqError, match=r"layers\.2\.self_attn\.v_norm\.weight \(1 in all\)"):
        load_model(folder, resident=False)
