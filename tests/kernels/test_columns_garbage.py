"""What no query sees in the one pool, in rings and among sinks: outputs are the same to the bit."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import KERNELS, ROPES, SCALE, attend, inputs, make_layers, write

from turboq.cache import model_cache
from turboq.cache.columns import BIT_OF, NONE
from turboq.cache.layer import TokenPolicy
from turboq.numbers.packing import PAGE

SINKS, PAGES = 3, 3
# Query tokens; keys folded and decoded; of the first two, steps by launches of their own.
CASES = [
    {"tokens": 1, "window": 270},
    {"tokens": 1, "rope": "half", "block": 256, "joined": 3},
    {"tokens": 1, "rope": "partial", "joined": 3, "window": 270},
    {"tokens": 3, "rope": "half", "block": 64},
]


def made(rng, tokens, rope=None, block=1, joined=None):
    """The last layer after a step: 310 tokens and some, and no more than the step's first.

    Of three pages nobody wrote the last.
    """
    policy = TokenPolicy(sinks=SINKS, recent=2)
    layers = make_layers(rng, policy, rope and ROPES[rope], block, joined=joined)
    form = model_cache.forms(layers)
    assert form is not None
    states, (words,) = model_cache.init(form, batch=2, capacity=PAGES * PAGE)
    for i, state in enumerate(states):
        _, k, v = inputs(rng, 310)
        states[i], words, _ = write(state, words, k, v, jnp.array([310, 0], jnp.int32))
    q, k, v = inputs(rng, tokens)
    return q, *write(states[-1], words, k, v, jnp.array([tokens, 1], jnp.int32))


def unseen_bits(state, words, at, window, fill):
    """The pool with `fill` in all bits but those of this layer at slots that some query sees."""
    layer, slot = state.form.layer, np.arange(PAGES * PAGE)
    low = np.maximum(np.asarray(at) - (window or 2**20) + 1, SINKS)[..., None]
    high = np.minimum(np.asarray(layer.stored_until(at + 1)), np.asarray(state.lengths)[:, None])
    seen = np.any((slot >= low) & (slot < high[..., None]), axis=1)  # [B, S]
    bit = seen.astype(np.uint32) << BIT_OF[slot // 8 % 32].astype(np.uint32)
    held = bit.reshape(len(seen), PAGES, 32, 8).sum(axis=2, dtype=np.uint32)[..., None]
    own = np.zeros(words.shape[-1], bool)
    for side in (state.form.k, state.form.v):
        own[np.asarray(side.lane)[np.asarray(side.plane) != NONE]] = True
    held = np.where(own, held, np.uint32(0))
    return jnp.asarray(np.asarray(words) & held | np.asarray(fill) & ~held)


def unseen_tokens(state, tail, value):
    """State and tail with `value` in the sinks and recent tokens that are not there."""
    lengths, exact = np.asarray(state.lengths), state.exact
    no_sink = np.arange(SINKS) >= lengths[:, None]
    ring = state.form.layer.ring
    no_recent = np.arange(ring) >= lengths[:, None]
    assert no_sink.any()
    assert no_recent.any()

    def put(x, where, axis):
        where = where.reshape([n if i in (0, axis) else 1 for i, n in enumerate(x.shape)])
        return jnp.where(where, jnp.asarray(value, x.dtype), x)

    changed = {
        f"{side}_{name}": put(getattr(exact, f"{side}_{name}"), where, 2)
        for side in "kv" for name, where in (("sinks", no_sink), ("recent", no_recent))
    }  # fmt: skip
    nobody = np.asarray(tail.positions) < 0
    assert nobody.any()
    tail = dataclasses.replace(tail, k=put(tail.k, nobody, 1), v=put(tail.v, nobody, 1))
    return dataclasses.replace(state, exact=dataclasses.replace(exact, **changed)), tail


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_nobody_sees(case, rng):
    """Ones, the bits of whoever had the slots before, and bits of other layers; NaN and Inf."""
    case = dict(case)
    tokens, window = case["tokens"], case.pop("window", None)
    q, state, words, tail = made(rng, **case)
    at = state.lengths[:, None] - jnp.array([[tokens], [1]]) + jnp.arange(tokens)[None]
    old = rng.integers(0, 2**32, words.shape, dtype=np.uint32)
    dirty = [
        (unseen_bits(state, words, at, window, fill), *unseen_tokens(state, tail, value))
        for fill, value in ((np.uint32(2**32 - 1), np.nan), (old, np.inf), (np.uint32(0), -np.inf))
    ]
    folds = "rope" not in case or case.get("block", 1) >= 16
    for name in ("xla", *(["linear"] if folds else []), *KERNELS):
        run = functools.partial(
            attend, q, q_positions=at, scale=SCALE, window=window, implementation=name,
            interpret=True,
        )  # fmt: skip
        want = np.asarray(run(state=state, words=words, tail=tail))
        assert np.all(np.any(want, axis=-1))
        for bits, own, recent in dirty:
            assert np.any(np.asarray(bits) != np.asarray(words))
            got = np.asarray(run(state=own, words=bits, tail=recent))
            np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=name)
