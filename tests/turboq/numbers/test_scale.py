"""Scale rules: defining properties, safe norms, closed forms of their errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tolerances import TOL

from turboq.numbers import codebook, distortion, scale


def coded(rng, n, dim, bits):
    """Unit-rms Gaussian vectors and their codebook values, float64."""
    u = rng.normal(size=(n, dim))
    u /= np.sqrt(np.mean(u * u, -1, keepdims=True))
    table = codebook.lloyd_max("sphere", bits, dim)
    return u, table[np.searchsorted(codebook.thresholds(table), u)]


@pytest.mark.parametrize("rule", scale.RULES)
def test_rules_equal_their_definitions(rule, rng):
    u, c = coded(rng, 50, 64, 2)
    rms = np.exp(rng.normal(size=50) * 3)
    args = [jnp.asarray(a, jnp.float32) for a in (u, c, rms)]
    got = jax.jit(scale.vector_scale, static_argnums=0)(rule, *args)
    np.testing.assert_allclose(got, oracles.scale(rule, u, c, rms), rtol=TOL["scale_f32"])


@pytest.mark.parametrize("rule", scale.RULES)
def test_rules_of_zero_vectors_are_zero(rule):
    c = jnp.full((1, 8), -0.4)
    got = scale.vector_scale(rule, jnp.zeros((1, 8)), c, jnp.zeros(1))
    assert got.tolist() == [0.0]
    got = scale.vector_scale(rule, jnp.ones((1, 8)), jnp.zeros((1, 8)), jnp.ones(1))
    assert got.tolist() == [1.0 if rule == "raw" else 0.0]


def test_unbiased_scale_is_zero_where_codes_oppose_the_vector_and_nan_stays():
    u, c = jnp.ones((1, 8)), -jnp.ones((1, 8))
    assert scale.vector_scale("unbiased", u, c, jnp.ones(1)).tolist() == [0.0]
    nan = jnp.full((1, 8), jnp.nan)
    for rule in scale.RULES[1:]:
        assert jnp.isnan(scale.vector_scale(rule, nan, c, jnp.ones(1)))[0]
    with pytest.raises(ValueError, match=r"rule='best' must be one of .*raw"):
        scale.vector_scale("best", u, c, jnp.ones(1))


@pytest.mark.parametrize("size", [5e-38, 1e-30, 1e-19, 1.0, 1e20, 1e30, 3e38])
def test_unit_rms_has_no_overflow_or_underflow(size, rng):
    signs = np.sign(rng.normal(size=(4, 96)))
    x = jnp.asarray(signs * np.float32(size), jnp.float32)
    u, rms = jax.jit(scale.unit_rms)(x)
    np.testing.assert_allclose(u, signs, rtol=TOL["unit_f32"])
    np.testing.assert_allclose(rms, np.full(4, np.float32(size)), rtol=TOL["unit_f32"])


def test_unit_rms_of_zero_subnormal_nan_and_inf():
    x = np.zeros((5, 8), np.float32)
    x[1], x[2, 0], x[3, 0], x[4, 3] = -0.0, 1e-40, np.nan, -np.inf
    u, rms = jax.jit(scale.unit_rms)(jnp.asarray(x))
    assert np.all(np.asarray(u)[:3] == 0)
    assert rms[:3].tolist() == [0, 0, 0]
    assert np.all(np.isnan(np.asarray(rms)[3:]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_reach_their_closed_forms_at_large_dim(bits, rng):
    """The rules' forms are limits in D, so they are measured at D=4096 (deviation below 4/D)."""
    dim = 4096
    u, c = coded(rng, 512, dim, bits)
    d_b = codebook.distortion("sphere", codebook.lloyd_max("sphere", bits, dim), dim)
    for rule in scale.RULES:
        rms = jnp.ones(len(u), jnp.float32)
        args = (jnp.asarray(u, jnp.float32), jnp.asarray(c, jnp.float32))
        s = np.asarray(scale.vector_scale(rule, *args, rms), np.float64)
        error = np.mean((u - s[:, None] * c) ** 2, -1)
        expected = distortion.rule_error(rule, d_b)
        allowed = TOL["standard_errors"] * np.std(error) / np.sqrt(len(u))
        allowed += expected * TOL["rule_limit_times_dim"] / dim
        assert abs(np.mean(error) - expected) < allowed, rule
    # The centroid condition: <x, x_hat> and |x_hat|^2 are both 1 - D_b on average.
    for moment in (np.mean(u * c, -1), np.mean(c * c, -1)):
        allowed = TOL["standard_errors"] * np.std(moment) / np.sqrt(len(u))
        allowed += TOL["orthogonal_f64"]  # one bit: every vector has the same moment
        assert abs(np.mean(moment) - (1 - d_b)) < allowed


def test_rule_error_values_of_the_literature():
    """mathematics of EDEN: 2-2sqrt(1-D) = 0.404, 0.121; D/(1-D) = 0.5708, 0.0358 (Gaussian)."""
    one, two, three = (
        codebook.distortion("gaussian", codebook.lloyd_max("gaussian", b)) for b in (1, 2, 3)
    )
    assert round(distortion.rule_error("matched", one), 3) == 0.404
    assert round(distortion.rule_error("matched", two), 3) == 0.121
    assert round(distortion.rule_error("unbiased", one), 4) == 0.5708
    assert round(distortion.rule_error("unbiased", three), 4) == 0.0358
