"""Generation through the packed cache against plain attention and against one parallel pass."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from plan_cases import random_fit
from tolerances import TOL

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulated_attention
from turboq.codecs import Exact, PerHead, Transform, TurboQuantMSE, TurboQuantProd
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, head_plan, uniform_plan
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.models import decoder, forward, load_model
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2, recent=3, exact_dtype="float32")


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


@pytest.fixture(scope="module")
def prompt(model):
    return np.random.default_rng(3).integers(0, model.spec.vocab, (2, 7)).astype(np.int32)


def layers_of(model, k, v=None, policy=POLICY):
    geometry = model_geometry(model)
    plan = uniform_plan(geometry, k=k, v=v or k, policy=policy)
    return plan.kv_layers(collect_arrays(plan, random_fit(geometry)))


def mixed(model):
    def choose(index, side, head):
        return TurboQuantMSE(dim=16, bits=2 + head)

    return head_plan(model_geometry(model), choose, policy=POLICY).kv_layers({})


def parallel(model, layers, tokens):
    """Logits of every position from one causal pass with simulated quantization."""

    def plug(spec, q, k, v, positions, layer):
        out = simulated_attention(
            layer, q, k, v, scale=spec.scale, window=spec.window, softcap=spec.softcap
        )
        return out, layer

    return np.asarray(forward(model, tokens, plug, layers)[0])


# mistral: a sliding window of 6; gpt_oss: logit sinks; qwen3_next: gated delta-nets;
# deepseek_v2: latent vectors
@pytest.mark.parametrize("family", ["llama3", "mistral", "gpt_oss", "qwen3_next", "deepseek_v2"])
def test_exact_cache_generates_what_plain_attention_does(family):
    model = load_model(GOLDEN / family)
    prompt = np.random.default_rng(5).integers(0, model.spec.vocab, (2, 4)).astype(np.int32)
    layers = layers_of(model, Exact(dim=16, dtype="float32"))
    plain = greedy(model, prompt, 12, keep_logits=True)
    cached = greedy(model, prompt, 12, layers=layers, keep_logits=True)
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_allclose(plain.logits, cached.logits, rtol=0, atol=TOL["decode_exact"])
    assert plain.tokens.shape == (2, 12)
    assert len(np.unique(plain.tokens)) > 4  # the model says something, so equality means something
    assert plain.cache_bytes == 0 < cached.cache_bytes


def test_plain_path_is_the_model_itself(model, prompt):
    got = greedy(model, prompt, 5, keep_logits=True)
    sequence = prompt
    for step in range(5):
        logits = np.asarray(forward(model, sequence)[0][:, -1])
        np.testing.assert_allclose(got.logits[:, step], logits, rtol=0, atol=TOL["decode_exact"])
        np.testing.assert_array_equal(got.tokens[:, step], logits.argmax(axis=-1))
        sequence = np.concatenate([sequence, got.tokens[:, step : step + 1]], axis=1)


CASES = {
    "prod and mse": lambda m: layers_of(
        m, TurboQuantProd(dim=16, bits=3), TurboQuantMSE(dim=16, bits=2), TokenPolicy()
    ),
    "per_head": lambda m: layers_of(
        m, PerHead(dim=16, bits=3), PerHead(dim=16, bits=2, scale="head")
    ),
    "mixed": mixed,
}


@pytest.mark.parametrize("case", CASES)
def test_decoding_step_by_step_is_one_parallel_pass(model, prompt, case):
    """Both see the same quantized K and V: what differs is float32 rounding (see TOL).

    A key or value whose rotated coordinate lies within rounding of a codebook threshold could get
    another code on the two paths, and a logit would then jump by far more than rounding; with
    these weights and this prompt none does.
    """
    layers = CASES[case](model)
    got = greedy(model, prompt, 9, layers=layers, keep_logits=True)
    sequence = np.concatenate([prompt, got.tokens[:, :-1]], axis=1)
    want = parallel(model, layers, sequence)[:, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=TOL["decode_packed"])
    # Quantization is felt: the agreement is not that of the exact model.
    exact = np.asarray(forward(model, sequence)[0])[:, prompt.shape[1] - 1 :]
    assert np.abs(exact - want).max() > 100 * TOL["decode_packed"]


def test_no_compilation_as_the_cache_grows(model, prompt):
    layers, run = CASES["per_head"](model), decoder.whole_layer_donated
    before = run._cache_size()
    greedy(model, prompt[:, :5], 2, layers=layers)
    assert run._cache_size() - before <= 2  # prefill and one step, shared by both layers
    after = run._cache_size()
    greedy(model, prompt[:, :5], 40, layers=layers)
    assert run._cache_size() == after


def test_cache_bytes_are_the_live_buffers(model, prompt):
    layers = CASES["per_head"](model)
    got = greedy(model, prompt, 3, layers=layers)
    assert got.cache_bytes == accounting.residency(layers, context=9, batch=2).cache
    assert got.logits is None


def test_callers_arrays_survive(model, prompt):
    layers = CASES["per_head"](model)
    first = greedy(model, prompt, 3, layers=layers)
    again = greedy(model, prompt, 3, layers=layers)  # donated buffers were copies
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert jnp.isfinite(layers[0].groups[0].k_arrays["mean"]).all()


def test_sequences_do_not_see_each_other(model, prompt):
    layers = CASES["per_head"](model)
    both = greedy(model, prompt, 4, layers=layers, keep_logits=True)
    other = greedy(model, prompt[[0, 0]], 4, layers=layers, keep_logits=True)
    for same in (other.logits[0], other.logits[1]):
        np.testing.assert_allclose(both.logits[0], same, rtol=0, atol=TOL["decode_exact"])
    assert np.abs(both.logits[0] - both.logits[1]).max() > 1


def test_bad_requests_are_one_clear_line(model, prompt):
    for match, arguments in [
        ("at least one token", (prompt[:, :0], 3)),
        ("steps=0", (prompt, 0)),
        ("context of 256", (prompt, 250)),
        ("within 0..319", (prompt + 320, 3)),
    ]:
        with pytest.raises(TurboqError, match=match):
            greedy(model, *arguments)
    with pytest.raises(ValueError, match="layers of the cache, 1, must be those that own one, 2"):
        greedy(model, prompt, 3, layers=layers_of(model, Exact(dim=16))[:1])
    broken = load_model(GOLDEN / "llama3")
    broken._head = broken._head | {"norm": broken._head["norm"] * jnp.float32(np.nan)}
    with pytest.raises(TurboqError, match=r"token 0 of sequence 0 are not finite: the model's own"):
        greedy(broken, prompt, 2)
    with pytest.raises(TurboqError, match="nothing that the caches store is to blame"):
        greedy(broken, prompt, 2, layers=layers_of(model, Exact(dim=16)))


def test_what_a_cache_cannot_store_is_named(prompt):
    """Values of one head far beyond float16 in one layer, of one token of the second sequence."""
    model = load_model(GOLDEN / "llama3")
    params, dim = model.layer(1), model.spec.layers[1].v_head_dim
    model._layers[1] = params | {"v": params["v"].at[dim : 2 * dim].multiply(1e7)}
    with pytest.raises(TurboqError) as error:
        greedy(model, prompt, 2, layers=layers_of(model, TurboQuantMSE(dim=16, bits=3)))
    assert re.fullmatch(
        r"logits of generated token 0 of sequence 0 are not finite: layer 1, v of head 1, "
        r"token \d+ \(norm [0-9.e+]+\): its scale exceeds float16: plan with "
        r"--scale_dtype=bfloat16",
        str(error.value),
    ), error.value
    wide = TurboQuantMSE(dim=16, bits=3, scale_dtype="bfloat16")
    assert greedy(model, prompt, 2, layers=layers_of(model, wide)).tokens.shape == (2, 2)


def learned(model, policy=POLICY):
    """Learned transforms that differ in every layer, side and head."""

    def choose(index, side, head):
        segments = ((8, 4 - head),) if side == "k" else ((8, 5), (8, 1 + index + head))
        return Transform(dim=16, segments=segments, gain="code")

    geometry = model_geometry(model)
    plan = head_plan(geometry, choose, policy=policy)
    return plan.kv_layers(collect_arrays(plan, random_fit(geometry)))


def test_learned_plans_share_one_cache_and_two_programs(model, prompt):
    """Prefill and one step, whatever the layers' bits; the logits are those of one pass."""
    layers = learned(model)
    before = decoder.whole_layer_donated._cache_size()
    got = greedy(model, prompt, 5, layers=layers, keep_logits=True)
    assert decoder.whole_layer_donated._cache_size() - before == 2
    sequence = np.concatenate([prompt, got.tokens[:, :-1]], axis=1)
    want = parallel(model, layers, sequence)[:, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=TOL["decode_packed"])


