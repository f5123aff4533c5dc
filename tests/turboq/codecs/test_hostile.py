"""Codec descriptions that took minutes or memory without bound (`tests/fuzz.py`: random ones)."""

import time

import codec_rows
import pytest

from turboq.codecs import CODECS, QJL, PolarQuant
from turboq.codecs.polarquant import MAX_LEVELS, angle_codebook

LIMIT = 5.0  # seconds of processor time, so that a busy machine does not matter


def test_the_corpus_of_the_fuzz_program_holds_every_codec():
    assert {row.make(64).name for row in codec_rows.ROWS.values()} == set(CODECS)


def test_the_largest_polarquant_is_quick():
    """It took minutes: angles moved to centroids one small step at a time."""
    started = time.process_time()
    angle_codebook.cache_clear()
    assert len(PolarQuant(dim=64, levels=MAX_LEVELS, first_bits=8, bits=8).tables) == MAX_LEVELS + 1
    assert time.process_time() - started < LIMIT


def test_sketches_are_bounded():
    with pytest.raises(ValueError, match=r"rows=16384 must be .* 8192"):
        QJL(dim=64, rows=16384)
