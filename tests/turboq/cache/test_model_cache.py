"""One pool for all layers: each head in its own bits, read back as the codecs themselves say."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import contiguous, model_cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.cache.simulate import simulate, simulated_attention
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.errors import TurboqError
from turboq.numbers.rope import Rope

DIM, HEADS, SCALE = 24, 3, 0.3
SEGMENTS = [((8, 3), (8, 1)), ((16, 2), (8, 1)), ((24, 4),), ((8, 2),)]
KINDS = {
    "scalar": {},
    "gain code": {"gain": "code", "gain_bits": 5},
    "gain float16, fitted": {"gain": "float16", "codebook": "fitted"},
    "trellis": {"quantizer": "trellis", "states": 4},
    "trellis, free start": {
        "quantizer": "trellis", "states": 8, "free_start": True, "gain": "code",
    },
    "window": {"quantizer": "window", "states": 16, "gain": "code"},
}  # fmt: skip


@functools.cache
def fitted(codec, heads, seed):
    """Arrays of a codec for so many heads, fitted once for all tests."""
    x = np.random.default_rng([heads, seed]).normal(size=(heads, 60, DIM)) * 0.8 ** np.arange(DIM)
    found = codec.fit(Observed.of(x.astype(np.float32)))
    return {name: jnp.asarray(a) for name, a in found.items()}


def make_layers(policy, rope=None, **options):
    """Two layers whose heads have other bits each, K and V alike, in groups out of order."""

    def group(heads, *segments):
        k, v = (Transform(dim=DIM, segments=each, **options) for each in segments)
        k_arrays, v_arrays = (fitted(c, len(heads), i) for i, c in enumerate((k, v)))
        return HeadGroup(heads=heads, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    a, b, c, d = SEGMENTS
    first = KVLayer(groups=(group((0, 2), a, b), group((1,), c, d)), policy=policy, rope=rope)
    return [first, KVLayer(groups=(group((0, 1, 2), b, c),), policy=policy, rope=rope)]


def inputs(rng, t, batch=2):
    shape = 0.8 ** np.arange(DIM)
    k, v = (rng.normal(size=(batch, t, HEADS, DIM)) * shape for _ in range(2))
    q = rng.normal(size=(batch, t, 2 * HEADS, DIM))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


write, attend = model_cache.write, model_cache.attend


def run(state, words, q, k, v, chunks, **options):
    outs, at = [], 0
    for size in chunks:
        part = slice(at, at + size)
        state, words, tail = write(state, words, k[:, part], v[:, part])
        where = jnp.broadcast_to(jnp.arange(at, at + size, dtype=jnp.int32), (len(q), size))
        outs.append(attend(q[:, part], state, words, tail, q_positions=where, **options))
        at += size
    return np.concatenate(outs, axis=1), state, words


@pytest.mark.parametrize("kind", ["gain float16, fitted", "trellis, free start", "window"])
def test_attention_is_that_of_the_codecs_in_float64(rng, kind):
    """A chunk, single tokens, a chunk; sinks and a recent window; keys before RoPE; grouped."""
    policy = TokenPolicy(sinks=2, recent=3)
    layers = make_layers(policy, Rope(dim=DIM, theta=50.0), **KINDS[kind])
    form = model_cache.forms(layers)
    lanes = 128 if kind == "window" else None  # as on a TPU
    states, (words,) = model_cache.init(form, batch=2, capacity=40, lanes=lanes)
    assert words.shape[-1] == (-(-form.columns[0] // 128) * 128 if lanes else form.columns[0])
    for layer, state in zip(layers, states, strict=True):
        q, k, v = inputs(rng, 30)
        got, _, words = run(state, words, q, k, v, (14, 1, 1, 14), scale=SCALE)
        # What the codecs decode to, with their segments as data: a test of that form compares it
        # with the codecs themselves.
        stored = simulate(state.form.layer, k, v)
        want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, stored_values=stored)
        np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


@pytest.mark.parametrize("scale", ["vector", "head"])
def test_tables_of_other_codecs_lie_in_the_pool_too(rng, scale):
    """per_head, and beside its stored scales TurboQuant: their own bytes and values."""
    q, k, v = inputs(rng, 30)

    def fitted(codec, x, heads):
        seen = Observed.of(np.moveaxis(np.asarray(x[0][:, list(heads)]), 1, 0))
        return {name: jnp.asarray(a) for name, a in codec.fit(seen).items()}

    def group(heads, codec):
        each = {f"{side}_arrays": fitted(codec, x, heads) for side, x in (("k", k + 1), ("v", v))}
        return HeadGroup(heads=heads, k=codec, v=codec, **each)

    own = PerHead(dim=DIM, bits=3, scale=scale)
    two = {"dim": DIM, "bits": 2}
    other = TurboQuantMSE(**two) if scale == "vector" else PerHead(**two, scale=scale)
    layer = KVLayer(
        groups=(group((0, 2), own), group((1,), other)), policy=TokenPolicy(sinks=2, recent=1)
    )
    assert model_cache.forms([layer]) is None
    form = model_cache.forms([layer], tables=True)
    assert form.bits_per_token == layer.bits_per_token
    states, (words,) = model_cache.init(form, batch=2, capacity=40)
    got, _, _ = run(states[0], words, q, k, v, (30,), scale=SCALE)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_tables_with_another_scale_do_not(rng):
    for codec in (
        TurboQuantMSE(dim=DIM, bits=3, scale_rule="unbiased"),
        TurboQuantMSE(dim=DIM, bits=3, scale_dtype="float32"),
    ):
        layer = uniform_layer(kv_heads=HEADS, k=codec, v=codec, policy=TokenPolicy())
        assert model_cache.forms([layer], tables=True) is None


def test_windows_soft_caps_and_logit_sinks(rng):
    sinks = jnp.asarray(rng.normal(size=2 * HEADS) + 1, jnp.float32)
    options = {"window": 9, "softcap": 2.0, "sink_logits": sinks}
    layers = make_layers(TokenPolicy(sinks=1))
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=20)
    q, k, v = inputs(rng, 20)
    got, _, _ = run(states[0], words, q, k, v, (20,), scale=SCALE, **options)
    want = kernel_oracle.policy_attention(layers[0], q, k, v, scale=SCALE, **options)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    simulated = simulated_attention(layers[0], q, k, v, scale=SCALE, **options)
    np.testing.assert_allclose(simulated, want, atol=TOL["packed_attention"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_holds_the_codecs_own_bits(rng, kind):
    """Bit by bit what codecs encode; a layer: what is not codes of K and V, codes of K, of V."""
    layers = make_layers(TokenPolicy(), **KINDS[kind])
    form = model_cache.forms(layers)
    states, (words,) = model_cache.init(form, batch=1, capacity=256)
    _, k, v = inputs(rng, 256, batch=1)
    for state in states:
        _, words, _ = write(state, words, k, v)
    kept, lane = np.asarray(words)[0, 0], 0
    token = np.arange(256)
    held = kept[token % 8] >> (8 * (token // 8 % 4) + token // 32)[:, None].astype(np.uint32) & 1
    for layer, state in zip(layers, states, strict=True):
        k_bits, v_bits = (_bits(layer, side, x) for side, x in (("k", k), ("v", v)))
        runs, order = [], [(k_bits, "rest"), (v_bits, "rest"), (k_bits, "codes"), (v_bits, "codes")]
        for heads, name in order:
            runs.append(lane)
            for head in heads:
                want = head[name]
                got = held[:, lane : lane + want.shape[1]]
                # A value at a threshold may differ between two programs: one token at most.
                assert np.any(got != want, axis=1).sum() <= 1
                lane += want.shape[1]
        assert state.form.first.tolist() == [runs[0], runs[3], lane]
        assert lane - runs[3] <= state.form.most[1]
    assert kept.shape[1] == lane == form.bits_per_token


def _bits(layer, side, x):
    """Stored bits of every head's 256 tokens, [256, columns], of codes and of the rest."""
    out, encode = [], {}
    for h in range(HEADS):
        group = next(g for g in layer.groups if h in g.heads)
        codec, arrays = getattr(group, side), getattr(group, f"{side}_arrays")
        run = encode.setdefault(codec, jax.jit(codec.encode))
        stored = run({n: a[group.heads.index(h)] for n, a in arrays.items()}, x[0, :, h])
        parts = {"codes": [np.zeros((256, 0), int)], "rest": [np.zeros((256, 0), int)]}
        for field in codec.fields:
            entries = np.asarray(stored[field.name])
            if not field.packed:
                entries = entries.view(np.uint16)
            planes = [entries.astype(int) >> p & 1 for p in range(field.bits)]
            parts["codes" if field.name.startswith("codes") else "rest"] += planes
        out.append({name: np.concatenate(found, axis=1) for name, found in parts.items()})
        assert sum(found.shape[1] for found in out[-1].values()) == codec.bits_per_vector
    return out