@pytest.mark.parametrize("make", [CASES["per_head"], learned])
def test_delta_nets_beside_packed_caches(make):
    """The one attention layer's cache, by itself or in a pool, and the others' states."""
    model = load_model(GOLDEN / "qwen3_next")
    prompt = np.random.default_rng(5).integers(0, model.spec.vocab, (2, 7)).astype(np.int32)
    layers = make(model)
    got = greedy(model, prompt, 6, layers=layers, keep_logits=True)
    sequence = np.concatenate([prompt, got.tokens[:, :-1]], axis=1)
    want = parallel(model, [None, layers[0], None], sequence)[:, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=TOL["decode_packed"])
    exact = np.asarray(forward(model, sequence)[0])[:, prompt.shape[1] - 1 :]
    assert np.abs(exact - want).max() > 100 * TOL["decode_packed"]
    with pytest.raises(ValueError, match="3, must be those that own one, 1"):
        greedy(model, prompt, 6, layers=layers * 3)


@pytest.mark.parametrize("codec", [PerHead, Transform])
def test_caches_that_several_layers_read(codec):
    """By themselves or in a pool: borrowers read what their owner stored, window and recent tokens
    included."""
    model = load_model(GOLDEN / "gemma4")
    geometry = model_geometry(model)

    def choose(index, side, head):
        dim = geometry.layers[index].k_dim
        return (
            PerHead(dim=dim, bits=3)
            if codec is PerHead
            else Transform(dim=dim, segments=((dim, 3),))
        )

    plan = head_plan(geometry, choose, policy=POLICY)
    layers = plan.kv_layers(collect_arrays(plan, random_fit(geometry)))
    assert len(layers) == 3
    prompt = np.random.default_rng(5).integers(0, model.spec.vocab, (2, 7)).astype(np.int32)
    got = greedy(model, prompt, 6, layers=layers, keep_logits=True)
    sequence = np.concatenate([prompt, got.tokens[:, :-1]], axis=1)
    read = [layers[n] for n in (0, 1, 2, 2, 1)]
    want = parallel(model, read, sequence)[:, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=TOL["decode_packed"])
    exact = np.asarray(forward(model, sequence)[0])[:, prompt.shape[1] - 1 :]
    assert np.abs(exact - want).max() > 100 * TOL["decode_packed"]


