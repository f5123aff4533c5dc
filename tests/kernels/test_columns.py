"""Kernels over the one pool against decoding it, and against float64 by way of the codecs."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import (
    DIM,
    GROUP,
    HEADS,
    KERNELS,
    ROPES,
    SCALE,
    TOKENS,
    attend,
    by,
    case_of,
    check,
    filled,
    holding,
    in_float64,
    inputs,
    make_layers,
    sink_logits,
    step,
    untouched,
)
from columns_unseen import check_unseen
from tolerances import TOL

from turboq.cache import model_cache, windows
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulate
from turboq.numbers import rope as rotary
from turboq_kernels import columns
from turboq_kernels.columns import linear

# Gains that are codes of heads by themselves: the tests of a step of 5 tokens, and of a pool that
# has given up pages.
CASES = [
    {"gain": "none", "softcap": 1.5, "window": 270, "sinks": True},
    {"rope": "half", "block": 256, "heads": 4, "joined": 2, "window": 270},
    {"rope": "partial", "block": 128, "gain": "none", "joined": 1, "softcap": 1.5},
    {"rope": "half", "heads": 4, "joined": 2, "softcap": 1.5, "window": 270, "sinks": True},
    {"rope": "partial", "block": 64, "gain": "none", "tokens": 3, "softcap": 1.5, "window": 270,
     "sinks": True},
]  # fmt: skip


def read_by(case):
    """XLA folds queries for blocks of 16 positions and more, kernels decode other keys."""
    folds = "rope" not in case or case.get("block", 1) >= 16
    return [*KERNELS, "linear"] if folds else KERNELS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_read_what_decoding_reads(rng, case):
    """Layers of other bits by one program."""
    check(rng, read_by(case), interpret=True, **case)


def step_of(
    rng, lengths, steps, *, tokens=1, sinks=False, window=None, softcap=None, heads=HEADS, **case
):
    """The last layer of a case after a step, and how to run it: by the programs of `check`.

    Sequences have so many tokens before it, with others behind them, and get so many of its own.
    """
    _, held, words = case_of(rng, heads=heads, **case)
    state = dataclasses.replace(held[-1][0], lengths=jnp.array(lengths, jnp.int32))
    q, _, _, state, words, tail = step(rng, state, words, steps, tokens)
    at = state.lengths[:, None] - np.array(steps)[:, None] + np.arange(tokens)[None]
    options = {"softcap": softcap} if softcap else {}
    options |= {"sink_logits": sink_logits(heads)} if sinks else {}
    options |= {"window": window} if window else {}

    own = {"state": state, "words": words, "tail": tail}

    def run(name, **changed):
        return by(name, q=q, at=at, **own | changed, **options)

    return run, state, words, tail, at


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_nobody_sees(rng, case):
    """310 tokens and some of two pages of three, and no more than the step's first."""
    tokens = case.get("tokens", 1)
    run, *of, at = step_of(rng, [310, 0], [tokens, 1], **case)
    for name in ("xla", *read_by(case)):
        want = check_unseen(rng, functools.partial(run, name), *of, at, case.get("window"))
        assert np.all(np.any(want, axis=-1))


def test_a_broken_token_breaks_its_head(rng):
    """Inf among the recent values of a head: NaN for all its rows on a TPU, and for no other."""
    run, state, *_ = step_of(rng, [20, 20], [1, 1], **CASES[3])
    exact = dataclasses.replace(
        state.exact, v_recent=state.exact.v_recent.at[0, 1, :, 4].set(jnp.inf)
    )
    broken = np.isnan(run("mosaic_tpu", state=dataclasses.replace(state, exact=exact)))
    assert broken[0, 0, GROUP : 2 * GROUP].all()
    assert broken.sum() == GROUP * DIM


