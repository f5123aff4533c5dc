"""Heads stored together: units there and back, attention through the pool, and who refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import accounting, composed, contiguous, joint, model_cache, paged
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.cache.simulate import simulate
from turboq.codecs.exact import Exact
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq_kernels import columns

HEADS, K_DIM, V_DIM, SCALE = 4, 24, 16, 0.3
ROPE = Rope(dim=16, theta=50.0)  # partial: 8 channels do not turn


def fitted(rng, heads):
    """A mean and a well-conditioned S for groups of `heads`."""
    shape = joint.shapes(HEADS, heads, K_DIM, V_DIM)
    mean = rng.normal(size=shape["mean"])
    synthesis = 0.05 * rng.normal(size=shape["synthesis"]) + np.eye(shape["mean"][1])
    return {"mean": mean.astype(np.float32), "synthesis": synthesis.astype(np.float32)}


@functools.cache
def side(dim, segments, count):
    """A codec and its arrays, fitted once for all tests."""
    codec = Transform(dim=dim, segments=segments, quantizer="window", states=16, gain="code")
    x = np.random.default_rng([dim, len(segments)]).normal(size=(count, 80, dim))
    arrays = codec.fit(Observed.of(x.astype(np.float32)))
    return codec, {name: jnp.asarray(a) for name, a in arrays.items()}


def make_apart(rng, heads, policy=None, rope=ROPE, block=1):
    """Units in bits of their own, in groups of heads out of order; all matrices apart."""
    groups = []
    for own, k, v in (((0, 3), ((24, 3),), ((8, 2),)), ((1, 2), ((8, 5), (8, 1)), ((8, 3),))):
        (k, k_arrays), (v, v_arrays) = side(K_DIM, k, len(own)), side(V_DIM, v, len(own))
        groups.append(HeadGroup(heads=own, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays))
    return KVLayer(
        groups=tuple(groups), policy=policy or TokenPolicy(), rope=rope, rope_block=block,
        joint_heads=heads, joint=joint.arrays_of(fitted(rng, heads)),
    )  # fmt: skip


def make_layer(*args, **named):
    """`make_apart` as a plan's layer is held."""
    return together(make_apart(*args, **named))


def together(apart):
    fitted = {"mean": apart.joint["mean"], "synthesis": joint.synthesis_of(apart)}
    return composed.join(apart, apart.joint_heads, fitted)


def matrices(layer):
    """A [J, W, C] and S [J, C, W] as they are held, in float64."""
    own = {name: np.asarray(x, np.float64) for name, x in layer.joint.items()}
    a, s = own["analysis"], own["synthesis"]
    a = a * own["analysis_scale"][:, :, None] * own["analysis_channels"][:, None]
    return a, s * own["synthesis_scale"][:, None] * own["synthesis_channels"][:, :, None]


def inputs(rng, t, batch=2):
    shapes = ((2 * HEADS, K_DIM), (HEADS, K_DIM), (HEADS, V_DIM))
    return tuple(jnp.asarray(rng.normal(size=(batch, t, *s)), jnp.float32) for s in shapes)