def test_windows_are_all_that_a_long_sequence_keeps(tmp_path):
    """Gemma 3 over three pages: tokens as of plain attention, sliding layers two pages each."""
    for file in (GOLDEN / "gemma3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    model = load_model(tmp_path)
    prompt = np.random.default_rng(5).integers(0, model.spec.vocab, (1, 508)).astype(np.int32)
    plain = greedy(model, prompt, 8, keep_logits=True)
    geometry = model_geometry(model)
    for codec in (
        Exact(dim=8, dtype="float32"),
        Transform(dim=8, segments=((8, 5),), gain="code"),
    ):
        plan = uniform_plan(geometry, k=codec, v=codec, policy=TokenPolicy())
        layers = plan.kv_layers(collect_arrays(plan, random_fit(geometry)))
        got = greedy(model, prompt, 8, layers=layers, keep_logits=True)
        sequence = np.concatenate([prompt, got.tokens[:, :-1]], axis=1)
        want = plain.logits if codec.name == "exact" else parallel(model, layers, sequence)[:, 507:]
        np.testing.assert_allclose(got.logits, want, rtol=0, atol=TOL["decode_packed"])
        page = 256 * layers[0].bits_per_token // 8
        assert got.cache_bytes == plan.cache_bytes(515) == (6 * 2 + 3) * page
