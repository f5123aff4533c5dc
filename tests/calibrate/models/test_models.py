"""Every family against transformers' own outputs (tests/golden), and the ways to run a model."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import TOL

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models import (
    decoder,
    embed_tokens,
    exact_attend,
    forward,
    hf,
    load_model,
    run_layer,
)
from turboq_calibrate.models.nnx import Decoder
from turboq_calibrate.models.params import layer_shapes, parameter_count
from turboq_calibrate.models.spec import Mamba

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = (
    "llama",
    "llama3",
    "llama_bias",
    "smollm2",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3_vision",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen2_moe_all",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
    "phi3_window",
    "glm",
    "glm4",
    "starcoder2",
    "olmo3",
    "qwen3_dynamic",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "cohere2",
    "qwen3_5",
    "qwen3_5_vision",
    "qwen3_next",
    "qwen3_next_all",
    "qwen3_5_moe",
    "granite_hybrid",
    "granite_hybrid_dense",
    "mistral3",
    "ministral",
    "ministral3",
    "granitemoe",
    "glm4_moe",
    "gemma4",
    "gemma4_moe",
    "gemma4_vision",
)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
COPIES = (
    *("llama3", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"),
    *("olmo2", "smollm3", "granite", "phi3", "glm4", "starcoder2", "olmo3", "gpt_oss_mxfp4"),
    *("cohere2", "qwen2_moe_all", "glm4_moe"),
    *("gemma4", "gemma4_moe", "glm", "ministral3", "granitemoe", "granite_hybrid"),
    *("qwen3_next_all", "qwen3_5", "qwen3_5_moe"),
)


def capturing(spec, q, k, v, positions, state, *sinks):
    """An attention plug that hands out what it saw."""
    out, _ = exact_attend(spec, q, k, v, positions, None, *sinks)
    return out, (q, k, v)


def golden(family, file="golden"):
    with np.load(GOLDEN / family / f"{file}.npz") as stored:
        return dict(stored)


def check_against_golden(path, expected, **options):
    model = load_model(path, **options)
    logits, states = forward(model, expected["tokens"], capturing, positions=expected["positions"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOL["model_golden"])
    assert len(states) == len(model.spec.layers)
    for i, seen in enumerate(states):
        if model.spec.layers[i].recurrent is not None:
            assert f"k{i}" not in expected
            continue
        for name, value in zip("qkv", seen, strict=True):
            want = expected[f"{name}{i}"]
            np.testing.assert_allclose(value, want, rtol=0, atol=TOL["model_golden"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_qkv_are_those_of_transformers(family):
    check_against_golden(GOLDEN / family, golden(family))


@pytest.mark.parametrize("file", ["", "model.gguf"])
def test_longrope_of_long_sequences(file):
    """In transformers one token behind the original context turns all keys by the other factors."""
    expected = golden("phi3", "golden_long")
    assert expected["positions"].max() >= 80 > expected["positions"].min()
    check_against_golden(GOLDEN / "phi3" / file, expected, long_context=True)
    spec = load_model(GOLDEN / "phi3" / file, resident=False, long_context=True).spec
    spec.check_length(256, "windows")
    short = load_model(GOLDEN / "phi3" / file, resident=False).spec
    with pytest.raises(TurboqError, match=r"context of 80: .* --long_context \(long_context=True"):
        short.check_length(81, "windows")


@pytest.mark.parametrize("path", ["qwen3", "qwen3/model.gguf", "phi3_window"])
def test_a_long_form_of_a_model_that_has_none_is_refused(path):
    with pytest.raises(TurboqError, match="long_context is for longrope alone"):
        load_model(GOLDEN / path, resident=False, long_context=True)


@pytest.mark.parametrize("family", COPIES)
def test_gguf_copy_gives_the_same(family):
    check_against_golden(GOLDEN / family / "model.gguf", golden(family))


def test_golden_families_cover_what_they_claim():
    specs = {family: load_model(GOLDEN / family, resident=False).spec for family in FAMILIES}
    first = {family: spec.layers[0] for family, spec in specs.items()}
    assert [spec.family for spec in specs.values()] == [
        *["llama"] * 4,
        "mistral",
        *["qwen2"] * 2,
        "qwen3",
        "gemma2",
        *["gemma3_text"] * 2,
        *MIXTURES,
        "qwen2_moe",
        *("olmo2", "smollm3", "granite"),
        *["phi3"] * 2,
        *("glm", "glm4", "starcoder2", "olmo3", "qwen3"),
        *["gpt_oss"] * 2,
        "cohere2",
        *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen3_next", "qwen3_5_moe_text"),
        *["granitemoehybrid"] * 2,
        *("mistral", "ministral", "ministral3", "granitemoe", "glm4_moe"),
        *["gemma4_text"] * 3,
    ]
    assert first["llama3"].rope.scaling.type == "llama3"
    assert first["llama_bias"].rope.scaling == Scaling(type="linear", factor=2.5)
    assert first["llama_bias"].qkv_bias
    assert first["llama_bias"].o_bias
    assert first["llama_bias"].mlp_bias
    assert first["mistral"].window == 6
    assert [layer.window for layer in specs["qwen2_window"].layers] == [None, 5, 5]
    assert first["qwen2"].qkv_bias
    assert not first["qwen2"].o_bias
    assert first["qwen3"].qk_norm
    assert first["qwen3"].heads * first["qwen3"].head_dim != specs["qwen3"].hidden
    assert specs["llama3"].tied_embeddings
    assert not specs["llama"].tied_embeddings
    assert {spec.kv_heads for spec in first.values()} == {0, 1, 2, 4}
    assert [layer.window for layer in specs["gemma2"].layers] == [5, None, 5]
    assert [layer.window for layer in specs["gemma3"].layers] == [5] * 5 + [None, 5]
    assert first["gemma2"].softcap == 1.5
    assert specs["gemma2"].logit_softcap == 2.0
    assert first["gemma3"].rope == Rope(theta=1e4, dim=8)
    full = Rope(theta=5e4, dim=8, scaling=Scaling(type="linear", factor=4.0))
    assert specs["gemma3"].layers[5].rope == full
    assert first["gemma3_vision"].scale == 20**-0.5
    assert specs["gemma3_vision"].path(1) == "language_model.model.layers.1.self_attn"
    mixtures = {family: [layer.experts for layer in spec.layers] for family, spec in specs.items()}
    assert [bool(mixture) for mixture in mixtures["qwen2_moe"]] == [True, False, True]
    assert [mixtures[f][0].renormalised for f in MIXTURES] == [True, False, True]
    assert [mixtures[f][0].shared for f in MIXTURES] == [0, 10, 0]
    assert (first["olmo2"].pre_norms, first["olmo2"].post_norms) == (False, True)
    assert first["olmo2"].qk_norm == "projection"
    turned = [layer.rope is not None for layer in specs["smollm3"].layers]
    assert turned == [True, True, True, False, True]
    assert specs["smollm3"].layers[0].rope.theta == 2e6
    granite = specs["granite"]
    assert (granite.embed_scale, granite.logit_scale, first["granite"].scale) == (3, 0.4, 0.125)
    assert first["granite"].residual_scale == 0.4
    phi3, plain = first["phi3"], first["phi3_window"]
    assert (phi3.rope.dim, phi3.head_dim, specs["phi3"].context) == (12, 16, 80)
    assert phi3.rope_magnitude == math.sqrt(1 + math.log(256 / 80) / math.log(80))
    assert (plain.rope, plain.rope_magnitude, plain.window) == (Rope(theta=1e4, dim=8), 1.0, 5)
    turned = Rope(theta=1e4, dim=8, layout="interleaved")
    assert (first["glm4"].rope, first["glm4"].head_dim) == (turned, 16)
    assert first["glm"].rope == dataclasses.replace(turned, dim=4)
    assert [x.qkv_bias for x in (first["glm"], first["glm4"])] == [False, True]
    assert [x.post_norms for x in (first["glm"], first["glm4"])] == [False, True]
    assert not first["glm4"].o_bias
    star = first["starcoder2"]
    assert (star.norm, specs["starcoder2"].norm, star.gated) == ("layer", "layer", False)
    assert star.qkv_bias
    assert star.o_bias
    assert star.mlp_bias
    olmo3 = specs["olmo3"].layers
    assert [layer.window for layer in olmo3] == [5, 5, 5, None, 5]
    assert olmo3[0].rope == Rope(theta=5e5, dim=16)
    assert (olmo3[3].rope_magnitude, olmo3[0].rope_magnitude) == (1 + 0.1 * math.log(4), 1.0)
    # Short wavelengths are kept, long ones stretched, one lies between.
    kept = np.array(olmo3[3].rope.inv_freq) * 5e5 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(kept[[0, -1]], [1.0, 0.25])
    assert any(0.25 < ratio < 1.0 for ratio in kept)
    assert (first["qwen3_dynamic"].rope, specs["qwen3_dynamic"].context) == (
        Rope(theta=1e4, dim=8), 256,
    )  # fmt: skip
    oss = specs["gpt_oss"].layers
    assert [layer.window for layer in oss] == [5, None, 5]
    assert all(layer.logit_sinks and layer.experts.bias for layer in oss)
    assert (oss[0].activation, oss[0].qkv_bias, oss[0].o_bias) == ("clipped_swiglu", True, True)
    cohere2 = specs["cohere2"].layers
    assert [(layer.window, layer.rope is None) for layer in cohere2] == [
        *[(5, False)] * 3, (None, True), (5, False),
    ]  # fmt: skip
    assert (cohere2[0].norm, cohere2[0].parallel, cohere2[0].qkv_bias) == ("centred", True, True)
    assert specs["cohere2"].logit_scale == 0.5
    assert [layer.window for layer in specs["ministral"].layers] == [5, None]
    assert specs["mistral3"].path(0) == "language_model.model.layers.0.self_attn"
    assert (first["ministral3"].query_growth, first["ministral3"].rope_magnitude) == ((0.3, 8), 1)
    assert mixtures["granitemoe"][0].renormalised
    assert first["granitemoe"].scale == 0.125
    glm = specs["glm4_moe"].layers
    assert [bool(layer.experts) for layer in glm] == [False, True]
    assert (glm[1].experts.groups, glm[1].experts.shared, glm[1].experts.scale) == (4, 12, 1.7)
    assert (glm[0].rope.dim, glm[0].qk_norm, glm[0].qkv_bias, glm[0].o_bias) == (
        8, "head", True, False,
    )  # fmt: skip
    hybrids = [specs[name].layers for name in ("qwen3_5", "qwen3_5_vision", "qwen3_next")]
    kinds = [[layer.recurrent is not None for layer in layers] for layers in hybrids]
    assert kinds == [[True, False, True], [True, False], [True, False, True]]
    assert [bool(layer.experts) for layer in hybrids[2]] == [True, True, False]
    assert {layers[1].experts and layers[1].experts.shared for layers in hybrids} == {None, 10}
    for layers in hybrids:
        assert (layers[1].output_gate, layers[1].rope.dim, layers[1].head_dim) == (True, 4, 16)
        assert (layers[0].owns_cache, layers[1].owns_cache) == (False, True)
        assert layers[0].norm_offset == 1.0
    granites = [specs[name].layers for name in ("granite_hybrid", "granite_hybrid_dense")]
    for layers, experts in zip(granites, (4, None), strict=True):
        mamba, full = layers[0].recurrent, layers[1]
        assert isinstance(mamba, Mamba)
        assert (mamba.groups, mamba.conv_bias, mamba.bias) == (2, bool(experts), not experts)
        assert (full.rope is None, full.qkv_bias, full.scale) == (bool(experts), True, 0.125)
        assert (layers[0].qkv_bias, layers[0].residual_scale) == (False, 0.4)
        assert (full.experts and full.experts.count) == experts
    assert granites[0][1].experts.shared == 10
    assert not granites[0][1].experts.shared_gate
    assert granites[1][0].recurrent.step_limits == (0.4, 1.1)
    # Random norms and biases: a decoder that skips one of them cannot pass.
    norms = load_model(GOLDEN / "qwen3").layer(0)
    assert all(np.std(norms[name]) > 0.1 for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"))


@pytest.mark.parametrize("family", ["qwen3", "llama3", "llama3/model.gguf", "gemma2"])
def test_streaming_reads_the_same_and_keeps_nothing(family):
    resident, streamed = load_model(GOLDEN / family), load_model(GOLDEN / family, resident=False)
    tokens = golden(family.split("/")[0])["tokens"]
    want, got = forward(resident, tokens)[0], forward(streamed, tokens)[0]
    np.testing.assert_array_equal(got, want)
    assert streamed.layer(0)["q"] is not streamed.layer(0)["q"]
    assert resident.layer(0)["q"] is resident.layer(0)["q"]
    assert resident.fingerprint == streamed.fingerprint


@pytest.mark.parametrize("path", ["llama3", "llama", "qwen2/model.gguf"])
def test_streamed_embeddings_are_rows_of_the_table(path, monkeypatch):
    monkeypatch.setattr(hf, "ROWS", 50)  # several blocks, the last one short
    resident, streamed = load_model(GOLDEN / path), load_model(GOLDEN / path, resident=False)
    tokens = np.array([[95, 3, 0], [3, 50, 49]])
    want = np.asarray(resident.embed_params()["embedding"])[tokens]
    np.testing.assert_array_equal(embed_tokens(streamed, tokens), want)
    np.testing.assert_array_equal(embed_tokens(resident, tokens), want)
    np.testing.assert_array_equal(streamed.embed_params()["embedding"][tokens], want)


def test_a_streamed_layer_reads_only_its_own_tensors(monkeypatch):
    model = load_model(GOLDEN / "qwen3", resident=False)
    read = []
    original = type(model.source)._read
    monkeypatch.setattr(
        type(model.source),
        "_read",
        lambda self, wanted: read.append(wanted) or original(self, wanted),
    )
    model.layer(1)
    names = [name for name, _ in read[0].values()]
    assert len(read) == 1
    assert len(names) == len(layer_shapes(model.spec.layers[1]))
    assert all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize("family", ["gemma2", "starcoder2", "gpt_oss", "qwen3_next"])
def test_nnx_module_equals_the_functions(family):
    model, expected = load_model(GOLDEN / family), golden(family)
    module = Decoder.from_model(model)
    call = nnx.jit(lambda m, t, p: m(t, positions=p)[0])
    got = call(module, jnp.asarray(expected["tokens"]), jnp.asarray(expected["positions"]))
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOL["model_golden"])
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    assert sum(sizes) == parameter_count(model.spec)


def test_nnx_module_plugs_attention_and_has_gradients():
    model, expected = load_model(GOLDEN / "qwen2"), golden("qwen2")
    module = Decoder.from_model(model)
    tokens, positions = jnp.asarray(expected["tokens"]), jnp.asarray(expected["positions"])

    def loss(module):
        logits, states = module(tokens, capturing, positions=positions)
        return jnp.mean(jnp.square(logits)), states

    gradient, states = nnx.jit(nnx.grad(loss, has_aux=True))(module)
    np.testing.assert_allclose(states[1][1], expected["k1"], rtol=0, atol=TOL["model_golden"])
    assert float(jnp.max(jnp.abs(gradient["layers"][0]["v_bias"][...]))) > 0


def test_equal_layers_compile_once():
    traces = []

    def counting(spec, q, k, v, positions, state):
        traces.append(spec)
        return exact_attend(spec, q, k, v, positions, state)

    mixed = load_model(GOLDEN / "qwen2_window")
    tokens = golden("qwen2_window")["tokens"]
    for _ in range(2):
        forward(mixed, tokens, counting)
    # Three layers, two distinct specs (one full, two windowed), any number of runs.
    assert traces == [mixed.spec.layers[0], mixed.spec.layers[1]]


def test_states_go_through_the_layers_in_order():
    model = load_model(GOLDEN / "llama")

    def counting(spec, q, k, v, positions, state):
        return exact_attend(spec, q, k, v, positions, None)[0], state + jnp.sum(positions)

    tokens = golden("llama")["tokens"][:1]
    start = [jnp.int32(100), jnp.int32(200)]
    _, states = forward(model, tokens, counting, start)
    expected = sum(range(tokens.shape[1]))
    assert [int(s) for s in states] == [100 + expected, 200 + expected]
    assert [int(s) for s in start] == [100, 200]
    _, states = forward(model, tokens, counting, states, donate=True)
    assert [int(s) for s in states] == [100 + 2 * expected, 200 + 2 * expected]
    with pytest.raises(ValueError, match=r"len\(states\)=1 must be the number of layers, 2"):
        forward(model, tokens, counting, [None])


def test_future_tokens_do_not_matter():
    model, tokens = load_model(GOLDEN / "llama3"), golden("llama3")["tokens"]
    changed = tokens.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % model.spec.vocab
    before, after = forward(model, tokens)[0], forward(model, changed)[0]
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert float(jnp.max(jnp.abs(before[:, 8:] - after[:, 8:]))) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_may_be_kept_in_half_precision(dtype):
    # The llama3 copy is stored in bfloat16, smollm2 in float16: keeping that type loses nothing.
    family = {"bfloat16": "llama3", "float16": "smollm2"}[dtype]
    model, tokens = load_model(GOLDEN / family, dtype=dtype), golden(family)["tokens"]
    assert {str(w.dtype) for w in model.layer(0).values()} == {dtype}
    want = forward(load_model(GOLDEN / family), tokens)[0]
    np.testing.assert_allclose(forward(model, tokens)[0], want, rtol=0, atol=TOL["model_golden"])


def test_token_ids_outside_the_vocabulary_are_refused():
    model = load_model(GOLDEN / "llama", resident=False)
    for bad in (-1, model.spec.vocab):
        with pytest.raises(TurboqError, match=rf"token ids .* must be within 0\.\.{95}"):
            forward(model, np.array([[3, bad]], np.int32))


def test_unknown_weight_type_is_refused():
    with pytest.raises(TurboqError, match="dtype='int8' must be one of"):
        load_model(GOLDEN / "llama", dtype="int8")


def test_head_and_layer_take_the_model_apart():
    """The streamed loop that capture runs by hand is the same computation as `forward`."""
    model, tokens = load_model(GOLDEN / "mistral"), jnp.asarray(golden("mistral")["tokens"])
    x = decoder.run_embed(model.spec, model.embed_params(), tokens)
    positions = decoder.default_positions(tokens)
    for i, spec in enumerate(model.spec.layers):
        x, _ = run_layer(spec, model.layer(i), x, positions, exact_attend, None)
    logits = decoder.run_head(model.spec, model.head_params(), x)
    np.testing.assert_array_equal(logits, forward(model, tokens)[0])


def test_value_heads_may_have_their_own_width(rng):
    """Geometry is data: v_head_dim differs from head_dim and the layer still runs."""
    spec = dataclasses.replace(
        load_model(GOLDEN / "llama", resident=False).spec.layers[0], v_head_dim=10
    )
    params = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in layer_shapes(spec).items()
    }
    x = jnp.asarray(rng.standard_normal((1, 5, spec.hidden)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    out, (_, k, v) = run_layer(spec, params, x, positions, capturing, None)
    assert (k.shape, v.shape) == ((1, 5, 4, 8), (1, 5, 4, 10))
    assert out.shape == x.shape