def turned(rope, x, positions):
    """Keys [B, T, K, D] turned by their positions [T], float64."""
    if rope is None:
        return x
    half = rope.dim // 2
    at = positions[:, None] * rope.theta ** -(np.arange(half) / half)
    cos, sin = np.cos(at)[None, :, None], np.sin(at)[None, :, None]
    a, b, rest = np.split(x, [half, rope.dim], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def each_unit(apart):
    """(0 of keys or 1 of values, head, codec, its arrays in float64) of every unit."""
    for group in apart.groups:
        for side, codec, arrays in ((0, group.k, group.k_arrays), (1, group.v, group.v_arrays)):
            for i, h in enumerate(group.heads):
                own = {name: np.asarray(a[i], np.float64) for name, a in arrays.items()}
                yield side, h, codec, own


def flat(layer, k, v):
    """[B, T, J, C] of keys and values, or of units in their places, float64."""
    groups = (*k.shape[:2], HEADS // layer.joint_heads, -1)
    return np.concatenate([np.asarray(x, np.float64).reshape(groups) for x in (k, v)], axis=-1)


def of_units(layer, units):
    """Keys and values of units, in float64: center + S y, group by group."""
    y, (_, synthesis) = flat(layer, *units), matrices(layer)
    coded, mean, center = (np.asarray(layer.joint[n]) for n in ("coded", "mean", "center"))
    y = np.concatenate([y, np.zeros((*y.shape[:3], 1))], axis=-1)  # what is not coded
    x = np.stack(
        [y[:, :, j, coded[j]] @ synthesis[j].T + center[j] for j in range(len(mean))], axis=2
    )
    cut = layer.joint_heads * K_DIM
    k, v = x[..., :cut].reshape(*y.shape[:2], HEADS, -1), x[..., cut:]
    at = np.arange(k.shape[1])
    mu = mean[:, :cut].reshape(HEADS, K_DIM)
    # What varies turns with the start of its block, the mean with its own position.
    varying = turned(layer.rope, k - mu, at - at % layer.rope_block)
    mu = turned(layer.rope, np.broadcast_to(mu, k.shape), at)
    return varying + mu, v.reshape(*y.shape[:2], HEADS, V_DIM)


@pytest.mark.parametrize(
    ("heads", "rope", "block"), [(4, ROPE, 1), (2, ROPE, 16), (1, ROPE, 16), (2, None, 1)]
)
def test_units_stand_for_keys_and_values(rng, heads, rope, block):
    """mean + S y is what went in; the first D of y are the first head's keys'."""
    layer = make_apart(rng, heads, rope=rope, block=block)
    _, k, v = inputs(rng, 40)
    at = jnp.arange(40, dtype=jnp.int32)[None]
    units = joint.to_units(layer, k, v, at)
    back = joint.from_units(layer, *units, at)
    for got, want, given in zip(back, of_units(layer, units), (k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
        np.testing.assert_allclose(got, given, atol=TOL["packed_attention"])
    # One unit's one coordinate is one column of S.
    one = jnp.zeros_like(units[0]).at[:, :, 0, 0].set(1.0)
    plain = dataclasses.replace(layer, rope=None)
    k_one, v_one = joint.from_units(plain, one, jnp.zeros_like(units[1]), at)
    column = matrices(layer)[1][0, :, 0] + np.asarray(layer.joint["mean"])[0]
    np.testing.assert_allclose(
        np.concatenate([k_one[0, 0, :heads].ravel(), v_one[0, 0, :heads].ravel()]), column,
        atol=TOL["packed_attention"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "rope", "block", "policy"),
    [
        (4, ROPE, 1, TokenPolicy(sinks=2, recent=3)),
        (2, ROPE, 8, TokenPolicy(sinks=1)),
        (2, None, 1, TokenPolicy()),
    ],
)
def test_attention_through_the_pool_in_float64(rng, heads, rope, block, policy):
    """A chunk, single tokens, a chunk: what is read are the units' codes, turned back in NumPy."""
    apart = make_apart(rng, heads, policy, rope, block)
    layer = together(apart)
    form = model_cache.forms([layer, layer])
    states, (words,) = model_cache.init(form, batch=2, capacity=40)
    q, k, v = inputs(rng, 30)
    state, outs, at = states[1], [], 0
    for size in (14, 1, 1, 14):
        part = slice(at, at + size)
        state, words, tail = model_cache.write(state, words, k[:, part], v[:, part])
        where = jnp.broadcast_to(jnp.arange(at, at + size, dtype=jnp.int32), (2, size))
        outs.append(
            model_cache.attend(q[:, part], state, words, tail, q_positions=where, scale=SCALE)
        )
        at += size
    padded = state.form.layer
    positions = jnp.arange(30, dtype=jnp.int32)[None]
    coded = simulate(joint.units(padded), *joint.to_units(padded, k, v, positions))
    stored = of_units(layer, coded)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, stored_values=stored)
    got = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    simulated = simulate(padded, k, v)
    for a, b in zip(simulated, stored, strict=True):
        np.testing.assert_allclose(a, b, atol=TOL["packed_attention"])


@pytest.mark.parametrize(("heads", "rope", "block"), [(2, ROPE, 16), (4, ROPE, 1), (1, None, 1)])
def test_coordinates_are_those_that_the_units_have(rng, heads, rope, block):
    """A and S' of all units, on a diagonal, times those of the group; products in float64.

    Rounded entry by entry, each at most half a step of its channel from what it should be once
    those before it are made good: a row's error costs at most half a step squared times the trace
    of the metric in those steps.
    """
    apart = make_apart(rng, heads, rope=rope, block=block)
    layer = together(apart)
    _, k, v = inputs(rng, 40)
    at = jnp.arange(40, dtype=jnp.int32)[None]
    cut = heads * K_DIM
    (a, s), (_, turn) = matrices(layer), matrices(apart)
    y, x = flat(layer, *joint.to_units(layer, k, v, at)), flat(layer, k, v)
    held = {name: np.asarray(x, np.float64) for name, x in layer.joint.items()}
    center, coded = held["center"], held["coded"]
    for side, h, codec, own in each_unit(apart):
        j, first = h // heads, h % heads * codec.dim + side * cut
        rows, of = slice(first, first + codec.dim), np.linalg.inv(turn[j])
        mine = np.flatnonzero((coded[j] >= first) & (coded[j] < first + codec.dim))
        assert coded[j, mine].tolist() == list(range(first, first + codec.coded))
        seen, felt = turn[j] @ turn[j].T, of.T @ of
        analysis, synthesis = own["analysis"] @ of[rows], turn[j][:, rows] @ own["synthesis"]
        for name, want, got, metric, channels in (
            ("analysis", analysis, a[j, mine], seen, np.sqrt(np.diag(felt))),
            ("synthesis", synthesis.T, s[j].T[mine], felt, np.sqrt(np.diag(seen))),
        ):
            np.testing.assert_allclose(held[f"{name}_channels"][j], channels, rtol=1e-5)
            step = held[f"{name}_scale"][j, mine]
            cost = np.einsum("rc,cd,rd->r", got - want, metric, got - want)
            most = np.square(step / 2) * np.sum(np.diag(metric) * channels**2)
            assert np.all(cost <= most * (1 + 1e-5))
            assert np.any(got != want)
        assert not np.any(y[:, :, j, first + codec.coded : first + codec.dim])
        if rope is None:
            want = (x[:, :, j] - center[j]) @ a[j, mine].T
            # float32 sums of up to 160 products of order 1.
            got = y[:, :, j, first : first + codec.coded]
            np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    means = np.asarray(apart.joint["mean"], np.float64)
    for side, h, codec, own in each_unit(apart):
        first = h % heads * codec.dim + side * cut
        means[h // heads] += turn[h // heads][:, first : first + codec.dim] @ own["mean"]
    np.testing.assert_allclose(center, means, atol=TOL["packed_attention"])


@pytest.mark.parametrize(("heads", "width"), [(1, 32), (2, 56)])
def test_what_is_held_counts(rng, heads, width):
    """Two turns of the coordinates that are coded, as they are in memory, or without arrays."""
    apart = make_apart(rng, heads)
    layer = together(apart)
    assert layer.joint["analysis"].shape == (HEADS // heads, width, heads * (K_DIM + V_DIM))
    held = (layer.joint, [(g.k_arrays, g.v_arrays) for g in layer.groups])
    real = sum(x.nbytes for x in jax.tree.leaves(held))
    bare = tuple(dataclasses.replace(g, k_arrays={}, v_arrays={}) for g in apart.groups)
    for one in (layer, dataclasses.replace(apart, groups=bare, joint={})):
        assert accounting.array_bytes([one]) == real
        assert one.bits_per_token == apart.bits_per_token


def test_units_of_other_codecs_are_whole(rng):
    """A unit that is no transform keeps its codec and has all its coordinates."""
    apart = make_apart(rng, 2)
    other = dataclasses.replace(apart.groups[0], k=Exact(dim=K_DIM), k_arrays={})
    layer = together(dataclasses.replace(apart, groups=(other, apart.groups[1])))
    assert layer.groups[0].k == Exact(dim=K_DIM)
    # Of every group one head of 24 and 8 coordinates and one of 16 and 8.
    assert layer.joint["analysis"].shape == (2, 24 + 8 + 16 + 8, 80)
    assert layer.joint["synthesis"].shape == (2, 80, 24 + 8 + 16 + 8)
    real = jax.tree.leaves((layer.joint, [(g.k_arrays, g.v_arrays) for g in layer.groups]))
    assert accounting.array_bytes([layer]) == sum(x.nbytes for x in real)


def test_layers_of_other_widths_are_as_wide_in_the_pool(rng):
    """Zeros for what one layer codes less than another; what is read stays."""
    apart = make_apart(rng, 2)
    (first, second), (_, k, v) = apart.groups, inputs(rng, 20)
    layers = []
    for one in (first, second):  # four heads like those of one group
        every = {"k_arrays": one.k_arrays, "v_arrays": one.v_arrays}
        twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), every)
        alike = dataclasses.replace(one, heads=(0, 1, 2, 3), **twice)
        layers.append(together(dataclasses.replace(apart, groups=(alike,))))
    forms = model_cache.forms(layers)
    assert [x.joint["analysis"].shape[1] for x in layers] == [64, 48]
    for layer, form in zip(layers, forms.layers, strict=True):
        assert form.layer.joint["analysis"].shape == (2, 64, 80)
        for due, got in zip(simulate(layer, k, v), simulate(form.layer, k, v), strict=True):
            np.testing.assert_allclose(got, due, atol=TOL["packed_attention"])


def test_who_reads_each_head_by_itself_says_so(rng):
    layer = make_layer(rng, 2)
    with pytest.raises(TurboqError, match=r"turboq.cache.contiguous reads each head.*joint=none"):
        contiguous.init(layer, batch=1, capacity=10)
    with pytest.raises(TurboqError, match=r"turboq.cache.paged reads each head.*model_cache"):
        paged.init(layer, pages=2, rows=1)
    form = model_cache.forms([layer])
    (state,), (words,) = model_cache.init(form, batch=1, capacity=10)
    q, k, v = inputs(rng, 1, batch=1)
    state, words, tail = model_cache.write(state, words, k, v)
    at = jnp.zeros((1, 1), jnp.int32)
    assert columns.prepare(state, words) is None
    columns.attend(q, state, words, tail, q_positions=at, scale=SCALE)  # XLA does


def test_refusals(rng):
    layer = make_layer(rng, 2)
    with pytest.raises(ValueError, match=r"joint_heads=3 must divide self.kv_heads=4"):
        dataclasses.replace(layer, joint_heads=3)
    singular = fitted(rng, 2)
    singular["synthesis"][0] = 0
    with pytest.raises(ValueError, match="synthesis is singular"):
        joint.arrays_of(singular)
