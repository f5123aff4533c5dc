"""Coordinates as they come are what a transform of no mean and bases of 1 codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs.coordinates import Coordinates
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import one_kind, pad_side

DIM = 16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gain": "float16", "codebook": "fitted"},
        {"quantizer": "window", "states": 16, "gain": "code"},
    ],
    ids=str,
)
def test_a_transform_of_bases_1(options, rng):
    whole = Transform(dim=DIM, segments=((8, 3),), **options)
    x = jnp.asarray(rng.normal(size=(60, DIM)), jnp.float32)
    fitted = whole.fit(Observed.of(np.asarray(x)[None]))
    arrays = {name: jnp.asarray(a[0]) for name, a in fitted.items()}
    arrays |= {"mean": jnp.zeros(DIM), "analysis": jnp.eye(8, DIM), "synthesis": jnp.eye(DIM, 8)}
    codec = Coordinates.of(whole)
    own = {name: arrays[name] for name in codec.array_shapes}
    assert not {"mean", "analysis", "synthesis"} & set(own)
    assert codec.fields == whole.fields
    stored, due = codec.encode(own, x), whole.encode(arrays, x)
    for name in due:
        np.testing.assert_array_equal(stored[name], due[name])
    decoded, p = whole.decode(arrays, due), jnp.asarray(rng.normal(size=(3, 60)), jnp.float32)
    np.testing.assert_allclose(codec.decode(own, stored), decoded, atol=TOL["transform_float64"])
    # Both ways of reading folded, and of the padded form what it decodes.
    q = jnp.asarray(rng.normal(size=(3, DIM)), jnp.float32)
    logits = codec.logits(own, codec.fold_query(own, q), stored)
    np.testing.assert_allclose(logits, q @ decoded.T, atol=TOL["packed_attention"])
    out = codec.unfold_output(own, codec.accumulate(own, p, stored), jnp.sum(p, axis=1))
    np.testing.assert_allclose(out, p @ decoded, atol=TOL["packed_attention"])
    padded, wide = pad_side([codec], [{n: a[None] for n, a in own.items()}], [1])
    assert not {"mean", "analysis", "synthesis"} & set(wide)
    one = jax.tree.map(lambda a: a[0], wide)
    entries = padded.encode(one, x)  # what lies behind the first 8 coordinates is not coded
    np.testing.assert_allclose(padded.decode(one, entries), decoded, atol=TOL["transform_float64"])
    logits = padded.logits(one, padded.fold_query(one, q), entries)
    np.testing.assert_allclose(logits, q @ decoded.T, atol=TOL["packed_attention"])
    out = padded.unfold_output(one, padded.accumulate(one, p, entries), jnp.sum(p, axis=1))
    np.testing.assert_allclose(out, p @ decoded, atol=TOL["packed_attention"])


def test_bases_are_another_kind():
    whole = Transform(dim=DIM, segments=((8, 3),))
    assert not one_kind([whole, Coordinates.of(whole)])
