"""Strict numerics for every test: no silent dtype or rank promotion."""

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The same examples on every machine and run: a red suite is a reproducible one.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A fixed NumPy generator: tests are reproducible and independent of JAX's key format."""
    return np.random.default_rng(20261122)
