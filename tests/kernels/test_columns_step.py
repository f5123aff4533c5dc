"""Queries of a step as its GPU launches fold them, in interpret mode, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import DIM, HEADS, ROPES, make_layers
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.contiguous import Tail
from turboq.cache.layer import TokenPolicy
from turboq.numbers import rope as rotary
from turboq.numbers.rope import Rope
from turboq_kernels import columns
from turboq_kernels.columns import linear, triton, triton_step
from turboq_kernels.decode.triton_step import Seen

SLOTS = 512
# Query heads of a KV head, joined heads, keys, position of the first slot.
CASES = [
    (1, 3, ("half", 256), 512),
    (3, 1, ("half", 64), 256),
    (4, None, ("partial", 256), 0),
    (3, 3, None, 0),
]


def case_of(rng, group, joined, keys, first):
    """A layer, and a step of two sequences: one of 40 tokens less than the pool has, one of 70."""
    rope, block = (ROPES[keys[0]], keys[1]) if keys else (None, 1)
    layers = make_layers(rng, TokenPolicy(sinks=3, recent=2), rope, block, joined=joined)
    form = model_cache.forms(layers)
    assert form is not None
    states, (words,) = model_cache.init(form, batch=2, capacity=SLOTS)
    lengths = jnp.asarray([first + SLOTS - 40, first + 70], jnp.int32)
    dropped = jnp.full_like(lengths, first) if first else None
    state = dataclasses.replace(states[0], lengths=lengths, dropped=dropped)
    made = linear.linear_layer(state.form, pool_lanes=words.shape[-1])
    return state, words, made, jnp.asarray(rng.normal(size=(2, HEADS, group, DIM)), jnp.float32)


def turns(rope: Rope, positions):
    """R of block starts, whose angles are float32 products as everywhere."""
    out = []
    for p in positions:
        angles = np.float32(p) * rotary.inverse_frequencies(rope)
        own = dataclasses.replace(rope, inv_freq=tuple(map(float, angles)))
        out.append(rotary.matrices(own, DIM, np.ones(1, int))[0])
    return np.stack(out)


@pytest.mark.parametrize(("group", "joined", "keys", "first"), CASES)
def test_queries_are_folded_as_in_float64(group, joined, keys, first, rng):
    """Weights, halves of their sums, biases of all blocks that are seen, and what is seen."""
    state, words, made, q = case_of(rng, group, joined, keys, first)
    step = triton_step.planned(
        q.reshape(2, 1, -1, DIM), state, words, made, scale=1.0, window=None, softcap=None,
        splits=None, interpret=True,
    )  # fmt: skip
    at = state.lengths[:, None] - 1
    ready, _ = jax.jit(lambda q, made, seen: triton_step.prepare(q, made, seen, step))(
        q, made, Seen(at, state.lengths, state.dropped)
    )
    layer, whole = state.form.layer, np.asarray(q, np.float64)
    block = layer.rope_block if keys else SLOTS
    count = SLOTS // block
    turn = turns(ROPES[keys[0]], first + block * np.arange(count)) if keys else np.eye(DIM)[None]
    turned = np.einsum("qcd,bkgc->bqkgd", turn, whole)  # R^T q
    each = joined or 1
    matrix = np.asarray(triton.local(made, words.shape[-1])[0], np.float64)  # [J, G, D, lanes]
    by_group = turned.reshape(2, count, HEADS // each, each, group, DIM)
    left = np.einsum("bqjkgd,jkdw->bqjkgw", by_group, matrix)
    left = left.reshape(2, count, HEADS // each, each * group, -1)
    ends = np.cumsum([runs * step.columns.run for runs in step.columns.places[0]])[:-1]
    half = np.stack([-x.sum(axis=-1) / 2 for x in np.split(left, ends, axis=-1)], axis=-1)
    bias = np.einsum("bqkgd,kpd->bkgqp", turned, np.asarray(made.means, np.float64))

    size = np.linalg.norm(whole, axis=-1) * np.asarray(made.longest, np.float64)[None, :, None]
    unit = np.asarray(ready.unit).reshape(size.shape)
    np.testing.assert_allclose(unit * triton.HIGH, size, rtol=TOL["split_product"])
    pairs = np.asarray(ready.weights, np.float64)[..., : 2 * each * group, :]
    got = pairs[..., ::2, :] + pairs[..., 1::2, :] / triton.LOW
    got = got * unit.reshape(2, 1, -1, each * group, 1)
    off = TOL["folded_query"] * size.max()
    np.testing.assert_array_equal(ready.starts, np.full((2, HEADS * group), max(3 - first, -first)))
    for b, length in enumerate((SLOTS - 40, 70)):
        stored = length - 2
        np.testing.assert_array_equal(ready.ends[b], np.full(HEADS * group, stored))
        seen = -(-stored // block)
        np.testing.assert_allclose(
            got[b, :seen], left[b, :seen], atol=TOL["folded_pair"] * size.max()
        )
        own = np.asarray(ready.half)[b, :seen].reshape(half[b, :seen].shape)
        np.testing.assert_allclose(own, half[b, :seen], atol=off * left.shape[-1] ** 0.5)
        biases = np.asarray(ready.bias)[b].reshape(HEADS, group, count, -1)
        np.testing.assert_allclose(biases[:, :, :seen], bias[b, :, :, :seen], atol=off)
    lanes = triton.windows(made, words.shape[-1])
    for i in range(2):
        np.testing.assert_array_equal(ready.lanes[i], lanes[i])


@pytest.mark.parametrize("tokens", [1, 2])
def test_which_steps_are_three_launches(tokens, rng):
    """One query token; more go the general way."""
    state, words, made, q = case_of(rng, 2, 3, ("half", 256), 0)
    ring = state.form.layer.ring
    recent = jnp.zeros((2, ring + tokens - 1, HEADS, DIM))
    tail = Tail(k=recent, v=recent, positions=jnp.zeros(recent.shape[:2], jnp.int32))
    at = state.lengths[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
    q = jnp.broadcast_to(q.reshape(2, 1, -1, DIM), (2, tokens, HEADS * 2, DIM))
    text = str(
        jax.make_jaxpr(
            lambda q: columns.attend(
                q, state, words, tail, made, q_positions=at, scale=1.0, implementation="triton"
            )
        )(q)
    )
    names = ("turboq_prepare", "turboq_columns", "turboq_finish")
    found = [text.count(f"name={name}") for name in names]
    assert found == ([1, 1, 1] if tokens == 1 else [0, 1, 0])
