"""Keys that a GPU kernel decodes and turns, in interpret mode, against float64 of random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from columns_cases import DIM, GROUP, HEADS, ROPES, make_layers
from tolerances import TOL

from turboq.cache import model_cache
from turboq.cache.columns import BIT_OF
from turboq.cache.layer import TokenPolicy
from turboq.numbers import rope as rotary
from turboq_kernels.columns import (
    linear,
    triton,
    triton_decoded,
    unit_values,
)
from turboq_kernels.columns.types import Sums

SLOTS = 512
# Joined heads, pairs of channels, positions of a block, position of the first slot.
CASES = [
    (None, "half", 1, (0, 0)),
    (3, "partial", 1, (256, 1024)),
    (3, "half", 100, (512, 768)),
]


def due(made, words, rope, block, first):
    """Keys [B, K, S, D] of every slot, turned to their positions, in float64."""
    token = np.arange(SLOTS)
    bits = np.asarray(words)[:, token // 256, token % 8]
    bits = (bits >> BIT_OF[token // 8 % 32][None, :, None].astype(np.uint32) & 1).astype(float)
    side, at = made.k, int(made.first[0])
    unit, whole = np.asarray(side.unit), np.asarray(side.matrix, np.float64)
    own = np.pad(bits, ((0, 0), (0, 0), (0, len(unit))))[..., at : at + len(unit)] - 0.5
    lanes = np.asarray(made.gain_lanes[0])
    codes = np.where(lanes >= 0, bits[..., lanes], 0) @ (1 << np.arange(lanes.shape[1]))
    gain = np.asarray(side.gains, np.float64)[np.arange(len(lanes)), codes.astype(int)]
    own = np.where(unit >= 0, gain[..., unit] * own, 0)
    position = np.asarray(first)[:, None] + token
    out = np.empty((len(words), HEADS, SLOTS, DIM))
    for head in range(HEADS):
        mine = [u for u, j in enumerate(made.unit_groups) if j == made.unit_groups[head]]
        matrix = whole[head if made.joined else 0] * np.isin(unit, mine)
        x = own @ matrix.T + np.asarray(made.means, np.float64)[head][position % block]
        start = position // block * block
        turn = rotary.matrices(rope, DIM, start.ravel()).reshape(*start.shape, DIM, DIM)
        out[:, head] = np.einsum("bscd,bsd->bsc", turn, x)
    return out


@pytest.mark.parametrize(("joined", "pairs", "block", "first"), CASES)
def test_logits_are_those_of_float64(joined, pairs, block, first, rng):
    """Layers of other bits in every head by one program; pages that nobody sees are left out."""
    layers = make_layers(rng, TokenPolicy(), ROPES[pairs], block, joined=joined)
    form = model_cache.forms(layers)
    assert form is not None
    shape = (2, SLOTS // 256, 8, form.columns[0])
    words = jnp.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32))
    rows = rng.normal(size=(2, HEADS * GROUP, DIM)) * np.exp2(rng.integers(-9, 9, (2, 6, 1)))
    ends = jnp.tile(jnp.asarray([[SLOTS], [300 if joined else 256]], jnp.int32), (1, rows.shape[1]))
    traced, dropped = [], jnp.asarray(first, jnp.int32) if any(first) else None

    @jax.jit
    def logits(rows, words, made, starts, ends):
        traced.append(1)
        return triton_decoded.logits(
            rows, words, made, layers[0], dropped, starts, ends, interpret=True
        ).bias

    for own in form.layers:
        whole = linear.linear_layer(own, pool_lanes=words.shape[-1])
        made = triton_decoded.added(whole, own.layer, words)
        got = logits(jnp.asarray(rows, jnp.float32), words, made, jnp.zeros_like(ends), ends)
        keys = due(whole, words, ROPES[pairs], block, first)
        by_head = rows.reshape(2, HEADS, GROUP, DIM)
        want = np.einsum("bkgd,bksd->bkgs", by_head, keys).reshape(got.shape)
        size, length = np.linalg.norm(by_head, axis=-1), np.linalg.norm(keys, axis=-1)
        size = size[..., None] * length[:, :, None]
        off = np.abs(np.asarray(got, np.float64) - want) / size.reshape(got.shape)
        for b, end in enumerate(ends[:, 0].tolist()):
            assert np.max(off[b, :, :end]) < TOL["decoded_key"]
        # No bits and gains make a key that float16 does not hold.
        matrix, means = (
            np.asarray(x, np.float64) for x in (made.decoded.matrix, made.decoded.means)
        )
        most = np.abs(matrix).sum(axis=2) + np.abs(means).max(axis=1)
        most = np.sqrt(np.sum(most.reshape(HEADS, -1, 2) ** 2, axis=2)).max(axis=1)
        assert np.all(most <= triton_decoded.LARGEST)
        assert np.all(most > triton_decoded.LARGEST / 4)
    assert len(traced) == 1


@pytest.mark.parametrize("v_dim", [DIM, 16])
def test_values_by_units_are_those_of_the_whole_matrix(v_dim, rng):
    """Sums over lanes as the kernel has them: to units and then to channels, against float64."""
    layers = make_layers(rng, TokenPolicy(), ROPES["half"], joined=3, v_dim=v_dim)
    form = model_cache.forms(layers)
    assert form is not None
    lanes = form.columns[0] + 512  # so many that no unit's lanes are read from before it on
    for own in form.layers:
        whole = linear.linear_layer(own, pool_lanes=lanes)
        dense, unit = np.asarray(whole.v.matrix, np.float64), np.asarray(whole.v.unit)
        of_lane = rng.normal(size=(2, HEADS * GROUP, len(unit)))  # what a kernel sums
        mass = rng.uniform(1, 9, size=of_lane.shape[:2])
        made = triton_decoded.added(whole, own.layer, jnp.zeros((1, 1, 8, lanes), jnp.uint32))
        place = triton.place_of(whole, 1)
        by_head = of_lane.reshape(2, HEADS, GROUP, -1) * (unit >= 0)
        want = np.einsum("bhmw,hew->bhme", by_head, dense).reshape(2, HEADS * GROUP, v_dim)
        want += mass[..., None] * np.repeat(np.asarray(whole.v.mean, np.float64), GROUP, axis=0)
        acc = np.zeros((*of_lane.shape[:2], len(place)))
        for p in range(2 * HEADS):  # a unit's lanes come first among those that are its place's
            lane = np.flatnonzero(unit == p)
            acc[..., np.flatnonzero(place == p)[: len(lane)]] = of_lane[..., lane]
        total = jnp.asarray(mass, jnp.float32)
        sums = Sums(acc=jnp.asarray(acc, jnp.float32), total=total, top=None)
        got = unit_values.values(sums, made, own.layer, made.decoded.values, place)
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=TOL["packed_attention"] * largest)
