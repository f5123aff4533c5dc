"""TurboQuant with outlier channels: bits, choice of channels, equality with its two parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import lloyd
from tolerances import TOL

from turboq.codecs import TurboQuantMSE
from turboq.codecs.outliers import RECIPES, TurboQuantOutliers, choose_outliers
from turboq.numbers import distortion

encode = jax.jit(lambda codec, arrays, x: codec.encode(arrays, x), static_argnums=0)
decode = jax.jit(lambda codec, arrays, stored: codec.decode(arrays, stored), static_argnums=0)


def make(dim, recipe="2.5", **more):
    high, low = RECIPES[recipe]
    return TurboQuantOutliers(dim=dim, outlier_bits=high, bits=low, **more)


def test_the_recipes_count_their_two_norms():
    """2.5 = (32*3 + 96*2 + 2*16) / 128 and 3.5 = (32*4 + 96*3 + 2*16) / 128."""
    for recipe, high, low in (("2.5", 3, 2), ("3.5", 4, 3)):
        codec = make(128, recipe)
        assert [p.dim for p in codec.parts] == [32, 96]
        assert codec.bits_per_vector == 32 * high + 96 * low + 32
        assert codec.bits_per_channel == float(recipe)
    bits = {64: 2.75, 256: 2.375}
    assert {d: make(d).bits_per_channel for d in bits} == bits
    assert [make(d).split for d in (64, 80, 96, 128, 256)] == [16, 24, 24, 32, 64]


def test_choice_of_channels(rng):
    """The largest second moments per head; the lower channel of equal ones."""
    moment = rng.exponential(size=(3, 64))
    got = choose_outliers(moment, 16)
    assert got.dtype == np.float32
    assert np.all(got.sum(1) == 16)
    for head in range(3):
        chosen = got[head] == 1
        assert moment[head][chosen].min() > moment[head][~chosen].max()
    np.testing.assert_array_equal(choose_outliers(np.ones(8), 3), [1, 1, 1, 0, 0, 0, 0, 0])
    for bad in ([np.nan, 1.0], [-1.0, 1.0]):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            choose_outliers(np.array(bad), 1)
    with pytest.raises(ValueError, match="count=9 must be an integer from 0 to 8"):
        choose_outliers(np.ones(8), 9)


def test_equals_two_independent_codecs(rng):
    """Head by head under vmap, with different outliers; the two rotations differ."""
    codec = make(64, seed=5)
    masks = np.stack([choose_outliers(rng.exponential(size=64), 16) for _ in range(2)])
    x = rng.normal(size=(2, 40, 64)).astype(np.float32)
    arrays = {"outlier": jnp.asarray(masks)}
    stored = jax.jit(jax.vmap(codec.encode))(arrays, jnp.asarray(x))
    decoded = np.asarray(jax.jit(jax.vmap(codec.decode))(arrays, stored))
    for head, mask in enumerate(masks == 1):
        for seed, channels, bits, name in ((10, mask, 3, "outlier"), (11, ~mask, 2, "other")):
            part = TurboQuantMSE(dim=int(channels.sum()), bits=bits, seed=seed)
            alone = encode(part, {}, jnp.asarray(x[head][:, channels]))
            same = np.asarray(stored[f"{name}_codes"][head]) == np.asarray(alone["codes"])
            assert np.mean(same) >= 1 - TOL["unclear_share"]
            kept = {k: stored[f"{name}_{k}"][head] for k in ("codes", "scale")}
            np.testing.assert_allclose(
                decoded[head][:, channels],
                decode(part, {}, kept),
                rtol=0,
                atol=TOL["rotate_f32"],
            )
    a, b = (p.turn for p in TurboQuantOutliers(dim=64, bits=2, outlier_bits=2, outliers=32).parts)
    assert not np.allclose(a.matrix, b.matrix)


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_of_iid_channels(recipe, rng):
    codec = make(128, recipe, scale_dtype="float32")
    x = rng.normal(size=(3000, 128)).astype(np.float32)
    arrays = {"outlier": jnp.asarray(choose_outliers(rng.exponential(size=128), 32))}
    error, relative = errors(codec, arrays, x)
    high, low = RECIPES[recipe]
    expected = 0.25 * lloyd(high, 32) + 0.75 * lloyd(low, 96)
    allowed = TOL["standard_errors"] * np.std(relative) / np.sqrt(len(x))
    assert abs(np.mean(relative) - expected) < allowed
    distortion.check_shannon(
        np.mean(error), bits_per_vector=codec.bits_per_vector, variances=np.ones(128)
    )


def test_outliers_pay_when_there_are_some(rng):
    """A quarter of the channels six times as large: 2.5 bits beat 3 bits without the split, and a
    wrong choice of channels loses that.
    """
    size = np.where(np.arange(128) % 4 == 1, 6.0, 1.0)
    x = (rng.normal(size=(500, 128)) * size).astype(np.float32)
    right = {"outlier": jnp.asarray(choose_outliers(np.mean(x.astype(np.float64) ** 2, 0), 32))}
    np.testing.assert_array_equal(right["outlier"], (size == 6).astype(np.float32))
    wrong = {"outlier": jnp.asarray((np.arange(128) % 4 == 2).astype(np.float32))}
    split = np.mean(errors(make(128), right, x)[0])
    missed = np.mean(errors(make(128), wrong, x)[0])
    whole = np.mean(errors(TurboQuantMSE(dim=128, bits=2), {}, x)[0])
    # Per vector: 32*36*D(3) + 96*D(2) against (32*36 + 96) D(2).
    expected = (1152 * lloyd(3, 32) + 96 * lloyd(2, 96)) / (1248 * lloyd(2, 128))
    assert abs(split / whole / expected - 1) < TOL["common_mean"]
    assert missed > 2 * split
    bits, variances = make(128).bits_per_vector, size**2
    distortion.check_shannon(split, bits_per_vector=bits, variances=variances)


def errors(codec, arrays, x):
    """Squared error per vector, and relative to its power."""
    stored = encode(codec, arrays, jnp.asarray(x))
    got = np.asarray(decode(codec, arrays, stored), np.float64)
    error = np.sum((got - x) ** 2, -1)
    return error, error / np.sum(x.astype(np.float64) ** 2, -1)


@pytest.mark.parametrize("outliers", [4, 64, -8, True])
def test_bad_counts_are_named(outliers):
    with pytest.raises(ValueError, match=r"outliers=.* must be a multiple of 8"):
        make(64, outliers=outliers)
