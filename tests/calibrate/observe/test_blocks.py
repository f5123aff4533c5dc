"""Keys relative to their block: moments against those of every token at every offset, float64."""

import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs.observed import Observed
from turboq.numbers.rope import Rope, inverse_frequencies
from turboq_calibrate.observe.blocks import in_blocks

ROPES = {
    "half": Rope(dim=8, theta=50.0),
    "partial": Rope(dim=6, theta=20.0, layout="interleaved"),
}
HEADS, N, D, BLOCK = 2, 40, 8, 16


def turned(rope: Rope, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pairs as complex numbers; x [K, n, D] at offsets [n]."""
    pairs = np.arange(rope.dim).reshape((2, -1) if rope.layout == "half" else (-1, 2))
    first, second = pairs if rope.layout == "half" else pairs.T
    angle = offsets[:, None] * inverse_frequencies(rope).astype(np.float64)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
    out = x.astype(np.float64)
    out[..., first], out[..., second] = z.real, z.imag
    return out


@pytest.mark.parametrize("name", ROPES)
def test_moments_are_those_of_every_token_at_every_offset(rng, name):
    rope = ROPES[name]
    x = rng.standard_normal((HEADS, N, D)) + 2.0
    g = rng.standard_normal((HEADS, N, D)) * np.linspace(0.2, 2, N)[None, :, None]
    seen = Observed.of(x, g, queries=np.stack([np.diag(np.arange(1.0, D + 1))] * HEADS))
    at = rng.integers(0, 1000, N)
    got = in_blocks(seen, rope, BLOCK, at)

    # One token per (token, offset): 16 times as many.
    offsets, token = (a.ravel() for a in np.meshgrid(np.arange(BLOCK), np.arange(N)))
    centre = got.mean[:, None]
    every = turned(rope, x[:, token] - centre, offsets) + centre
    due = Observed.of(every, turned(rope, g[:, token], offsets))
    for moment in ("mean", "covariance", "metric", "weighted_mean", "weighted_covariance"):
        have = getattr(got, moment)
        np.testing.assert_allclose(have, getattr(due, moment), atol=TOL["float64_sums"])
    root = np.sqrt(np.arange(1.0, D + 1))
    rows = np.broadcast_to(np.diag(root)[:, None], (D, BLOCK, D))
    each = turned(rope, rows, np.arange(BLOCK))
    queries = np.einsum("dpi,dpj->ij", each, each) / BLOCK
    np.testing.assert_allclose(got.queries[0], queries, atol=TOL["float64_sums"])

    # A sampled token stands at its own offset, about the centre; its gradient turns with it.
    assert got.g is not None
    own = turned(rope, x - centre, at % BLOCK) + centre
    np.testing.assert_allclose(got.x, own, atol=TOL["rope_rotate"])
    np.testing.assert_allclose(got.g, turned(rope, g, at % BLOCK), atol=TOL["rope_rotate"])
    assert (got.rope_layout, got.rope_dim) == (rope.layout, rope.dim)


def test_a_block_of_one_position_changes_nothing(rng):
    seen = Observed.of(rng.standard_normal((HEADS, N, D)) + 1.0)
    got = in_blocks(seen, ROPES["half"], 1, np.arange(N))
    np.testing.assert_allclose(got.x, seen.x, atol=TOL["rope_rotate"])
    np.testing.assert_allclose(got.covariance, seen.covariance, atol=TOL["float64_sums"])
