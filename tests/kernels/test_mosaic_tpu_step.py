"""Attention of a step by its TPU launches, in interpret mode, against float64."""

import jax.numpy as jnp
import pytest
from step_cases import SIZES, alike, check, check_broken

from turboq.codecs import FP8, TurboQuantMSE, TurboQuantProd
from turboq_kernels.decode import mosaic_tpu, mosaic_tpu_step


@pytest.fixture(autouse=True)
def _in_loops(monkeypatch):
    """Heads one after the other: a program of fewer operations, which compiles faster."""
    monkeypatch.setattr(mosaic_tpu_step, "UNROLLED", 0)


def test_matches_float64(rng):
    check(rng, 1, {"sink_logits": jnp.linspace(-1.0, 1.0, 6)}, "mosaic_tpu")


def test_float16_as_bits(rng):
    """Scales of two heads of a pool on a TPU, the default type of most codecs."""
    dim, _ = SIZES["mosaic_tpu"]
    codec = TurboQuantMSE(dim=dim, bits=2)
    check(rng, 1, {}, "mosaic_tpu", alike(codec, codec, 2), float16_bits=True)


def test_two_queries_on_chips_without_an_integer_unit(rng, monkeypatch):
    """Codes and signs by two products of bfloat16; floats, which are no sums over planes."""
    monkeypatch.setattr(mosaic_tpu, "integer_unit", lambda: False)
    dim, _ = SIZES["mosaic_tpu"]
    layer = alike(TurboQuantProd(dim=dim, bits=2), FP8(dim=dim))
    check(rng, 2, {"window": 40, "softcap": 2.0}, "mosaic_tpu", layer)


def test_a_broken_token_breaks_who_sees_it(rng):
    check_broken(rng, "mosaic_tpu")
