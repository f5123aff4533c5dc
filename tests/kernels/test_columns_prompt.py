"""Chunks of prompts on the one pool: pages decoded a few at a time, against XLA and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from columns_cases import (
    GROUP,
    HEADS,
    KERNELS,
    ROPES,
    SCALE,
    SINK_LOGITS,
    attend,
    filled,
    inputs,
    make_layers,
    write,
)  # fmt: skip
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy
from turboq.cache.model_cache import SharedPages
from turboq.cache.simulate import simulate
from turboq_kernels.columns import prompt

HELD, NEW, FEW = 530, 20, 7  # 40 query rows of a head, of 24 channels
POLICY = TokenPolicy(sinks=3, recent=2, exact_dtype="float32")
ALL = {"window": 290, "softcap": 3.0, "sink_logits": SINK_LOGITS}

by_pages = jax.jit(
    functools.partial(prompt.attend, scale=SCALE, interpret=True),
    static_argnames=("implementation", "softcap", "window", "tokens"),
)


def written(rng, layers, held=HELD):
    """Each layer with a chunk behind what it holds, of which the second sequence got FEW."""
    states, words = filled(rng, layers, held, held + 170)
    for state, _, k, v in states:
        q, more_k, more_v = inputs(rng, NEW)
        counts = jnp.array([NEW, FEW], jnp.int32)
        state, after, tail = write(state, words, more_k, more_v, counts)
        at = jnp.full((2, 1), held, jnp.int32) + jnp.arange(NEW, dtype=jnp.int32)[None]
        yield (
            (q, state, after, tail),
            at,
            [jnp.concatenate(x, 1) for x in ((k, more_k), (v, more_v))],
        )


def compare(got, want, off, message):
    np.testing.assert_allclose(got[0], want[0], atol=off, err_msg=message)
    np.testing.assert_allclose(got[1, :FEW], want[1, :FEW], atol=off, err_msg=message)


@pytest.mark.parametrize(("rope", "block", "joined"), [("half", 256, None), ("partial", 1, HEADS)])
def test_a_chunk_over_steps_of_pages(rng, rope, block, joined):
    """Three pages, two at a time: the last step begins earlier. A window, a cap, logit sinks."""
    (layer, *_) = layers = make_layers(rng, POLICY, ROPES[rope], block, "code", joined)
    case, at, whole = next(written(rng, layers))
    every = jnp.zeros((2, HELD + NEW, GROUP * HEADS, whole[0].shape[-1]))
    due = kernel_oracle.policy_attention(
        layer, every.at[:, HELD:].set(case[0]), *whole, scale=SCALE,
        stored_values=simulate(case[1].form.layer, *whole), since=HELD, **ALL,
    )  # fmt: skip
    for name in KERNELS:
        got = by_pages(*case, q_positions=at, implementation=name, tokens=1024, **ALL)
        compare(got, due, TOL["columns_decoded"], name)
    if joined is None:
        return
    # The same pages in another order in a pool that sequences share.
    q, state, words, tail = case
    order = rng.permutation(words.shape[0] * words.shape[1])
    mixed = words.reshape(1, -1, *words.shape[2:])[:, np.argsort(order)]
    shared = SharedPages(table=jnp.asarray(order.reshape(words.shape[:2]), jnp.int32), room=None)
    case = q, dataclasses.replace(state, shared=shared), mixed, tail
    found = by_pages(*case, q_positions=at, implementation=KERNELS[-1], tokens=1024, **ALL)
    np.testing.assert_array_equal(found, got)


def test_a_chunk_takes_this_road_and_a_token_does_not(rng):
    """More rows than a kernel reads, and codes that none reads bits of, which steps refuse."""
    policy = dataclasses.replace(POLICY, exact_dtype="bfloat16")
    for gain in ("code", "float16"):
        case, at, _ = next(written(rng, make_layers(rng, policy, gain=gain), 40))
        one, last = (case[0][:, :1], *case[1:]), at[:, :1]
        for name in KERNELS:
            options = {"scale": SCALE, "implementation": name, "interpret": True}
            traced = attend.trace(*case, q_positions=at, **options)
            assert "name=turboq_own" in str(traced.jaxpr)
            half = (case[0].astype(jnp.bfloat16), *case[1:])  # as models have them
            want = attend(*half, q_positions=at, scale=SCALE, implementation="xla")
            got = attend(*half, q_positions=at, **options)
            compare(got, want, TOL["prompt_bfloat16"], name)
            if gain == "float16":
                with pytest.raises(ValueError, match="a float16 gain per vector"):
                    attend(*one, q_positions=last, **options)
                continue
            traced = attend.trace(*one, q_positions=last, **options)
            assert "name=turboq_own" not in str(traced.jaxpr)


def test_pages_that_no_query_sees_hold_anything(rng):
    """All bits set are NaN as gains of float16."""
    layers = make_layers(rng, POLICY, gain="float16")
    (q, state, words, tail), at, _ = next(written(rng, layers, 200))
    assert words.shape[1] == 2
    run = functools.partial(by_pages, window=None, softcap=None, sink_logits=None, tokens=1024)
    broken = words.at[:, 1].set(jnp.uint32(2**32 - 1))
    for name in KERNELS:
        want, got = (
            run(q, state, x, tail, q_positions=at, implementation=name) for x in (words, broken)
        )
        np.testing.assert_array_equal(got, want)
        assert np.all(np.isfinite(got))


def test_a_chunk_behind_a_window_whose_pages_were_given_up(rng):
    """Slots count from the first page that is held; key blocks that such pages cut are decoded."""
    layers = [
        dataclasses.replace(x, window=100) for x in make_layers(rng, POLICY, ROPES["half"], 100)
    ]
    form = model_cache.forms(layers)
    states, pools = model_cache.init(form, batch=1, capacity=1024)
    _, k, v = inputs(rng, HELD, batch=1)
    states, pools = model_cache.holding(form, states, pools, new=HELD)
    states[0], pools[0], _ = write(states[0], pools[0], k, v)
    states[1] = dataclasses.replace(states[1], lengths=states[0].lengths)
    states, (words,) = model_cache.holding(form, states, pools, new=NEW)
    assert states[0].dropped.tolist() == [256]
    q, more_k, more_v = inputs(rng, NEW, batch=1)
    state, words, tail = write(states[0], words, more_k, more_v)
    at = HELD + jnp.arange(NEW, dtype=jnp.int32)[None]
    run = functools.partial(attend, q, state, words, tail, scale=SCALE, window=100)
    want = run(q_positions=at, implementation="xla")
    for name in KERNELS:
        got = run(q_positions=at, implementation=name, interpret=True)
        np.testing.assert_allclose(got, want, atol=TOL["columns_decoded"], err_msg=name)
