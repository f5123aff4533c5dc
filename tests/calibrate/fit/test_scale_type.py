"""Scales are float16 unless the observation saw a vector that float16 cannot hold."""

import dataclasses

import numpy as np
import pytest
from stat_cases import side_of

from turboq.codecs import Exact, KiviKey, PerHead, TurboQuantMSE
from turboq_calibrate.fit.scale_type import wide_enough
from turboq_calibrate.observe.layer_statistics import LayerStatistics


def layer(rng, size=1.0, *, where="k"):
    """Vectors of two heads; one of head 1 of `where` has the norm `size`."""
    sides = {}
    for name in ("k", "k_before", "v"):
        x = rng.standard_normal((1, 20, 2, 8)).astype(np.float32)
        if name == where:
            x[0, 7, 1] *= size / np.linalg.norm(x[0, 7, 1])
        sides[name] = side_of(x, np.zeros_like(x))
    return LayerStatistics(sides=sides)


CODEC = TurboQuantMSE(dim=8, bits=3)


@pytest.mark.parametrize("size", [65504 * 1.07, 1e6])
def test_a_norm_beyond_float16_makes_scales_bfloat16(rng, size):
    found, note = wide_enough(CODEC, [layer(rng), layer(rng, size)], "k")
    assert found == dataclasses.replace(CODEC, scale_dtype="bfloat16")
    assert note.startswith("scales of K are bfloat16: layer 1 has vectors of a norm of up to")
    assert "in head 1," in note


def test_only_the_side_that_saw_it(rng):
    statistics = [layer(rng, 1e6, where="k_before"), layer(rng)]
    assert wide_enough(CODEC, statistics, "k", "before")[0].scale_dtype == "bfloat16"
    assert wide_enough(CODEC, statistics, "k") == (CODEC, "")
    assert wide_enough(CODEC, statistics, "v") == (CODEC, "")


def test_what_fits_or_was_chosen_stays(rng):
    large = [layer(rng, 1e6)]
    for codec in (Exact(dim=8), TurboQuantMSE(dim=8, bits=3, scale_dtype="float32")):
        assert wide_enough(codec, large, "k") == (codec, "")
    assert wide_enough(CODEC, [layer(rng, 65504 / 1.2)], "k") == (CODEC, "")
    for codec in (PerHead(dim=8, bits=3), KiviKey(dim=8, bits=2)):
        assert wide_enough(codec, large, "k")[0].scale_dtype == "bfloat16"


def test_a_head_without_vectors_says_nothing(rng):
    empty = layer(rng)
    for arrays in (empty.k.arrays, empty.v.arrays):
        arrays["norms"] = np.zeros_like(arrays["norms"])
    assert wide_enough(CODEC, [empty], "k") == (CODEC, "")
