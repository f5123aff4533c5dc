"""The basis of several heads' keys and values: uncorrelated, priced alike, and worth its name."""

import dataclasses

import numpy as np
import pytest

from turboq.cache import joint
from turboq.codecs.fit_joint import MOST, fit_joint, heads_joined, observed_units
from turboq.codecs.fit_transform import TransformOptions, fit_heads, head_rates
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError

HEADS, K_DIM, V_DIM, TOKENS = 2, 16, 8, 3000
DIM = HEADS * (K_DIM + V_DIM)


def observed(rng, mixing, heads=HEADS):
    """Keys and values of every head from one hidden vector, and gradients of another scale each."""
    wide = heads * (K_DIM + V_DIM)
    x = rng.normal(size=(TOKENS, mixing.shape[1])) @ mixing.T + rng.normal(size=wide)
    scales = np.repeat(rng.uniform(0.5, 2, 2 * heads), [K_DIM] * heads + [V_DIM] * heads)
    g = rng.normal(size=(TOKENS, wide)) * scales

    def side(first, dim):
        parts = [slice(first + h * dim, first + (h + 1) * dim) for h in range(heads)]
        xs, gs = (np.stack([y[:, p] for p in parts]).astype(np.float32) for y in (x, g))
        return Observed.of(xs, gs, text=np.arange(TOKENS) % 2)

    return side(0, K_DIM), side(heads * K_DIM, V_DIM)


def correlated(rng):
    """48 channels of which 20 directions hold nearly all."""
    return rng.normal(size=(DIM, 20)) @ np.eye(20, DIM) + 0.05 * np.eye(DIM)


def together(k, v, name):
    return np.concatenate([getattr(s, name)[h] for s in (k, v) for h in range(HEADS)], axis=1)


def test_units_are_uncorrelated_and_an_error_of_any_costs_alike(rng):
    k, v = observed(rng, correlated(rng))
    found = fit_joint(k, v, HEADS, ridge=0.0)
    seen = found.pop("variances")
    assert {n: a.shape for n, a in found.items()} == joint.shapes(HEADS, HEADS, K_DIM, V_DIM)
    turn = found["synthesis"][0]
    x = together(k, v, "x").astype(np.float64)
    y = (x - found["mean"][0]) @ np.linalg.inv(turn).T
    covariance = y.T @ y / TOKENS
    variances = np.diag(covariance)
    np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-5 * variances[0])
    np.testing.assert_allclose(seen, variances[None], atol=1e-5 * variances[0])
    assert np.all(np.diff(variances) <= 1e-6 * variances[0])
    metric = np.zeros((DIM, DIM))
    at = 0
    for block in (s.metric[h] for s in (k, v) for h in range(HEADS)):
        metric[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    np.testing.assert_allclose(turn.T @ metric @ turn, np.eye(DIM), atol=1e-6)


def test_what_is_seen_of_units_is_what_was_seen(rng):
    """x = mean + S y, and a change costs the same to first order: g_x . dx = g_y . dy."""
    k, v = observed(rng, correlated(rng))
    found = fit_joint(k, v, HEADS)
    units = observed_units(k, v, found)
    assert [(u.heads, u.dim) for u in units] == [(HEADS, K_DIM), (HEADS, V_DIM)]
    y, turn = together(*units, "x"), found["synthesis"][0]
    np.testing.assert_allclose(found["mean"][0] + y @ turn.T, together(k, v, "x"), atol=1e-4)
    change = rng.normal(size=DIM)
    np.testing.assert_allclose(
        together(*units, "g") @ change, together(k, v, "g") @ (turn @ change), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_array_equal(units[0].text, k.text)


def least(seen, bits):
    """Predicted cost per token at `bits` in all, on the convex hull of the heads' best segments.

    The largest of sum(min(error + price bits)) - price `bits` over prices: equal heads, which all
    change at one price, make no step.
    """
    options = TransformOptions()
    tables = [t for s in seen for t in head_rates(fit_heads(s, options), options)]
    low, high = 0.0, max(float(t.error.max()) for t in tables)
    for _ in range(60):
        price = 0.5 * (low + high)
        at = [int(np.argmin(t.error + price * t.bits)) for t in tables]
        spent = sum(int(t.bits[i]) for t, i in zip(tables, at, strict=True))
        low, high = (price, high) if spent > bits else (low, price)
    return sum(float(np.min(t.error + high * t.bits)) for t in tables) - high * bits


def test_heads_that_share_a_source_cost_a_fraction_and_others_no_less(rng):
    """20 of 48 directions hold the source: at 2 bits a channel the water is far lower. Of
    independent heads there is nothing to gain, but for the noise of 3000 tokens."""
    for mixing, low, high in ((correlated(rng), 0.0, 0.25), (np.eye(DIM), 0.9, 1.1)):
        k, v = observed(rng, mixing)
        units = observed_units(k, v, fit_joint(k, v, HEADS))
        ratio = least(units, 2 * DIM) / least((k, v), 2 * DIM)
        assert low < ratio < high


def test_groups_are_of_neighbours(rng):
    k, v = observed(rng, rng.normal(size=(2 * DIM, 2 * DIM)), heads=4)
    found = fit_joint(k, v, 2)
    assert found["mean"].shape == (2, DIM)
    first = [Observed.of(s.x[:2], s.g[:2]) for s in (k, v)]
    alone = fit_joint(*first, 2)
    for name in alone:
        np.testing.assert_array_equal(found[name][:1], alone[name])


def test_how_many_heads_are_joined():
    assert heads_joined(3, 64, 64, 4096) == 3
    assert heads_joined(8, 128, 128, 4096) == 2
    assert heads_joined(8, 128, 128, 10**6) == MOST // 256
    assert heads_joined(8, 64, 64, 800) == 1  # a fourth of the tokens
    assert heads_joined(8, 64, 64, 500) == 0
    assert heads_joined(1, 64, 512, 4096) == 1  # latent attention
    assert heads_joined(6, 64, 64, 2100) == 3  # 4 would be 512, and divides no 6


def test_refusals(rng):
    k, v = observed(rng, correlated(rng))
    with pytest.raises(TurboqError, match="a joint transform needs gradients"):
        fit_joint(dataclasses.replace(k, g=None), v, HEADS)
    few = [dataclasses.replace(s, x=s.x[:, :20], g=s.g[:, :20], text=s.text[:20]) for s in (k, v)]
    with pytest.raises(TurboqError, match=r"a joint transform needs sample of 48 tokens or more"):
        fit_joint(*few, HEADS)
    with pytest.raises(ValueError, match=r"heads=3 must divide 2 KV heads"):
        fit_joint(k, v, 3)