def test_nothing_is_padded(rng):
    """Bytes of the pool are the plan's bits, whatever the widest head has."""
    layers = make_layers(TokenPolicy(sinks=3), gain="code")
    form = model_cache.forms(layers)
    states, (words,) = model_cache.init(form, batch=2, capacity=300)
    assert form.bits_per_token == sum(layer.bits_per_token for layer in layers)
    assert words.nbytes == 2 * 512 * form.bits_per_token // 8
    assert model_cache.nbytes(states, [words]) == words.nbytes + 2 * 2 * 3 * 2 * HEADS * DIM * 2


def test_chunks_equal_one_write(rng):
    """Across a page's end and to the end of the pool; another layer's bits stay."""
    layers = make_layers(TokenPolicy(recent=2), gain="code")
    states, (empty,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=512)
    _, k, v = inputs(rng, 512)
    _, empty, _ = write(states[0], empty, v, k)
    whole, words, _ = write(states[1], empty, k, v)
    parts, other = states[1], empty
    for size in (1, 250, 1, 1, 258, 1):
        at = int(parts.lengths[0])
        parts, other, _ = write(parts, other, k[:, at : at + size], v[:, at : at + size])
    for a, b in zip(jax.tree.leaves((whole, words)), jax.tree.leaves((parts, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def test_padding_leaves_no_trace_and_overflow_is_counted(rng):
    layers = make_layers(TokenPolicy(), gain="code")
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=256)
    _, k, v = inputs(rng, 250)
    state, words, _ = write(states[0], words, k, v)
    _, more_k, more_v = inputs(rng, 40)
    counts = jnp.array([3, 33], jnp.int32)
    padded, got, _ = jax.jit(write)(state, words, more_k, more_v, counts)
    assert padded.lengths.tolist() == [253, 256]
    assert padded.overflow.tolist() == [0, 27]
    _, want, _ = write(state, words, more_k[:, :6], more_v[:, :6], jnp.array([3, 6], jnp.int32))
    np.testing.assert_array_equal(got, want)
    with pytest.raises(TurboqError, match=r"256 \+ 1 tokens do not fit a cache of capacity 256"):
        write(padded, got, more_k[:, :1], more_v[:, :1])  # the second one is full
    one, after, _ = jax.jit(write)(padded, got, more_k[:, :1], more_v[:, :1])
    assert one.overflow.tolist() == [0, 28]
    np.testing.assert_array_equal(after[1], got[1])


def test_layers_differ_in_data_only(rng):
    one, other = model_cache.forms(make_layers(TokenPolicy(sinks=1), gain="code")).layers
    assert jax.tree.structure(one) == jax.tree.structure(other)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), form) for form in (one, other)]
    assert shapes[0] == shapes[1]


def test_other_codecs_have_no_such_form(rng):
    layers = make_layers(TokenPolicy())
    plain = TurboQuantMSE(dim=DIM, bits=2)
    group = HeadGroup(heads=(0, 1, 2), k=plain, v=plain, k_arrays={}, v_arrays={})
    other = KVLayer(groups=(group,), policy=TokenPolicy())
    assert model_cache.forms([layers[0], other]) is None
    assert model_cache.forms([layers[0], None]) is None
    assert model_cache.fresh([other]) is None
    with pytest.raises(ValueError, match="batch=0"):
        model_cache.init(model_cache.forms(layers), batch=0, capacity=1)


def test_exact_tokens_are_those_of_the_grouped_cache(rng):
    layers = make_layers(TokenPolicy(sinks=1, recent=2), gain="code")
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=9)
    _, k, v = inputs(rng, 9)
    state, _, tail = write(states[0], words, k, v)
    cache, due = contiguous.write(layers[0], contiguous.init(layers[0], batch=2, capacity=9), k, v)
    np.testing.assert_array_equal(tail.k, due.k)
    np.testing.assert_array_equal(tail.positions, due.positions)
    assert state.lengths.tolist() == cache.lengths.tolist()
