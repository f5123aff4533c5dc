"""What no query sees in the one pool, in rings and among sinks, and that outputs do not show it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from turboq.cache.columns import BIT_OF, NONE
from turboq.numbers.packing import PAGE


def unseen_bits(state, words, at, window, fill):
    """The pool with `fill` in all bits but those of this layer at slots that some query sees."""
    layer, pages = state.form.layer, words.shape[1]
    slot = np.arange(pages * PAGE)
    low = np.maximum(np.asarray(at) - (window or 2**20) + 1, layer.policy.sinks)[..., None]
    high = np.minimum(np.asarray(layer.stored_until(at + 1)), np.asarray(state.lengths)[:, None])
    seen = np.any((slot >= low) & (slot < high[..., None]), axis=1)  # [B, S]
    bit = seen.astype(np.uint32) << BIT_OF[slot // 8 % 32].astype(np.uint32)
    held = bit.reshape(len(seen), pages, 32, 8).sum(axis=2, dtype=np.uint32)[..., None]
    own = np.zeros(words.shape[-1], bool)
    for side in (state.form.k, state.form.v):
        own[np.asarray(side.lane)[np.asarray(side.plane) != NONE]] = True
    held = np.where(own, held, np.uint32(0))
    return jnp.asarray(np.asarray(words) & held | np.asarray(fill) & ~held)


def unseen_tokens(state, tail, value):
    """State and tail with `value` in the sinks and recent tokens that are not there."""
    lengths, exact, layer = np.asarray(state.lengths), state.exact, state.form.layer
    no_sink = np.arange(layer.policy.sinks) >= lengths[:, None]
    no_recent = np.arange(layer.ring) >= lengths[:, None]

    def put(x, where, axis):
        where = where.reshape([n if i in (0, axis) else 1 for i, n in enumerate(x.shape)])
        return jnp.asarray(np.where(where, np.asarray(value, x.dtype), x))

    changed = {
        f"{side}_{name}": put(getattr(exact, f"{side}_{name}"), where, 2)
        for side in "kv" for name, where in (("sinks", no_sink), ("recent", no_recent))
    }  # fmt: skip
    nobody = np.asarray(tail.positions) < 0
    for where in (no_sink, no_recent, nobody):  # if there is room for any
        assert where.any() == (where.size > 0)
    tail = dataclasses.replace(tail, k=put(tail.k, nobody, 1), v=put(tail.v, nobody, 1))
    return dataclasses.replace(state, exact=dataclasses.replace(exact, **changed)), tail


def dirtied(rng, state, words, tail, at, window):
    """Ones, the bits of whoever had the slots before, and bits of other layers; NaN and Inf."""
    old = rng.integers(0, 2**32, words.shape, dtype=np.uint32)
    fills = (np.uint32(2**32 - 1), np.nan), (old, np.inf), (np.uint32(0), -np.inf)
    for fill, value in fills:
        bits = unseen_bits(state, words, at, window, fill)
        assert np.any(np.asarray(bits) != np.asarray(words))
        own, recent = unseen_tokens(state, tail, value)
        yield {"state": own, "words": bits, "tail": recent}


def check_unseen(rng, run, state, words, tail, at, window):
    """Outputs of `run(state=..., words=..., tail=...)` are the same to the bit."""
    want = np.asarray(run(state=state, words=words, tail=tail))
    for dirty in dirtied(rng, state, words, tail, at, window):
        got = np.asarray(run(**dirty))
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    return want
