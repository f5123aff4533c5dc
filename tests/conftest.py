"""Strict numerics for every test: no silent dtype or rank promotion."""

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A fixed NumPy generator: tests are reproducible and independent of JAX's key format."""
    return np.random.default_rng(20261122)
