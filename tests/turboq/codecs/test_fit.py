"""Every calibrated codec fits itself from what was observed: the rows of `codec_rows`."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import ROWS
from tolerances import TOL

from turboq.codecs import FP8, Codec, PerHead, TurboQuantMSE
from turboq.codecs.observed import Observed, subset
from turboq.errors import TurboqError

DIM, HEADS, TOKENS = 32, 3, 640
FITTED = [row for row in ROWS if ROWS[row].make(DIM).calibrated]
fitted_rows = pytest.mark.parametrize("row", FITTED)


@functools.cache
def observed() -> Observed:
    """Heads that differ in mean, size and axes; a few tokens with most of the gradient."""
    rng = np.random.default_rng(11)
    axes = rng.normal(size=(HEADS, DIM, DIM)) * 0.85 ** np.arange(DIM)
    size = np.array([0.3, 1.0, 4.0])[:, None, None]
    x = rng.normal(size=(HEADS, TOKENS, DIM)) @ np.swapaxes(axes, 1, 2)
    x = (x + 3 * rng.normal(size=(HEADS, 1, DIM))) * size
    g = rng.normal(size=x.shape) * rng.exponential(size=(1, TOKENS, 1)) ** 2 / size
    text = np.repeat(np.arange(4, dtype=np.int32), TOKENS // 4)
    return Observed.of(x.astype(np.float32), g.astype(np.float32), text=text)


def only(seen: Observed, head: int) -> Observed:
    """One head of what was observed."""
    arrays = {
        f.name: getattr(seen, f.name)[head : head + 1]
        for f in dataclasses.fields(seen)
        if isinstance(getattr(seen, f.name), np.ndarray) and f.name != "text"
    }
    return dataclasses.replace(seen, **arrays)


def errors(codec: Codec, arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """E|x_hat - x|^2 of every head."""
    lifted = {name: jnp.asarray(a) for name, a in arrays.items()}
    run = jax.jit(jax.vmap(lambda a, x: codec.decode(a, codec.encode(a, x))))
    back = np.asarray(run(lifted, jnp.asarray(x)), np.float64)
    return np.mean(np.sum((back - x) ** 2, axis=2), axis=1)


@fitted_rows
def test_arrays_are_those_declared_the_same_again_and_each_heads_own(row):
    codec, seen = ROWS[row].make(DIM), observed()
    arrays = codec.fit(seen)
    assert {n: a.shape for n, a in arrays.items()} == {
        n: (HEADS, *shape) for n, shape in codec.array_shapes.items()
    }
    assert all(a.dtype == np.float32 and np.all(np.isfinite(a)) for a in arrays.values())
    again, alone = codec.fit(seen), codec.fit(only(seen, 1))
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)
        np.testing.assert_allclose(
            alone[name][0], values[1], TOL["fitted_alone"], TOL["fitted_alone_near_zero"]
        )


@fitted_rows
def test_own_arrays_serve_the_sample_better_than_another_heads(row):
    """Where only a scale or a rotation is learned, another head's may serve nearly as well."""
    codec, seen = ROWS[row].make(DIM), observed()
    arrays = codec.fit(seen)
    own = errors(codec, arrays, seen.x)
    others = {name: np.roll(a, 1, axis=0) for name, a in arrays.items()}
    energy = np.mean(np.sum(seen.x.astype(np.float64) ** 2, axis=2), axis=1)
    assert np.all(own < 0.1 * energy)
    factor = TOL["other_scale"] if set(arrays) <= {"scale", "transform", "outlier"} else 0.5
    assert np.all(own < factor * errors(codec, others, seen.x))


@fitted_rows
def test_what_is_missing_is_named_with_its_remedy(row):
    codec, seen = ROWS[row].make(DIM), observed()
    assert codec.needs
    none = np.zeros((HEADS, 0, DIM), np.float32)
    bare = dataclasses.replace(seen, x=none, g=None, text=np.zeros(0, np.int32))
    without = {"sample": bare, "moments": dataclasses.replace(seen, tokens=0)}
    for part in codec.needs:
        with pytest.raises(TurboqError, match=f"{codec.name}.* needs {part}.*turboq calibrate"):
            codec.fit(without[part])
    few = subset(seen, np.arange(TOKENS) < codec.fewest_tokens - 1)
    with pytest.raises(TurboqError, match="too few"):
        codec.fit(few)
    with pytest.raises(TurboqError, match=rf"self\.dim={2 * DIM}, but vectors have {DIM}"):
        ROWS[row].make(2 * DIM).fit(seen)


