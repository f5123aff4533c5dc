"""Multi-head latent attention and grouped experts: against transformers, and by hand."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from model_files import GOLDEN, copy_of, refuses, rewrite, write
from tolerances import TOL

from turboq.codecs import Exact
from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq.plan import uniform_plan
from turboq_calibrate.models import exact_attend, forward, load_model
from turboq_calibrate.models.config import model_spec
from turboq_calibrate.models.decoder import met
from turboq_calibrate.models.experts import route
from turboq_calibrate.models.geometry import spec_geometry
from turboq_calibrate.models.hf_fp8 import scaled
from turboq_calibrate.models.latent_attention import expand
from turboq_calibrate.models.params import parameter_count
from turboq_calibrate.models.spec import Experts

FAMILIES = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_fp8", "kimi_k2")
COPIES = ("deepseek_v2_lite/model.gguf", "deepseek_v3/model.gguf", "kimi_k2/model.gguf")
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
       "weight_block_size": [128, 128]}  # fmt: skip
# Published files -> weights without those that draft, numbers cached of a token, softmax scale.
PUBLISHED = {
    "DeepSeek-V3": (
        {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
         "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 61,
         "vocab_size": 129280, "max_position_embeddings": 163840, "rope_theta": 10000,
         "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
         "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "ep_size": 1,
         "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
         "rope_scaling": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
         "quantization_config": FP8},
        671_026_419_200, 61 * 576, 192**-0.5 * (0.1 * np.log(40) + 1) ** 2,
    ),
    "DeepSeek-V2-Lite": (
        {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
         "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
         "vocab_size": 102400, "max_position_embeddings": 163840, "q_lora_rank": None,
         "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
         "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
         "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
         "rope_scaling": {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}},
        15_706_484_224, 27 * 576, 192**-0.5 * (0.0707 * np.log(40) + 1) ** 2,
    ),
    "Kimi-K2": (
        {"model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432,
         "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 61,
         "vocab_size": 163840, "max_position_embeddings": 131072, "rope_theta": 50000.0,
         "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "routed_scaling_factor": 2.827, "topk_method": "noaux_tc", "rms_norm_eps": 1e-6,
         "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "mscale": 1.0,
                          "mscale_all_dim": 1.0}},
        1_026_408_232_448, 61 * 576, 192**-0.5 * (0.1 * np.log(32) + 1) ** 2,
    ),
}  # fmt: skip


def golden(family):
    with np.load(GOLDEN / family / "golden.npz") as file:
        return dict(file)


def capturing(spec, q, k, v, positions, state):
    return exact_attend(spec, q, k, v, positions, None)[0], (q, k, v)


@pytest.mark.parametrize("family", FAMILIES + COPIES)
def test_logits_and_latents_are_those_of_transformers(family):
    """Latents as it caches them; absorbed queries give the products of its expanded ones."""
    path, family = GOLDEN / family, family.partition("/")[0]
    model, want = load_model(path), golden(family)
    logits, states = forward(model, want["tokens"], capturing, positions=want["positions"])
    same = {"rtol": 0, "atol": TOL["model_golden"]}
    np.testing.assert_allclose(logits, want["logits"], **same)
    for i, (q, k, v) in enumerate(states):
        spec, rotated = model.spec.layers[i], want[f"r{i}"]
        if family in (
            "deepseek_v3",
            "kimi_k2",
        ):  # transformers puts pairs of neighbours apart as it rotates them
            rotated = np.stack(np.split(rotated, 2, axis=-1), axis=-1).reshape(rotated.shape)
        np.testing.assert_allclose(v, want[f"c{i}"], **same)
        np.testing.assert_allclose(k, rotated, **same)
        keys = np.asarray(met(spec, k, v))[:, :, 0]
        ours = np.einsum("bthd,bsd->bths", q, keys) * spec.scale
        theirs = np.einsum("bthd,bshd->bths", want[f"q{i}"], want[f"k{i}"]) * spec.scale
        np.testing.assert_allclose(ours, theirs, **same)
        values = expand(spec, model.layer(i), jnp.repeat(v, spec.heads, axis=2))
        np.testing.assert_allclose(values, want[f"v{i}"], **same)


def test_what_the_checkpoints_cover():
    specs = [load_model(GOLDEN / family, resident=False).spec for family in FAMILIES]
    experts = [spec.layers[-1].experts for spec in specs]
    assert [bool(layer.experts) for layer in specs[2].layers] == [False, True, True]
    assert [(e.groups, e.chosen_groups, e.group_best) for e in experts] == [
        (4, 2, 1), (1, 1, 1), (4, 2, 2), (1, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert [e.scores for e in experts] == ["softmax"] * 2 + ["sigmoid"] * 3
    assert [spec.layers[0].latent.query_rank for spec in specs] == [10, None, 10, 10, 10]
    layouts = [spec.layers[0].rope.layout for spec in specs]
    assert layouts == ["interleaved"] * 3 + ["half", "interleaved"]
    assert specs[1].layers[0].rope == Rope(theta=10000.0, dim=8, layout="interleaved")
    magnitudes = [spec.layers[0].rope_magnitude for spec in specs]
    assert magnitudes == [magnitudes[0], 1.0, 1.0, magnitudes[0], 1.0]
    assert magnitudes[0] > 1.01  # a factor of its own beside that of the softmax


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    settings, parameters, numbers, scale = PUBLISHED[name]
    spec = model_spec(settings, name)
    assert parameter_count(spec) == parameters
    assert [layer.scale for layer in spec.layers] == pytest.approx([scale] * len(spec.layers))
    geometry = spec_geometry(spec, "x")
    exact = uniform_plan(geometry, k=Exact(dim=64), v=Exact(dim=64))
    assert exact.bytes_per_token == 2 * numbers
    assert {layer.rope_magnitude for layer in spec.layers} == {1.0}


def test_routing_by_hand(rng):
    """Groups by their two best corrected scores, experts by corrected scores, weights by scores."""
    experts = Experts(
        count=12, chosen=4, intermediate=1, renormalised=True, scores="sigmoid", correction=True,
        groups=4, chosen_groups=2, group_best=2, scale=2.5,
    )  # fmt: skip
    router, n = rng.normal(size=(12, 5)), rng.normal(size=(40, 5))
    bias = rng.normal(size=12)
    params = {"router": router, "router_correction": bias}
    chosen, weights = route(
        experts, {k: jnp.asarray(x, jnp.float32) for k, x in params.items()}, jnp.float32(n)
    )
    p = 1 / (1 + np.exp(-n @ router.T))
    for row, found, got in zip(p, np.asarray(chosen), np.asarray(weights), strict=True):
        groups = np.sort((row + bias).reshape(4, 3), axis=1)[:, -2:].sum(axis=1)
        allowed = [e for e in range(12) if e // 3 in np.argsort(groups)[-2:]]
        best = sorted(allowed, key=lambda e: row[e] + bias[e])[-4:]
        assert set(found.tolist()) == set(best)
        due = 2.5 * row[found] / row[found].sum()
        np.testing.assert_allclose(got, due, rtol=TOL["scale_f32"])


def small(**fields):
    config = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    return config | fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=4"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported .*noaux_tc"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "3 experts of 8 in 1 of 4 groups"),
        ({"n_group": 3}, "of 3 groups"),
        ({"moe_layer_freq": 2}, "moe_layer_freq other than 1"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be"),
        ({"sliding_window": 8}, "sliding_window and layer_types"),
        ({"qk_rope_head_dim": None}, "qk_rope_head_dim is missing"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True, "topk_method": "greedy"},
         "norm_topk_prob=True is not supported"),
        ({"quantization_config": FP8 | {"weight_block_size": None}},
         "weight_block_size=None: FP8 weights are read with one scale for each block of rows and "
         "columns alone (as [128, 128]): give the checkpoint that they were made from, or a GGUF "
         "file"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None: FP8 weights"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt='e5m2' is not supported: e4m3"),
        ({"model_type": "llama"}, "kv_lora_rank=16 is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(fields, message, tmp_path):
    if "quantization_config" not in fields:
        with pytest.raises(TurboqError, match=message):
            model_spec(small(**fields), "some/folder")
        return
    folder = copy_of(tmp_path, "deepseek_fp8")
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, folder, *message.split(" is not"))


def test_dense_layers_shared_experts_and_no_groups():
    settings = small(first_k_dense_replace=0, n_shared_experts=None, n_group=None, topk_group=None)
    first = model_spec(settings, "x").layers[0].experts
    assert (first.shared, first.groups, first.group_best) == (0, 1, 1)
    assert [e is None for e in (x.experts for x in model_spec(small(), "x").layers)] == [
        True, False, False,
    ]  # fmt: skip


def test_fp8_blocks_by_hand(rng):
    codes = rng.normal(size=(5, 7)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(1, 2, size=(3, 2)).astype(np.float32)
    want = [[np.float32(codes[i, j]) * scales[i // 2, j // 4] for j in range(7)] for i in range(5)]
    np.testing.assert_array_equal(scaled(codes, scales, (2, 4)), want)


def test_fp8_weights_without_scales_and_layers_that_draft(tmp_path):
    folder, name = copy_of(tmp_path, "deepseek_v3"), "model.layers.{}.self_attn.o_proj.weight"
    rewrite(folder, lambda t: t.update({name.format(3): t[name.format(0)]}))
    assert len(load_model(folder).spec.layers) == 3  # num_nextn_predict_layers is 1
    rewrite(folder, lambda t: t.update({name.format(4): t[name.format(0)]}))
    refuses(folder, name.format(4), "has no place")
    bare = copy_of(tmp_path, "deepseek_fp8")
    raw = (bare / "model.safetensors").read_bytes()
    scales = f"{name.format(0)}_scale_inv"
    assert raw.count(scales.encode()) == 1
    renamed = raw.replace(scales.encode(), scales.replace("scale_inv", "other_inv").encode())
    (bare / "model.safetensors").write_bytes(renamed)
    tail = (
        "FP8 weights are read with one scale for each block alone: give the checkpoint that they "
        "were made from, or a GGUF file"
    )
    has = f"{bare / 'model.safetensors'}: tensor {name.format(0)} has type F8_E4M3"
    with pytest.raises(TurboqError) as caught:
        load_model(bare)
    assert str(caught.value) == f"{has} without {scales}: {tail}"
    config = json.loads((bare / "config.json").read_text())
    del config["quantization_config"]
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.raises(TurboqError) as caught:
        load_model(bare)
    first = str(caught.value)
    assert first.startswith(f"{bare / 'model.safetensors'}: tensor model.layers.0.")
    assert first.endswith(
        f" has type F8_E4M3, and config.json has no quantization_config of method fp8: {tail}"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_gating_func": 1}, "expert_gating_func=1 with 4 groups is not supported"),
        ({"expert_gating_func": 3}, "expert_gating_func=3"),
        ({"attention.key_length_mla": 8}, "8 channels of a key, 8 of them rotated"),
        ({"attention.kv_lora_rank": None}, "attention.kv_lora_rank is missing"),
        ({"attention.key_length_mla": None}, "attention.key_length_mla is missing"),
        ({"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier and YaRN"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5 is not supported"),
        ({"rope.scaling.type": "none", "rope.scaling.yarn_beta_fast": 1.0}, "yarn_beta_fast=1.0"),
        ({"expert_group_used_count": 1}, "3 experts of 8 in 1 of 4 groups"),
    ],
)
def test_gguf_refuses_what_llama_cpp_does_otherwise(tmp_path, fields, message):
    named = {f"deepseek2.{name}": value for name, value in fields.items()}
    refuses(write(tmp_path / "model.gguf", "deepseek_v3", fields=named), message)