@pytest.mark.parametrize(
    ("names", "sinks"),
    [(("linear", *KERNELS), None), (("linear",), sink_logits())],  # XLA adds sinks to all of them
    ids=["none", "sinks"],
)
def test_some_tokens_at_once_and_an_empty_cache(rng, names, sinks):
    held, words = filled(rng, make_layers(rng, TokenPolicy()), 5, 300, counts=[5, 0])
    (state, tail, *_), (q, *_) = held[1], inputs(rng, 5)
    at = np.broadcast_to(np.arange(5, dtype=np.int32), (2, 5))
    run = functools.partial(attend, q, q_positions=at, scale=SCALE, sink_logits=sinks)
    want = run(state, words, tail, implementation="xla")
    for name in names:
        own = functools.partial(run, implementation=name, interpret=True)
        got = check_unseen(rng, own, state, words, tail, at, None)
        np.testing.assert_allclose(got, want, atol=TOL["columns"], err_msg=name)
        assert not np.any(np.asarray(got)[1])


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


def linear_of(layers):
    """The first of some layers in a pool of theirs."""
    form = model_cache.forms(layers)
    return linear.linear_layer(form.layers[0], pool_lanes=form.columns[0])


def test_means_turn_within_their_block(rng):
    """R(t) of the fitted means, and what units add to them, against rotations in float64."""
    for name, rope in ROPES.items():
        for layer in make_layers(rng, TokenPolicy(), rope, 256, joined=HEADS):
            form = linear_of([layer])
            joint = {n: np.asarray(x, np.float64)[0] for n, x in layer.joint.items()}
            mean, center = (joint[n][: HEADS * DIM].reshape(HEADS, DIM) for n in ("mean", "center"))
            assert np.abs(center - mean).max() > 0.1
            turned = rotary.matrices(rope, DIM, np.arange(256)) @ mean[:, None, :, None]
            want = turned[..., 0] + (center - mean)[:, None]
            np.testing.assert_allclose(form.means, want, atol=TOL["rope_rotate"], err_msg=name)


def test_longest_and_sums_of_columns(rng):
    """Of every unit by itself, in float64."""
    for joined in (None, HEADS):
        form = linear_of(make_layers(rng, TokenPolicy(), joined=joined))
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
        state, words, tail = untouched(layers)
        at = jnp.zeros((2, 1), jnp.int32)
        with pytest.raises(ValueError, match=f"'mosaic_tpu' cannot run this case: .*{reason}"):
            columns.attend(
                q, state, words, tail, q_positions=at, scale=1.0, implementation="mosaic_tpu"
            )
    with pytest.raises(ValueError, match="implementation='cuda' must be None or one of"):
        columns.attend(q, state, words, tail, q_positions=at, scale=1.0, implementation="cuda")


@pytest.mark.parametrize("block", [256, 1])
def test_a_pool_that_has_given_up_pages(rng, block):
    """Behind a window: slots count from the first page that is held, positions do not."""
    layer = dataclasses.replace(
        make_layers(rng, TokenPolicy(sinks=3, recent=2), ROPES["half"], block)[0], window=100
    )
    ((state, *whole),), words = holding(rng, [layer], [TOKENS, TOKENS - 40], 2)
    first = windows.first_needed(100, state.lengths)
    assert first.tolist() == [256, 256]
    state = dataclasses.replace(state, dropped=first)
    q, *more, state, words, tail = step(rng, state, words, [1, 1], 1)
    at = state.lengths[:, None] - 1
    run = functools.partial(by, q=q, state=state, words=words, tail=tail, at=at, window=100)
    want = run("xla")
    whole = [np.concatenate(x, axis=1) for x in zip(whole, more, strict=True)]
    exact = in_float64(layer, q, *whole, state, words, first=256, window=100)
    for name in KERNELS:
        triton = "columns_triton_few" if block > 1 else "columns_decoded_float16"
        off = TOL[triton if name == "triton" else "columns"]
        got = run(name)
        np.testing.assert_allclose(got, want, atol=off, err_msg=name)
        np.testing.assert_allclose(got[:1], exact, atol=off, err_msg=name)
    with pytest.raises(ValueError, match="sees more than the 100 tokens"):
        columns.attend(q, state, words, tail, q_positions=at, scale=SCALE)
