"""`rope_block`: float64 oracle with complex numbers, who gets bits, the best scales, RoPE."""

from __future__ import annotations

import functools
import heapq
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import RopeBlock, from_config
from turboq.codecs.fit_rope_block import (
    block_moments,
    fit_rope_block,
    matrices,
)
from turboq.codecs.observed import Observed
from turboq.codecs.rope_block import block_channels
from turboq.codecs.transform_padded import pad_side
from turboq.codecs.water_filling import batched_rates
from turboq.errors import TurboqError
from turboq.numbers import codebook

DIM = 32
SEGMENTS = ((8, 4), (16, 2))  # 8 coordinates are dropped


def source(rng, n=64):
    """Vectors whose blocks have very different power, and a metric of another shape."""
    scale = np.repeat(np.geomspace(3, 0.02, DIM // 2)[rng.permutation(DIM // 2)], 2)
    x = rng.normal(size=(n, DIM)) * scale + 5 * rng.normal(size=DIM)
    half = rng.normal(size=(DIM, DIM))
    return x.astype(np.float32), half @ half.T / DIM


def planes(x, layout, rope_dim=DIM):
    """RoPE blocks as complex numbers, as the layouts are defined in the plan's schema."""
    front = x[..., :rope_dim]
    if layout == "half":
        pairs = front[..., : rope_dim // 2] + 1j * front[..., rope_dim // 2 :]
    else:
        pairs = front[..., ::2] + 1j * front[..., 1::2]
    return np.concatenate([pairs, x[..., rope_dim::2] + 1j * x[..., rope_dim + 1 :: 2]], axis=-1)


def fit(codec, x, metric=None):
    """Arrays of one head from vectors alone."""
    metric = np.eye(x.shape[1]) if metric is None else metric
    return fit_rope_block(codec, x.mean(axis=0), np.cov(x.T, bias=True), metric, x)


@pytest.mark.parametrize(
    ("layout", "rope_dim", "gain"),
    [("half", 0, "none"), ("half", 16, "code"), ("interleaved", 0, "float16")],
)
def test_follows_float64(layout, rope_dim, gain, rng):
    codec = RopeBlock(dim=DIM, segments=SEGMENTS, layout=layout, rope_dim=rope_dim, gain=gain)
    x, metric = source(rng)
    arrays = fit(codec, x, metric)
    assert {n: a.shape for n, a in arrays.items()} == codec.array_shapes
    a = {n: v.astype(np.float64) for n, v in arrays.items()}
    order = [list(a["place"]).index(i) for i in range(DIM // 2)]
    y = planes(x - a["mean"], layout, rope_dim or DIM)[:, order] / a["scale"][order]
    y = np.stack([y.real, y.imag], axis=-1).reshape(len(x), DIM)[:, : codec.coded]
    y = np.concatenate([y[:, :8] @ turn(8).T, y[:, 8:] @ turn(16).T], axis=1)
    stored = jax.jit(codec.encode)(arrays, jnp.asarray(x))
    g = np.ones(len(x))
    if gain == "float16":
        g = np.asarray(stored["gain"][:, 0], np.float64)
        np.testing.assert_allclose(g, np.sqrt(np.mean(y * y, axis=1)), rtol=TOL["rule_f16"])
    if gain == "code":
        rms = np.sqrt(np.mean(y * y, axis=1))
        g = a["gains"][np.argmin(np.abs(np.log(rms[:, None] / a["gains"])), axis=1)]
    books = [codebook.lloyd_max("gaussian", b) for width, b in SEGMENTS for _ in range(width)]
    unit = y / g[:, None]
    c = np.stack([t[np.argmin(np.abs(t - unit[:, [j]]), axis=1)] for j, t in enumerate(books)], 1)
    y_hat = c * g[:, None]
    y_hat = np.concatenate([y_hat[:, :8] @ turn(8), y_hat[:, 8:] @ turn(16)], axis=1)
    pairs = np.zeros((len(x), DIM // 2), complex)
    kept = order[: codec.coded // 2]
    pairs[:, kept] = (y_hat[:, ::2] + 1j * y_hat[:, 1::2]) * a["scale"][kept]
    got = np.asarray(jax.jit(codec.decode)(arrays, stored), np.float64)
    error = np.abs(planes(got - a["mean"], layout, rope_dim or DIM) - pairs).max(axis=1)
    # float32 moves a value at a threshold to the neighbouring code now and then.
    assert np.sum(error > TOL["transform_float64"] * np.abs(x).max()) <= 1


def turn(width):
    from turboq.numbers.rotation import Rotation

    return Rotation(kind="hadamard", dim=width).matrix


def test_blocks_are_the_planes_of_rope(rng):
    x = rng.normal(size=DIM)
    for layout, rope_dim in (("half", DIM), ("interleaved", DIM), ("half", 16)):
        pairs = x[block_channels(DIM, layout, rope_dim)]
        np.testing.assert_array_equal(
            pairs[:, 0] + 1j * pairs[:, 1],
            planes(x, layout, rope_dim),
            err_msg=f"{layout} {rope_dim}",
        )


def test_energy_of_one_block_gets_the_bits(rng):
    x = rng.normal(size=(200, DIM)) * 1e-3
    x[:, [5, 5 + DIM // 2]] = rng.normal(size=(200, 2)) * 4
    v, w = block_moments(np.cov(x.T, bias=True), np.eye(DIM))
    assert np.argmax(v * w) == 5
    segments = ((8, 8),)
    arrays = fit(RopeBlock(dim=DIM, segments=segments), x)
    assert arrays["place"][5] == 0
    # The same energy in the queries instead: the metric decides just as the variance does.
    metric = np.eye(DIM)
    metric[[9, 9 + DIM // 2], [9, 9 + DIM // 2]] = 1e8
    noise = rng.normal(size=(200, DIM))
    arrays = fit(RopeBlock(dim=DIM, segments=segments), noise, metric)
    assert arrays["place"][9] == 0


def test_segments_cost_no_more_than_the_greedy_on_the_same_law(rng):
    """Greedy min of sum s 4^-b by runs of 8 equal costs is optimal: the runs must match it."""
    s = np.repeat(np.sort(rng.exponential(size=4))[::-1], 8)
    law = 4.0 ** -np.arange(9.0)
    (found,) = batched_rates((s[:, None] * law)[None], runs=4)
    for total in (8, 40, 96, 160):
        bits = np.zeros(4, int)
        queue = [(-s[8 * i] * 0.75, i) for i in range(4)]
        heapq.heapify(queue)
        for _ in range(total // 8):
            _, i = heapq.heappop(queue)
            bits[i] += 1
            if bits[i] < 8:
                heapq.heappush(queue, (-s[8 * i] * 0.75 * law[bits[i]], i))
        due = 8 * np.sum(s[::8] * law[bits])
        np.testing.assert_allclose(found.error[found.at(total)], due, rtol=TOL["float64"])


def test_scales_are_the_best_of_all(rng):
    """Moving any block's scale, its run's variance put back to 1, raises the weighted error."""
    x, metric = source(rng, n=400)
    codec = RopeBlock(dim=DIM, segments=((16, 3), (16, 2)))
    arrays = fit(codec, x, metric)
    v, w = block_moments(np.cov(x.T, bias=True), metric)
    order = np.argsort(arrays["place"])

    def cost(scale):
        total = 0.0
        for run, bits in ((order[:8], 3), (order[8:], 2)):
            share = np.mean(v[run] / scale[run] ** 2)
            total += 4.0**-bits * share * np.sum(w[run] * scale[run] ** 2)
        return total

    scale = arrays["scale"].astype(np.float64)
    for run in (order[:8], order[8:]):
        np.testing.assert_allclose(np.mean(v[run] / scale[run] ** 2), 1, rtol=TOL["unit_f32"])
    for block in range(DIM // 2):
        for factor in (0.8, 1.25):
            moved = scale.copy()
            moved[block] *= factor
            assert cost(moved) > cost(scale) * (1 + 1e-4)


def test_dropped_blocks_decode_to_the_mean_and_matrices_agree(rng):
    codec = RopeBlock(dim=DIM, segments=SEGMENTS)
    x, metric = source(rng)
    arrays = fit(codec, x, metric)
    lifted = {n: jnp.asarray(a) for n, a in arrays.items()}
    back = np.asarray(codec.decode(lifted, codec.encode(lifted, jnp.asarray(x))))
    dropped = codec.blocks[arrays["place"] >= codec.coded // 2].reshape(-1)
    assert len(dropped) == DIM - codec.coded
    mean = np.broadcast_to(arrays["mean"][dropped], (len(x), len(dropped)))
    np.testing.assert_array_equal(back[:, dropped], mean)
    analysis, synthesis = matrices(codec, arrays)
    np.testing.assert_allclose(analysis @ synthesis, np.eye(codec.coded), atol=TOL["float64"])
    size = np.abs(analysis).max(), np.abs(synthesis).max()
    np.testing.assert_allclose(
        codec.analysis_of(lifted), analysis, atol=TOL["unit_f32"] * size[0], rtol=0
    )
    np.testing.assert_allclose(
        codec.synthesis_of(lifted), synthesis, atol=TOL["unit_f32"] * size[1], rtol=0
    )


def test_padded_simulation_is_the_codec(rng):
    """Heads with other segments under one program decode to the same values."""
    x, metric = source(rng)
    codecs = [RopeBlock(dim=DIM, segments=SEGMENTS), RopeBlock(dim=DIM, segments=((24, 3),))]
    arrays = [fit(c, x, metric) for c in codecs]
    groups = [{n: jnp.asarray(v)[None] for n, v in a.items()} for a in arrays]
    padded, merged = pad_side(codecs, groups, [1] * len(groups))

    @functools.partial(jax.jit, static_argnums=0)
    def roundtrip(codec, arrays, x):
        return codec.decode(arrays, codec.encode(arrays, x))

    for h, (codec, own) in enumerate(zip(codecs, groups, strict=True)):
        got = roundtrip(padded, {n: v[h] for n, v in merged.items()}, jnp.asarray(x))
        due = np.asarray(roundtrip(codec, {n: v[0] for n, v in own.items()}, jnp.asarray(x)))
        far = np.abs(np.asarray(got) - due).max(axis=1) > TOL["decode_f32"] * np.abs(due).max()
        assert np.sum(far) <= 1


def test_config_and_refused_fields():
    codec = RopeBlock(dim=64, segments=((16, 4), (32, 3)), layout="interleaved", rope_dim=32)
    assert from_config(json.loads(json.dumps(codec.config()))) == codec
    assert [(p.width, p.bits) for p in codec.reading.parts] == [(16, 4), (32, 3)]
    for field, value in (("layout", "pairs"), ("rope_dim", 3), ("rope_dim", 66), ("seed", -1)):
        with pytest.raises(ValueError, match=field):
            RopeBlock(dim=64, segments=((16, 4),), **{field: value})
    with pytest.raises(ValueError, match="finite"):
        fit(codec, np.full((4, 64), np.nan))
    seen = Observed.of(np.ones((1, 64, 64), np.float32), rope_layout="half")
    with pytest.raises(TurboqError, match="turn with layout='half' and rope_dim=0"):
        codec.fit(seen)
