"""Hostile codec descriptions: each is refused in one line, or builds all it is in bounded time.

Bounded is processor time, so that a busy machine does not matter. A head of a plan has at most
1024 channels; larger ones are described but not built.
"""

import time

import codec_rows
import numpy as np
import plan_mutations
import pytest

from turboq.codecs import CODECS, QJL, PolarQuant, from_config
from turboq.codecs.polarquant import MAX_LEVELS, angle_codebook
from turboq.errors import TurboqError
from turboq.plan.geometry import MAX_DIM

TRIALS, LIMIT = 3000, 5.0  # seconds; the slowest that is allowed, a Haar matrix of 1024, takes 0.5
NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32, 64, 128, 256, 1000, 1024, 4096, 8192, 2**20)
NUMBERS += (2**31, 2**53 - 1, -1, -8)
TEXTS = ("haar", "hadamard", "walsh", "gaussian", "sphere", "orthogonal", "float32", "token", "x")
SEGMENTS = ([[8, 8]], [[8, 8]] * 4, [[8, 1]] * 100, [[2**30, 3]], [[]], [[8]], [["a", 2]], [])


def described() -> list[dict]:
    found = [row.make(dim).config() for row in codec_rows.ROWS.values() for dim in (64, 128)]
    assert {c["codec"] for c in found} == set(CODECS)
    return found


def hostile(config: dict, rng: np.random.Generator) -> dict:
    """A description with one to three fields replaced, mostly by something of the same type."""
    out = dict(config)
    for _ in range(int(rng.integers(1, 4))):
        key = plan_mutations.pick(rng, [k for k in out if k != "codec"])
        same = {int: NUMBERS, str: TEXTS, tuple: SEGMENTS, list: SEGMENTS}.get(type(out[key]))
        pool = same if same and rng.integers(8) else plan_mutations.JUNK
        out[key] = plan_mutations.pick(rng, pool)
    return out


def build(config: dict) -> bool:
    """Everything that follows from a description alone; False if it is refused."""
    try:
        codec = from_config(config)
    except TurboqError as error:
        return pytest.fail(f"two lines: {error}") if "\n" in str(error) else False
    assert codec.fields
    assert codec.bits_per_vector > 0
    assert codec.array_shapes is not None
    assert codec.reading is None or codec.reading.width > 0
    if codec.dim <= MAX_DIM:
        assert all(np.isfinite(x).all() for x in codec.tables.values())
    return True


def test_every_description_is_refused_or_quick():
    rng, known, built = np.random.default_rng(11), described(), 0
    for _ in range(TRIALS):
        config = hostile(plan_mutations.pick(rng, known), rng)
        started = time.process_time()
        built += build(config)
        seconds = time.process_time() - started
        assert seconds < LIMIT, (config, seconds)
    assert TRIALS / 10 < built < TRIALS


def test_the_largest_polarquant_is_quick():
    """It took minutes: angles moved to centroids one small step at a time."""
    started = time.process_time()
    angle_codebook.cache_clear()
    assert len(PolarQuant(dim=64, levels=MAX_LEVELS, first_bits=8, bits=8).tables) == MAX_LEVELS + 1
    assert time.process_time() - started < LIMIT


def test_sketches_are_bounded():
    with pytest.raises(ValueError, match=r"rows=16384 must be .* 8192"):
        QJL(dim=64, rows=16384)
