"""Small layers in the one pool, and what its kernels must read of them: for tests and devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
from tolerances import TOL

from turboq.cache import composed, joint, model_cache
from turboq.cache.contiguous import Tail
from turboq.cache.key_form import from_stored
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.numbers.packing import ROWS
from turboq.numbers.rope import Rope
from turboq_kernels import columns

DIM, HEADS, GROUP, SCALE = 24, 3, 2, 0.3
TOKENS = 530  # of cases: two pages and a bit
SEGMENTS = [((8, 3), (8, 1)), ((16, 2), (8, 1)), ((24, 4),), ((8, 2),)]
ROPES = {
    "half": Rope(dim=DIM, theta=50.0),
    "partial": Rope(dim=10, theta=9.0, layout="interleaved"),
}
KERNELS = ("mosaic_tpu", "triton")
# Compiled as one program each, and not operation by operation.
write = jax.jit(model_cache.write)
attend = jax.jit(
    columns.attend, static_argnames=("scale", "implementation", "interpret", "softcap", "window")
)


@functools.cache
def _fitted(segments, heads, side, gain, dim):
    """A codec and its arrays of some heads; fitted once for all cases."""
    codec = Transform(dim=dim, segments=segments, quantizer="window", states=16, gain=gain)
    rng = np.random.default_rng([len(heads), side])
    x = rng.normal(size=(len(heads), 60, dim)) * 0.8 ** np.arange(dim) + 0.5
    fitted = codec.fit(Observed.of(x.astype(np.float32)))
    return codec, {name: jnp.asarray(a) for name, a in fitted.items()}


def make_layers(rng, policy, rope=None, block=1, gain="code", joined=None, v_dim=DIM, heads=HEADS):
    """Two layers whose heads have other bits each, K and V alike, in groups out of order.

    `joined`: units of so many heads together. Of values of fewer channels all bits are as many.
    """

    def group(heads, k, v):
        v = v if v_dim == DIM else ((v_dim, 3),)
        (k, k_arrays), (v, v_arrays) = (
            _fitted(x, heads, i, gain, dim) for i, (x, dim) in enumerate(((k, DIM), (v, v_dim)))
        )
        return HeadGroup(heads=heads, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    def layer(*groups):
        alone = KVLayer(groups=groups, policy=policy, rope=rope, rope_block=block)
        if joined is None:
            return alone
        shape = joint.shapes(heads, joined, DIM, v_dim)
        turn = np.eye(shape["mean"][1]) + 0.05 * rng.normal(size=shape["synthesis"])
        own = {"mean": 0.3 * rng.normal(size=shape["mean"]), "synthesis": turn}
        return composed.join(alone, joined, own)

    a, b, c, d = SEGMENTS
    every = tuple(range(heads))
    first = layer(group(every[::2], a, b), group(every[1::2], c, d))
    return [first, layer(group(every, b, c))]


def inputs(rng, t, batch=2, heads=HEADS):
    shape = 0.8 ** np.arange(DIM)
    k, v = (rng.normal(size=(batch, t, heads, DIM)) * shape + 0.5 for _ in range(2))
    q = rng.normal(size=(batch, t, GROUP * heads, DIM))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def filled(rng, layers, t, capacity, batch=2, counts=None):
    """States and pool of layers that hold t tokens, and the keys and values of each.

    `counts`: how many of them every sequence gets, if not all.
    """
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=batch, capacity=capacity)
    counts = None if counts is None else jnp.asarray(counts, jnp.int32)
    out = []
    for state in states:
        _, k, v = inputs(rng, t, batch, state.form.layer.kv_heads)
        state, words, tail = write(state, words, k, v, counts)
        out.append((state, tail, k, v))
    return out, words


def untouched(layers):
    """State of the first of some layers, a pool of a page and the tail, for what is only traced."""
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=256)
    ring = states[0].form.layer.ring
    recent = jnp.zeros((2, ring, states[0].form.layer.kv_heads, DIM))
    return states[0], words, Tail(k=recent, v=recent, positions=jnp.zeros((2, ring), jnp.int32))


def holding(rng, layers, lengths, pages):
    """States of layers as if they held so many tokens, the keys and values of each, and a pool.

    All bits of the pool are random: what codecs can store, and what nobody wrote.
    """
    form, lengths = model_cache.forms(layers), np.asarray(lengths, np.int32)
    states, _ = model_cache.init(form, batch=len(lengths), capacity=1)
    shape = (len(lengths), pages, ROWS, form.columns[0])
    words, out = jnp.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32)), []
    for state in states:
        layer, exact = state.form.layer, {}
        _, *sides = (np.asarray(x) for x in inputs(rng, max(lengths), len(lengths), layer.kv_heads))
        for side, x in zip("kv", sides, strict=True):
            x = x.swapaxes(1, 2)  # [B, K, T, D]
            recent = np.zeros((*x.shape[:2], layer.ring, x.shape[3]))
            for b, n in enumerate(lengths):
                for at in range(n - layer.ring, n):
                    recent[b, :, at % layer.ring] = x[b, :, at]
            exact |= {f"{side}_sinks": x[:, :, : layer.policy.sinks], f"{side}_recent": recent}
        exact = {name: jnp.asarray(x, layer.policy.exact_dtype) for name, x in exact.items()}
        state = dataclasses.replace(
            state, lengths=jnp.asarray(lengths), exact=dataclasses.replace(state.exact, **exact)
        )
        out.append((state, *sides))
    return out, words


@jax.jit
def decoded(state, words):
    """What the codecs say of all slots [B, S, K, D]."""
    form, layer, group = state.form, state.form.layer, state.form.group
    k, v = (
        jax.vmap(codec.decode)(arrays, model_cache._read(codec, lanes, words, None))
        for codec, arrays, lanes in zip(
            form.codecs, (group.k_arrays, group.v_arrays), (form.k, form.v), strict=True
        )
    )
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None] + jnp.reshape(state.first, (-1, 1))
    if layer.joint_heads is None:
        k = from_stored(layer, group.k_arrays, k.swapaxes(0, 1), slots).swapaxes(0, 1)
    return joint.from_units(layer, jnp.moveaxis(k, 0, 2), jnp.moveaxis(v, 0, 2), slots)


def case_of(rng, rope=None, block=1, gain="code", joined=None, heads=HEADS):
    """The layers of a case of `check`: two pages and a bit."""
    policy = TokenPolicy(sinks=3, recent=2)
    layers = make_layers(rng, policy, rope and ROPES[rope], block, gain, joined, heads=heads)
    return layers, *holding(rng, layers, [TOKENS, TOKENS], 3)


def step(rng, state, words, counts, tokens):
    """Queries [B, tokens, H, D], new keys and values, and what is held after `write`."""
    q, k, v = inputs(rng, tokens, len(words), state.form.layer.kv_heads)
    return q, k, v, *write(state, words, k, v, jnp.asarray(counts, jnp.int32))


def in_float64(layer, q, k, v, state, words, *, first=0, **options):
    """Float64 of what the codecs store, of the first sequence.

    Of queries after the tokens of which keys and values are given; slot 0 is position `first`.
    """
    tokens, count = q.shape[1], k.shape[1]
    every = np.zeros((1, count, *q.shape[2:]), np.float32)
    every[:, -tokens:] = q[:1]
    stored = [np.zeros((1, count, *x.shape[2:])) for x in (k, v)]
    for x, y in zip(stored, decoded(state, words), strict=True):
        x[:, first:] = np.asarray(y)[:1, : count - first]
    return kernel_oracle.policy_attention(
        layer, every, k[:1], v[:1], scale=SCALE, stored_values=stored, since=count - tokens,
        **options,
    )  # fmt: skip


def sink_logits(heads=HEADS):
    """Of query heads: between a hundredth and all of what the tokens weigh."""
    return np.linspace(2.0, 7.0, GROUP * heads, dtype=np.float32)


SINK_LOGITS = sink_logits()


def by(name, *, q, state, words, tail, at, interpret=True, attend=attend, **options):
    """A step by one implementation; matrices by programs that other cases share."""
    options |= {"q_positions": at, "scale": SCALE, "implementation": name}
    if name == "xla":
        return attend(q, state, words, tail, **options)
    matrices = columns.prepare(state, words, name)
    return attend(q, state, words, tail, matrices, interpret=interpret, **options)


def check(
    rng, names, *, interpret, rope=None, block=1, gain="code", joined=None, tokens=1, sinks=False,
    heads=HEADS, **options,
):  # fmt: skip
    """Two pages and a bit, other bits in every head, ragged lengths, sinks, a recent window.

    Implementations `names` against decoding by XLA, and float64 of what the codecs store, for the
    last `tokens`; with `sinks` a logit sink of every query head.
    """
    options |= {"sink_logits": sink_logits(heads)} if sinks else {}
    layers, held, words = case_of(rng, rope, block, gain, joined, heads)
    # Whose queries are folded, and whose keys are decoded.
    folded = TOL["columns" if joined is None else "columns_joined"]
    off = {
        "triton": TOL["columns_decoded_float16"] if rope and block != 256 else folded,
        "mosaic_tpu": TOL["columns_decoded"] if rope and block < 128 else folded,
    }
    programs = None
    for layer, (state, k, v) in zip(layers, held, strict=True):
        q, more_k, more_v, state, after, tail = step(rng, state, words, [tokens, 0], tokens)
        at = state.lengths[:, None] - tokens + np.arange(tokens, dtype=np.int32)[None]
        run = functools.partial(by, q=q, state=state, words=after, tail=tail, at=at, **options)
        want = run("xla")
        # Of the sequence that got tokens.
        whole = [np.concatenate(x, axis=1) for x in ((k, more_k), (v, more_v))]
        exact = in_float64(layer, q, *whole, state, after, **options)
        for name in names:
            got = run(name, interpret=interpret)
            decodes = off.get(name) == TOL["columns_decoded"]
            one_token = tokens == 1 and (name == "triton" or (name == "mosaic_tpu" and decodes))
            if one_token and programs is None:
                traced = run(name, interpret=interpret, attend=attend.trace)
                assert "name=turboq_finish" in str(traced.jaxpr), "the general way was taken"
            within = off.get(name, folded)
            np.testing.assert_allclose(got, want, atol=within, err_msg=name)
            np.testing.assert_allclose(got[:1], exact, atol=within, err_msg=name)
        assert programs in (None, attend._cache_size()), "a program per layer, not one for all"
        programs = attend._cache_size()
