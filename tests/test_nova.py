"""The NOVA-like baseline of `experiments/`: its rule in float64, and that it earns its 2 bits."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError

DIM, TOKENS = 32, 1500


@pytest.fixture(scope="module")
def nova():
    folder = str(Path(__file__).parents[1] / "experiments")
    sys.path.insert(0, folder)
    yield importlib.import_module("nova")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def seen():
    rng = np.random.default_rng(0)
    mix, ask = (rng.normal(size=(DIM, DIM)) * 0.9 ** np.arange(DIM) for _ in range(2))
    x = rng.normal(size=(1, TOKENS, DIM)) @ mix.T + rng.normal(size=DIM)
    return Observed.of(x.astype(np.float32), queries=(ask @ ask.T)[None])


@pytest.fixture(scope="module")
def fitted(nova, seen):
    codec = nova.nova_like(DIM)[0]
    return codec, {name: a[0] for name, a in codec.fit(seen).items()}


def test_groups_span_the_spectrum_with_equal_volume(nova):
    order = nova.dealt(64).reshape(-1, 4)
    assert sorted(order.reshape(-1)) == list(range(64))
    assert set(order.sum(axis=1)) == {126}  # of the logarithms of a geometric spectrum


def test_codes_are_the_nearest_points_of_the_joint_basis(fitted, seen):
    codec, arrays = fitted
    lifted, x = {n: jnp.asarray(a) for n, a in arrays.items()}, seen.x[0, :200]
    stored = jax.jit(codec.encode)(lifted, x)
    back = np.asarray(jax.jit(codec.decode)(lifted, stored))
    y = (x.astype(np.float64) - arrays["mean"]) @ arrays["analysis"].T.astype(np.float64)
    rms = np.sqrt(np.mean(y * y, axis=1))
    u = (y / rms[:, None]).reshape(len(x), -1, 1, 4)
    off = np.sum((u - arrays["points"][None]) ** 2, axis=-1)  # [N, G, P]
    taken = np.take_along_axis(off, np.asarray(stored["codes"])[..., None].astype(int), axis=-1)
    np.testing.assert_allclose(taken[..., 0], off.min(axis=-1), atol=TOL["product_f32"])
    scale = np.asarray(stored["scale"], np.float64)[:, 0]
    np.testing.assert_allclose(scale, rms, rtol=2.0**-10)
    values = np.take_along_axis(
        arrays["points"][None], np.asarray(stored["codes"], int)[..., None, None], axis=2
    )
    due = values.reshape(len(x), -1) * scale[:, None] @ np.linalg.inv(arrays["analysis"]).T
    np.testing.assert_allclose(back, due + arrays["mean"], atol=1e-3)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(5, DIM)), jnp.float32)
    logits = codec.logits(lifted, codec.fold_query(lifted, q), stored)
    np.testing.assert_allclose(logits, np.asarray(q) @ back.T, atol=2e-3)
    assert codec.bits_per_channel == 2 + 16 / DIM


def test_logits_err_less_than_those_of_a_random_rotation(fitted, seen):
    """Error of the logits, q of the observed second moment: half of TurboQuant's at equal bits."""
    codec, arrays = fitted
    lifted, x = {n: jnp.asarray(a) for n, a in arrays.items()}, jnp.asarray(seen.x[0])
    other = TurboQuantMSE(dim=DIM, bits=2)

    def cost(codec, arrays):
        e = np.asarray(codec.decode(arrays, codec.encode(arrays, x)) - x, np.float64)
        return np.mean(np.sum((e @ seen.queries[0]) * e, axis=1))

    assert cost(codec, lifted) < 0.5 * cost(other, {})


def test_values_have_no_queries_to_fit_to(nova, seen):
    values = Observed.of(seen.x)
    with pytest.raises(TurboqError, match=r"nova\.key is for keys"):
        nova.nova_like(DIM)[0].fit(values)
