"""A synthesis freed by least squares: against NumPy's own, and only where unseen texts agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import fit_synthesis as free
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform

DIM, TOKENS = 16, 600
KINDS = {
    "window": {"quantizer": "window", "states": 16, "gain": "code", "gain_bits": 3},
    "scalar": {},
}


def clustered(seed, mean=0.0, tokens=TOKENS):
    """Vectors near 12 corners: what a code stands for is far from what a Gaussian would have."""
    rng = np.random.default_rng(seed)
    corners = np.random.default_rng(99).normal(size=(12, DIM)) + mean
    return corners[rng.integers(0, 12, tokens)] + 0.1 * rng.normal(size=(tokens, DIM))


def observed(*parts):
    x = np.concatenate(parts).astype(np.float32)[None]
    g = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    text = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
    return Observed.of(x, g, text=text)


def fitted(codec, seen):
    return {name: a[0] for name, a in codec.fit(seen).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_tokens_cost_less(kind):
    """The codec as it is stored, on tokens of the same kind that nobody fitted to."""
    seen = observed(clustered(1), clustered(2))
    codec = Transform(dim=DIM, segments=((8, 2), (8, 1)), **KINDS[kind])
    before = fitted(codec, seen)
    (after,) = free.free_synthesis([codec], [before], seen)
    assert {n: a.shape for n, a in after.items()} == codec.array_shapes
    new = clustered(3).astype(np.float32)
    run = jax.jit(lambda a, x: codec.decode(a, codec.encode(a, x)))
    costs = []
    for arrays in (before, after):
        e = np.asarray(run({n: jnp.asarray(a) for n, a in arrays.items()}, new)) - new
        costs.append(np.mean(np.sum((e @ seen.metric[0]) * e, axis=1)))
    assert costs[1] < 0.9 * costs[0]


def test_a_step_is_weighted_least_squares(monkeypatch):
    """Without the pull: NumPy's solution on the codes; the encoder is its inverse in the metric."""
    seen = observed(clustered(1), clustered(2))
    codec = Transform(dim=DIM, segments=((8, 2),))
    before = fitted(codec, seen)
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=2 * TOKENS)
    tokens = free._Tokens(seen.x[0], None, weights, seen.metric[0])
    found = free._step(codec, before, tokens, np.ones(2 * TOKENS, bool))
    lifted = {n: jnp.asarray(a) for n, a in before.items()}
    z = np.asarray(codec.values(lifted, codec.encode(lifted, jnp.asarray(seen.x[0]))), np.float64)
    z = np.append(z, np.ones((len(z), 1)), axis=1)
    root = np.sqrt(weights)[:, None]
    due = np.linalg.lstsq(z * root, seen.x[0] * root)[0]
    now = np.append(found["synthesis"], found["mean"][:, None], axis=1).T
    was = np.append(before["synthesis"], before["mean"][:, None], axis=1).T
    # Nine numbers from 1,200 tokens: the pull is 1.5 %.
    assert np.abs(now - due).max() < 0.05 * np.abs(was - due).max()
    product = found["analysis"] @ found["synthesis"]
    np.testing.assert_allclose(product, np.eye(8), atol=TOL["fit_cost"])


def test_texts_that_disagree_keep_the_basis():
    """What helps one kind of text harms the other; and of one text alone nothing is known."""
    codec = Transform(dim=DIM, segments=((8, 2), (8, 1)))
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(TOKENS, DIM)) * 3
    for seen in (observed(clustered(1), noise), observed(clustered(1))):
        before = fitted(codec, seen)
        assert free.free_synthesis([codec], [before], seen)[0] is before