@fitted_rows
def test_a_codec_without_its_arrays_names_them(row):
    codec = ROWS[row].make(DIM)
    x, names = jnp.ones((codec.block, DIM)), list(codec.array_shapes)
    for missing in (names, names[:1]):
        given = {n: jnp.ones(shape) for n, shape in codec.array_shapes.items() if n not in missing}
        lacks = f"{codec.name!r} is fitted and lacks its arrays {', '.join(missing)}:"
        for method, other in ((codec.encode, x), (codec.decode, {}), (codec.fold_query, x)):
            for call in (method, functools.partial(jax.eval_shape, method)):
                with pytest.raises(TurboqError, match=re.escape(lacks)):
                    call(given, other)


def test_looking_for_arrays_costs_traced_code_nothing():
    codec, x = ROWS["per_head-3"].make(DIM), jnp.ones((2, DIM))
    arrays = {name: jnp.ones(shape) for name, shape in codec.array_shapes.items()}
    traced = jax.make_jaxpr(codec.encode)(arrays, x)
    bare = jax.make_jaxpr(functools.partial(type(codec).encode.__wrapped__, codec))(arrays, x)
    assert str(traced) == str(bare)


def test_needs_decide_what_must_be_there():
    """Moments alone serve a codec that asks for nothing else, and a data-free one needs nothing."""
    seen = observed()
    none = np.zeros((HEADS, 0, DIM), np.float32)
    bare = dataclasses.replace(seen, x=none, g=None, text=np.zeros(0, np.int32))
    for row in FITTED:
        codec = ROWS[row].make(DIM)
        if codec.needs == ("moments",):
            for name, values in codec.fit(seen).items():
                np.testing.assert_array_equal(codec.fit(bare)[name], values)
    assert TurboQuantMSE(dim=DIM, bits=3).fit(bare) == {}
    assert FP8(dim=DIM).fit(bare) == {}
    with pytest.raises(TurboqError, match=r"plan needs gradients .*none was observed"):
        bare.require(("moments", "gradients"), "a plan")


def test_a_scale_of_the_tensor_is_shared_by_its_heads():
    seen = observed()
    shared = FP8(dim=DIM, scale="tensor").fit(seen)["scale"]
    own = FP8(dim=DIM, scale="head").fit(seen)["scale"]
    assert len(set(shared.tolist())) == 1
    assert len(set(own.tolist())) == HEADS
    assert own.min() < shared[0] <= own.max() * (1 + TOL["fitted_alone"])


def test_subset_has_the_moments_of_what_is_kept():
    seen = observed()
    keep = seen.text == 2
    part = subset(seen, keep)
    assert part.tokens == part.x.shape[1] == TOKENS // 4
    x, g = (a[1, keep].astype(np.float64) for a in (seen.x, seen.g))
    w = np.sum(g * g, axis=1) / np.mean(np.sum(g * g, axis=1))
    np.testing.assert_allclose(part.mean[1], x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(part.covariance[1], np.cov(x.T, bias=True), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(part.metric[1], g.T @ g / (2 * len(g)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(part.weighted_mean[1], w @ x / len(x), rtol=1e-12)
    with pytest.raises(ValueError, match="none is kept"):
        subset(seen, seen.text == 9)


def test_too_few_coordinates_for_a_codebook_are_counted():
    x = np.random.default_rng(0).normal(size=(1, 100, 32)).astype(np.float32)
    PerHead(dim=32, bits=7).fit(Observed.of(x[:, :64]))
    with pytest.raises(TurboqError, match="needs moments of 128 tokens or more, 100 tokens are"):
        PerHead(dim=32, bits=8).fit(Observed.of(x))
