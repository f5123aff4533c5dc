"""Caches through Orbax: the same bits in every kind of cache, and none read as another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboq.cache import contiguous, model_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import PerHead, Transform, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.numbers.codebook import lloyd_max
from turboq_calibrate.run.cache_files import load_caches, save_caches

DIM, HEADS = 16, 2


def tokens(rng, count):
    return tuple(jnp.asarray(rng.normal(size=(2, count, HEADS, DIM)), jnp.float32) for _ in "kv")


def layer(codec, arrays=None, **policy):
    policy = TokenPolicy(**policy)
    return uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, policy=policy, k_arrays=arrays, v_arrays=arrays
    )


def contiguous_cache(rng):
    """(empty, filled, one more step) of a cache with exact tokens, and of one without any."""
    per_head = PerHead(dim=DIM, bits=3)
    table = jnp.asarray(lloyd_max("gaussian", 3), jnp.float32)
    arrays = {"mean": jnp.zeros((HEADS, DIM)), "codebook": jnp.stack([table] * HEADS)}
    plain = TurboQuantMSE(dim=DIM, bits=2, scale_dtype="bfloat16")
    layers = [layer(per_head, arrays, sinks=2, recent=3), layer(plain)]
    empty = [contiguous.init(one, batch=2, capacity=256) for one in layers]

    def step(caches, x):
        return [contiguous.write(one, c, *x)[0] for one, c in zip(layers, caches, strict=True)]

    return empty, step


def pooled_cache(rng):
    codec = Transform(dim=DIM, segments=((8, 3),))
    arrays = codec.fit(Observed.of(rng.normal(size=(HEADS, 64, DIM)).astype(np.float32)))
    one = layer(codec, {n: jnp.asarray(a) for n, a in arrays.items()}, sinks=1)
    form = model_cache.forms([one, one])
    assert form is not None

    def step(caches, x):
        states, (words,) = caches
        out = []
        for state in states:
            state, words, _ = model_cache.write(state, words, *x)
            out.append(state)
        return out, [words]

    return model_cache.init(form, batch=2, capacity=256), step


def equal(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    same = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)
    return same and jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("kind", [contiguous_cache, pooled_cache])
def test_a_cache_goes_on_where_it_was_saved(kind, rng, tmp_path):
    empty, step = kind(rng)
    assert any(leaf.size == 0 for leaf in jax.tree.leaves(empty))  # what Orbax refuses
    filled = step(empty, tokens(rng, 5))
    save_caches(tmp_path / "caches", filled)
    found = load_caches(tmp_path / "caches", like=empty)
    assert equal(found, filled)
    assert not equal(found, empty)
    more = tokens(rng, 1)
    assert equal(step(found, more), step(filled, more))


def test_caches_of_another_form_are_refused(rng, tmp_path):
    def cache(bits=3, capacity=256, **more):
        """With its layer: two codecs may have buffers of one shape."""
        one = layer(TurboQuantMSE(dim=DIM, bits=bits, **more))
        return one, contiguous.init(one, batch=1, capacity=capacity)

    folder = tmp_path / "caches"
    with pytest.raises(TurboqError, match="holds no caches"):
        load_caches(folder, like=cache())
    save_caches(folder, cache())
    with pytest.raises(TurboqError, match="exists"):
        save_caches(folder, cache())
    for other in (cache(bits=2), cache(capacity=512)):
        with pytest.raises(TurboqError, match="of the shapes of `like`"):
            load_caches(folder, like=other)
    with pytest.raises(TurboqError, match="other codecs"):
        load_caches(folder, like=cache(seed=1))
    (folder / "_METADATA").write_text("{")
    with pytest.raises(TurboqError, match="damaged"):
        load_caches(folder, like=cache())
