"""Latent attention through the caches: queries meet stored latent vectors and rotated parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import GOLDEN
from tolerances import TOL

from turboq.cache import contiguous, model_cache
from turboq.cache.layer import KVLayer, TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.cache.simulate import simulate, simulated_attention
from turboq.codecs import IntAffine, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.numbers.rope import Rope
from turboq_calibrate.measure.attention_plugs import (
    Cached,
    Pooled,
    cached_by,
    packed_attend,
    pool_by,
    simulated_attend,
)
from turboq_calibrate.models import exact_attend, load_model
from turboq_kernels import cache_attention, fold_output, prefill_attention, projected_attention

K, V, TOKENS, HEADS = 8, 16, 11, 4  # channels of the rotated part and of the latent vector
ROPE = Rope(dim=K, theta=100.0, layout="interleaved")


@pytest.fixture(scope="module")
def spec():
    layer = load_model(GOLDEN / "deepseek_v3", resident=False).spec.layers[0]
    assert (layer.head_dim, layer.v_head_dim, layer.heads) == (K, V, HEADS)
    return dataclasses.replace(layer, rope=ROPE, softmax_scale=0.4)


def learned(rng, dim, segments):
    codec = Transform(dim=dim, segments=segments)
    fitted = codec.fit(Observed.of(rng.normal(size=(1, 60, dim)).astype(np.float32)))
    return codec, {name: jnp.asarray(x) for name, x in fitted.items()}


def layers(rng) -> dict[str, KVLayer]:
    """Codecs of each cache: apart by sides, and of the one pool."""
    common = {"policy": TokenPolicy(sinks=2, recent=3, exact_dtype="float32"), "latent": True}
    (k, k_arrays), (v, v_arrays) = learned(rng, K, ((8, 2),)), learned(rng, V, ((8, 2), (8, 1)))
    return {
        "by layer": uniform_layer(
            kv_heads=1, k=IntAffine(dim=K, bits=2), v=TurboQuantMSE(dim=V, bits=2), rope=ROPE,
            **common,
        ),
        "pool": uniform_layer(
            kv_heads=1, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays, rope=ROPE, rope_block=16,
            **common,
        ),
    }  # fmt: skip


def inputs(rng, tokens=TOKENS):
    shapes = ((HEADS, V + K), (1, K), (1, V))
    return tuple(jnp.asarray(rng.normal(size=(2, tokens, *s)), jnp.float32) for s in shapes)


def by_hand(layer, q, k, v, scale):
    """Float64: query t meets [v, k] of tokens up to it, exact among the first 2 and the last 3."""
    near = np.concatenate([v, k], axis=-1)[:, :, 0].astype(np.float64)
    k_hat, v_hat = simulate(layer, k, v)
    far = np.concatenate([v_hat, k_hat], axis=-1)[:, :, 0].astype(np.float64)
    out = np.empty((*q.shape[:3], V))
    for t in range(q.shape[1]):
        exact = np.array([s < 2 or s > t - 3 for s in range(t + 1)])[:, None]
        keys = np.where(exact, near[:, : t + 1], far[:, : t + 1])
        logits = np.einsum("bhd,bsd->bhs", np.asarray(q[:, t], np.float64), keys) * scale
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[:, t] = np.einsum("bhs,bse->bhe", p, keys[..., :V])
    return out


def steps(plug, spec, state, q, k, v):
    """A chunk of tokens, then one at a time."""
    plug, out = jax.jit(plug, static_argnums=0), []
    for start, stop in ((0, 7), *((t, t + 1) for t in range(7, TOKENS))):
        at = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        part, state = plug(spec, *(x[:, start:stop] for x in (q, k, v)), at, state)
        out.append(np.asarray(part))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("kind", ["by layer", "pool"])
def test_simulated_packed_and_step_by_step(rng, spec, kind):
    layer, (q, k, v) = layers(rng)[kind], inputs(rng)
    at = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (2, TOKENS))
    want = by_hand(layer, q, k, v, spec.scale)
    close = {"rtol": 0, "atol": TOL["packed_attention"]}
    fresh = model_cache.fresh([layer])
    assert (fresh is not None) == (kind == "pool")
    packed, _ = packed_attend(spec, q, k, v, at, layer if fresh is None else fresh[0])
    np.testing.assert_allclose(packed, want, **close)
    if fresh is None:
        whole = simulated_attention(layer, q, k, v, scale=spec.scale)
        np.testing.assert_allclose(whole, want, **close)
        cache = contiguous.init(layer, batch=2, capacity=TOKENS)
        found = steps(cached_by(None), spec, Cached(layer=layer, cache=cache), q, k, v)
    else:
        state, words = fresh[0].init(2, TOKENS)
        found = steps(pool_by(None), spec, Pooled(layer=state, words=words), q, k, v)
    np.testing.assert_allclose(found, want, **close)


def test_errors_are_those_of_what_queries_meet(rng, spec):
    """The mean squared error of logits, less what all keys of a sequence share, in float64."""
    layer, (q, k, v) = layers(rng)["by layer"], inputs(rng)
    at = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (2, TOKENS))
    out, errors = simulated_attend(spec, q, k, v, at, layer)
    want = by_hand(layer, q, k, v, spec.scale)
    np.testing.assert_allclose(out, want, rtol=0, atol=TOL["packed_attention"])
    k_hat, v_hat = simulate(layer, k, v)
    error = np.concatenate([v_hat - v, k_hat - k], axis=-1)[:, 2:, 0].astype(np.float64)
    logits = spec.scale * np.einsum("bthd,bsd->bths", q, error)
    want = logits.var(axis=-1).mean(axis=(1, 2))
    np.testing.assert_allclose(errors["k_logit_mse"][:, 0], want, rtol=1e-4)


def test_kernels_refuse_by_name_and_folded_outputs_agree(rng, spec):
    layer, (q, k, v) = layers(rng)["by layer"], inputs(rng)
    empty = contiguous.init(layer, batch=2, capacity=TOKENS)
    cache, tail = jax.jit(contiguous.write)(layer, empty, k, v)
    at = jnp.full((2, 1), TOKENS - 1, jnp.int32)
    last = {"q_positions": at, "scale": spec.scale}
    for name in ("triton", "mosaic_tpu"):
        with pytest.raises(ValueError, match="latent attention"):
            cache_attention(q[:, -1:], layer, cache, tail, implementation=name, **last)
    want = cache_attention(q[:, -1:], layer, cache, tail, **last)
    w_o = jnp.asarray(rng.normal(size=(HEADS, V, 5)), jnp.float32)
    got = projected_attention(q[:, -1:], layer, cache, tail, fold_output(layer, w_o), **last)
    due = np.einsum("bthe,hef->btf", np.asarray(want, np.float64), np.asarray(w_o, np.float64))
    np.testing.assert_allclose(got, due, rtol=0, atol=20 * TOL["packed_attention"])


def test_a_prompt_sees_itself_exactly(rng, spec):
    layer, (q, k, v) = layers(rng)["by layer"], inputs(rng)
    empty = contiguous.init(layer, batch=2, capacity=TOKENS)
    out, cache = prefill_attention(q, k, v, layer, empty, scale=spec.scale)
    at = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (2, TOKENS))
    want, _ = exact_attend(spec, q, k, v, at, None)
    np.testing.assert_allclose(out, want, rtol=0, atol=TOL["attention_f32"])
    written, _ = jax.jit(contiguous.write)(layer, empty, k, v)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(a, b)


LENGTHS, NEW = (70, 21), 3  # of two prompts: over the end of a page of 64, and within one


def continued(layer, spec, q, k, v, prompt):
    """A contiguous cache of one sequence: its prompt, then one token at a time."""
    cache, out = contiguous.init(layer, batch=1, capacity=256), []
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, q.shape[1]))):
        cache, tail = jax.jit(contiguous.write)(layer, cache, k[:, start:stop], v[:, start:stop])
        at = jnp.arange(start, stop, dtype=jnp.int32)[None]
        out.append(
            cache_attention(q[:, start:stop], layer, cache, tail, q_positions=at, scale=spec.scale)
        )
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("rope", [ROPE, None])
def test_sequences_in_a_pool_of_pages(rng, spec, rope):
    """Two prompts of their own lengths, a fork of one, and tokens of all three together: what the
    contiguous cache of each alone gives, and float64."""
    layer = dataclasses.replace(layers(rng)["by layer"], rope=rope)
    pool = Pool([layer], pages=8, rows=4, per_sequence=2, page=64)
    prompts = [[x[:1] for x in inputs(rng, tokens)] for tokens in LENGTHS]
    found = []

    def attend(names, q, k, v):
        where = pool.step(names, [q.shape[1]] * len(names))
        tail = pool.write(0, where, k, v)
        at = where.starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        return cache_attention(
            q, layer, pool.view(0, where), tail, q_positions=at, scale=spec.scale
        )

    names = [pool.pager.create() for _ in prompts]
    for name, prompt in zip(names, prompts, strict=True):
        found.append([attend([name], *prompt)])
    names.append(pool.pager.fork(names[0]))
    found.append(list(found[0]))
    whole = [*prompts, prompts[0]]
    for _ in range(NEW):
        new = [[x[:1] for x in inputs(rng, 1)] for _ in names]
        out = attend(names, *(jnp.concatenate(x) for x in zip(*new, strict=True)))
        whole = [
            [jnp.concatenate(x, axis=1) for x in zip(old, own, strict=True)]
            for old, own in zip(whole, new, strict=True)
        ]
        for i, outs in enumerate(found):
            outs.append(out[i : i + 1])
    close = {"rtol": 0, "atol": TOL["packed_attention"]}
    for outs, (q, k, v) in zip(found, whole, strict=True):
        got, prompt = np.concatenate(outs, axis=1), q.shape[1] - NEW
        np.testing.assert_allclose(got, continued(layer, spec, q, k, v, prompt), **close)
        np.testing.assert_allclose(got, by_hand(layer, q, k, v, spec.scale), **close)
