"""The built-in source text: two parts of the standard library without a common paragraph."""

import pytest

from turboq.errors import TurboqError
from turboq_calibrate.observe.texts import load_text, topic_split


def paragraphs(text):
    return {" ".join(p.split()) for p in text.split("\n\n") if p.strip()}


def test_parts_are_source_and_share_nothing():
    calibration, heldout = (load_text(f"source:{s}").text for s in ("calibration", "heldout"))
    assert len(calibration) > len(heldout) > 200_000  # enough for many windows of 1024 tokens
    assert not paragraphs(calibration) & paragraphs(heldout)
    lines = [{x for x in t.split("\n") if len(x.strip()) > 40} for t in (calibration, heldout)]
    assert len(lines[0] & lines[1]) < 0.02 * len(lines[1])
    assert [topic_split(m) for m in ("bisect", "heapq")] == ["calibration", "heldout"]
    assert "def insort_right" in calibration
    assert "def insort_right" not in heldout
    assert "def heapreplace" in heldout
    assert "def heapreplace" not in calibration


def test_unknown_part():
    with pytest.raises(TurboqError, match="source:calibration, source:heldout"):
        load_text("source:test")
