"""Kernels over the one pool against decoding it, and against float64 by way of the codecs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from columns_cases import (
    DIM,
    GROUP,
    HEADS,
    KERNELS,
    ROPES,
    SCALE,
    SINK_LOGITS,
    attend,
    check,
    filled,
    inputs,
    make_layers,
    write,
)
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulate
from turboq.numbers import rope as rotary
from turboq_kernels import columns
from turboq_kernels.columns import linear

# Gains that are codes of heads by themselves: the tests of a step of 5 tokens, and of a pool that
# has given up pages.
CASES = [
    {"gain": "none", "softcap": 1.5, "window": 270, "sinks": True},
    {"rope": "half", "block": 256, "joined": 3, "window": 270},
    {"rope": "partial", "block": 256, "gain": "none", "joined": 1, "softcap": 1.5},
    {"rope": "partial", "block": 128, "joined": 3},
    {"rope": "half", "joined": 3, "softcap": 1.5, "window": 270, "sinks": True},
    {"rope": "partial", "block": 64, "gain": "none", "tokens": 3, "softcap": 1.5, "window": 270,
     "sinks": True},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_read_what_decoding_reads(rng, case):
    """XLA folds queries for blocks of 16 positions and more, kernels decode other keys."""
    folds = "rope" not in case or case.get("block", 1) >= 16
    check(rng, [*KERNELS, "linear"] if folds else KERNELS, interpret=True, **case)


def test_a_broken_token_breaks_its_head(rng):
    """Inf among the recent values of a head: NaN for all its rows on a TPU, and for no other."""
    layers = make_layers(rng, TokenPolicy(sinks=3, recent=2), ROPES["half"])
    ((state, *_), _), words = filled(rng, layers, 20, 256)
    q, k, v = inputs(rng, 1)
    state, words, tail = write(state, words, k, v)
    exact = dataclasses.replace(
        state.exact, v_recent=state.exact.v_recent.at[0, 1, :, 4].set(jnp.inf)
    )
    got = attend(
        q, dataclasses.replace(state, exact=exact), words, tail, scale=SCALE,
        q_positions=jnp.full((2, 1), 20, jnp.int32), implementation="mosaic_tpu", interpret=True,
    )  # fmt: skip
    broken = np.isnan(np.asarray(got))
    assert broken[0, 0, GROUP : 2 * GROUP].all()
    assert broken.sum() == GROUP * DIM


@pytest.mark.parametrize("sinks", [None, SINK_LOGITS], ids=["none", "sinks"])
def test_some_tokens_at_once_and_an_empty_cache(rng, sinks):
    layers = make_layers(rng, TokenPolicy())
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=2, capacity=300)
    q, k, v = inputs(rng, 5)
    state, words, tail = write(states[1], words, k, v, jnp.array([5, 0], jnp.int32))
    at = jnp.arange(5, dtype=jnp.int32)[None] + jnp.zeros((2, 1), jnp.int32)
    run = functools.partial(
        attend, q, state, words, tail, q_positions=at, scale=SCALE, sink_logits=sinks
    )
    want = run(implementation="xla")
    for name in ("linear", *KERNELS):
        got = run(implementation=name, interpret=True)
        np.testing.assert_allclose(got, want, atol=TOL["columns"], err_msg=name)
        assert not np.any(np.asarray(got)[1])


def test_one_program_for_layers_of_other_bits(rng):
    """Two layers, two plans: traced once."""
    traced = []

    @jax.jit
    def step(q, state, words, tail, matrices, at):
        traced.append(1)
        return columns.attend(
            q, state, words, tail, matrices, q_positions=at, scale=SCALE,
            implementation="mosaic_tpu", interpret=True,
        )  # fmt: skip

    held, words = filled(rng, make_layers(rng, TokenPolicy()), 20, 256)
    for state, tail, *_ in held:
        q, _, _ = inputs(rng, 1)
        step(q, state, words, tail, columns.prepare(state, words), state.lengths[:, None] - 1)
    assert len(traced) == 1


def page_bits(words):
    """Bits of the 256 tokens of the first page, [256, lanes]."""
    token = np.arange(256)
    shift = (8 * (token // 8 % 4) + token // 32)[:, None].astype(np.uint32)
    return np.asarray(words)[0, 0][token % 8] >> shift & 1


def test_the_matrix_is_what_the_codec_decodes(rng):
    """Every bit by itself: x_hat = mean + gain (matrix (bits - 1/2)), against `Codec.decode`."""
    layers = make_layers(rng, TokenPolicy())
    held, words = filled(rng, layers, 256, 256, batch=1)
    bits = page_bits(words)
    for state, _, k, v in held:
        form = linear.linear_layer(state.form, pool_lanes=words.shape[-1])
        k_hat, v_hat = simulate(state.form.layer, k, v)
        codes = None
        for i, (side, due) in enumerate(((form.k, k_hat), (form.v, v_hat))):
            first, width = int(form.first[i]), side.matrix.shape[-1]
            own = np.pad(bits, ((0, 0), (0, width)))[:, first : first + width].astype(np.float64)
            if i == 0:
                weights = np.asarray(form.gain_weights)
                lane = int(form.gain_lane)
                codes = own[:, lane : lane + weights.shape[1]] @ weights.T
            code = codes.astype(int) >> 4 * i & 15
            for h in range(HEADS):
                mine = (np.asarray(side.unit) == h) * (own - 0.5)
                gain = np.asarray(side.gains)[h, code[:, h]]
                got = np.asarray(side.mean)[h] + gain[:, None] * (
                    mine @ np.asarray(side.matrix)[0].T
                )
                np.testing.assert_allclose(got, due[0, :, h], atol=TOL["rope_rotate"])


def test_the_matrix_of_joined_heads(rng):
    """x_hat of each head over the bits of all units: mean + rest + matrix (gain (bits - 1/2))."""
    layers = make_layers(rng, TokenPolicy(), joined=HEADS)
    held, words = filled(rng, layers, 256, 256, batch=1)
    for state, _, k, v in held:
        form = linear.linear_layer(state.form, pool_lanes=words.shape[-1])
        first, lane, width = int(form.first[0]), int(form.gain_lane), form.k.matrix.shape[-1]
        own = np.pad(page_bits(words), ((0, 0), (0, width)))[:, first : first + width].astype(int)
        weights, unit = np.asarray(form.gain_weights), np.asarray(form.k.unit)
        codes = own[:, lane : lane + weights.shape[1]] @ weights.T
        gain = np.asarray(form.k.gains, np.float64)[unit, codes[:, unit]]
        x = np.where(unit == linear.NONE, 0, gain * (own - 0.5))
        # Keys turn about the mean that was fitted, not about what units add to it.
        fitted = np.asarray(state.form.layer.joint["mean"])[0, : HEADS * DIM]
        np.testing.assert_array_equal(np.ravel(form.k.mean), fitted)
        more = form.means[:, 0] - form.k.mean
        assert np.abs(more).max() > 0.1
        due = simulate(state.form.layer, k, v)
        for side, rest, want in ((form.k, more, due[0]), (form.v, 0.0, due[1])):
            mean = np.asarray(side.mean + rest, np.float64)
            got = mean[None] + np.einsum("tw,hdw->thd", x, np.asarray(side.matrix))
            np.testing.assert_allclose(got, want[0], atol=TOL["packed_attention"])


def test_means_turn_within_their_block(rng):
    """R(t) of the fitted means, and what units add to them, against rotations in float64."""
    for name, rope in ROPES.items():
        for layer in make_layers(rng, TokenPolicy(), rope, 256, joined=HEADS):
            held, words = filled(rng, [layer], 4, 256)
            form = linear.linear_layer(held[0][0].form, pool_lanes=words.shape[-1])
            joint = {n: np.asarray(x, np.float64)[0] for n, x in layer.joint.items()}
            mean, center = (joint[n][: HEADS * DIM].reshape(HEADS, DIM) for n in ("mean", "center"))
            assert np.abs(center - mean).max() > 0.1
            turned = rotary.matrices(rope, DIM, np.arange(256)) @ mean[:, None, :, None]
            want = turned[..., 0] + (center - mean)[:, None]
            np.testing.assert_allclose(form.means, want, atol=TOL["rope_rotate"], err_msg=name)


def test_longest_and_sums_of_columns(rng):
    """Of every unit by itself, in float64."""
    for joined in (None, HEADS):
        held, words = filled(rng, make_layers(rng, TokenPolicy(), joined=joined), 4, 256)
        form = linear.linear_layer(held[0][0].form, pool_lanes=words.shape[-1])
        unit, matrix = np.asarray(form.k.unit), np.asarray(form.k.matrix, np.float64)
        units = linear.units_of(form.unit_groups)
        for head in range(HEADS):
            own = matrix[head if joined else 0]
            places = units[head // (joined or 1)]
            lengths = np.linalg.norm(own[:, np.isin(unit, places)], axis=0)
            np.testing.assert_allclose(form.longest[head], lengths.max(), rtol=TOL["split_product"])
            for place, u in enumerate(places):
                np.testing.assert_allclose(
                    form.sums[head, :, place], own[:, unit == u].sum(axis=1),
                    atol=TOL["linear_maps"],
                )  # fmt: skip


def test_what_no_kernel_reads_is_refused_by_name(rng):
    q, _, _ = inputs(rng, 1)
    for layers, reason in (
        (make_layers(rng, TokenPolicy(), ROPES["half"], 100), "blocks of 100 positions"),
        (make_layers(rng, TokenPolicy(), gain="float16"), "a float16 gain per vector"),
    ):
        held, words = filled(rng, layers, 4, 256)
        state, tail, *_ = held[0]
        at = state.lengths[:, None] - 1
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run this case: .*{reason}"):
            columns.attend(
                q, state, words, tail, q_positions=at, scale=1.0, implementation="mosaic_tpu"
            )
    with pytest.raises(ValueError, match="implementation='cuda' must be None or one of"):
        columns.attend(q, state, words, tail, q_positions=at, scale=1.0, implementation="cuda")


@pytest.mark.parametrize("block", [256, 1])
def test_a_pool_that_has_given_up_pages(rng, block):
    """Behind a window: slots count from the first page that is held, positions do not."""
    policy = TokenPolicy(sinks=3, recent=2)
    layers = [
        dataclasses.replace(layer, window=100)
        for layer in make_layers(rng, policy, ROPES["half"], block)
    ]
    form = model_cache.forms(layers)
    states, pools = model_cache.init(form, batch=1, capacity=1024)
    _, k, v = inputs(rng, 530, batch=1)
    states, pools = model_cache.holding(form, states, pools, new=530)
    states[0], pools[0], _ = write(states[0], pools[0], k, v)
    states[1] = dataclasses.replace(states[1], lengths=states[0].lengths)
    states, (words,) = model_cache.holding(form, states, pools, new=1)
    assert (words.shape[1], states[0].dropped.tolist()) == (2, [256])
    q, more_k, more_v = inputs(rng, 1, batch=1)
    state, words, tail = write(states[0], words, more_k, more_v)
    run = functools.partial(
        attend, q, state, words, tail, q_positions=jnp.array([[530]], jnp.int32),
        scale=SCALE, window=100,
    )  # fmt: skip
    want = run(implementation="xla")
    whole = [jnp.concatenate(x, axis=1) for x in ((k, more_k), (v, more_v))]
    every = jnp.zeros((1, 531, *q.shape[2:])).at[:, -1:].set(q)
    due = kernel_oracle.policy_attention(
        layers[0], every, *whole, scale=SCALE, window=100,
        stored_values=simulate(state.form.layer, *whole), since=530,
    )  # fmt: skip
    for name in KERNELS:
        halves = name == "triton" and block == 1
        off = TOL["columns_decoded_float16" if halves else "columns"]
        got = run(implementation=name, interpret=True)
        np.testing.assert_allclose(got, want, atol=off, err_msg=name)
        np.testing.assert_allclose(got, due, atol=off, err_msg=name)
    with pytest.raises(ValueError, match="sees more than the 100 tokens"):
        columns.attend(q, state, words, tail, q_positions=jnp.array([[530]]), scale=SCALE)
