"""Segments as data give what segments as a program give; other layers stay as they are."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.cache.simulate import simulate
from turboq.codecs import TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import PaddedTransform, shared_layer

DIM = 24


def group(heads, segments, x, **options):
    """One group whose K and V have these segments, fitted on the heads' samples."""
    codec = Transform(dim=DIM, segments=segments, **options)
    fitted = codec.fit(Observed.of(np.moveaxis(x[:, list(heads)], 1, 0)))
    stacked = {name: jnp.asarray(values) for name, values in fitted.items()}
    return HeadGroup(heads=heads, k=codec, v=codec, k_arrays=stacked, v_arrays=stacked)


def layer(**options):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 3, DIM)) * 0.8 ** np.arange(DIM) + rng.normal(size=(3, DIM))
    x = x.astype(np.float32)
    groups = (
        group((0, 2), ((8, 3), (8, 1)), x, **options),
        group((1,), ((16, 2), (8, 1)), x, **options),
    )
    return KVLayer(groups=groups, policy=TokenPolicy(sinks=1)), jnp.asarray(x[None, :64])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantizer": "trellis", "states": 4},
        {"quantizer": "trellis", "states": 8, "free_start": True, "gain": "code"},
        {"gain": "float16", "codebook": "fitted"},
        {"quantizer": "window", "states": 16},
        {"quantizer": "window", "states": 64, "gain": "code"},
    ],
    ids=str,
)
def test_same_values(options):
    kept, x = layer(**options)
    shared = shared_layer(kept)
    assert len(shared.groups) == 1
    assert isinstance(shared.groups[0].k, PaddedTransform)
    assert shared.policy == kept.policy
    for due, got in zip(simulate(kept, x, -x), simulate(shared, x, -x), strict=True):
        # A value at a threshold, or two paths of equal cost, may differ between two programs.
        off = np.abs(np.asarray(due) - np.asarray(got)).max(axis=-1)
        assert np.sum(off > TOL["transform_float64"] * np.abs(x).max()) <= 2


def test_one_program_for_different_segments():
    a, b = (shared_layer(layer()[0]) for _ in range(2))
    other = dataclasses.replace(layer()[0].groups[1], heads=(0, 1, 2))
    wide = {n: jnp.concatenate([v] * 3) for n, v in other.k_arrays.items()}
    other = dataclasses.replace(other, k_arrays=wide, v_arrays=wide)
    c = shared_layer(KVLayer(groups=(other,), policy=TokenPolicy(sinks=1)))
    assert a.groups[0].k == b.groups[0].k == c.groups[0].k


def test_other_layers_stay():
    plain = TurboQuantMSE(dim=DIM, bits=2)
    whole = uniform_layer(kv_heads=3, k=plain, v=plain, policy=TokenPolicy())
    assert shared_layer(whole) is whole
    mixed = layer()[0]
    mixed = KVLayer(
        groups=(mixed.groups[0], group((1,), ((8, 2),), np.asarray(layer()[1])[0], gain="float16")),
        policy=mixed.policy,
    )
    assert shared_layer(mixed) is mixed
