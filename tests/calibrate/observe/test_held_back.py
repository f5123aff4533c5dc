"""Windows left out of calibration: where they lie, and that they survive files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from stat_cases import random_windows

from turboq.errors import TurboqError
from turboq_calibrate.models import load_model
from turboq_calibrate.observe.held_back import HeldBack, gaps, leave_out
from turboq_calibrate.observe.recipe import ObserveRecipe, check_sizes

MODEL = Path(__file__).parents[2] / "golden" / "llama3"


def test_gaps_against_every_token(rng):
    for _ in range(50):
        starts = rng.integers(0, 90, rng.integers(0, 6))
        taken = [(int(s), int(s + rng.integers(1, 20))) for s in starts]
        free = np.ones(100, bool)
        for start, stop in taken:
            free[start:stop] = False
        found = gaps(taken, 100)
        covered = np.zeros(100, int)
        for start, stop in found:
            assert start < stop
            covered[start:stop] += 1
            assert start == 0 or not free[start - 1]  # as far as they go
            assert stop == 100 or not free[stop]
        np.testing.assert_array_equal(covered, free)
        sizes = [stop - start for start, stop in found]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("first", [[], [1000]])
@pytest.mark.parametrize("windows", [1, 3, 7])
def test_no_token_is_seen_twice(first, windows):
    """Tokens are their own positions; calibrated windows are the evenly spaced ones of `texts`."""
    n, length = 331, 11
    ids = np.arange(n, dtype=np.int32)
    each = length - len(first)
    whole = ids[: n // each * each].reshape(-1, each)
    calibrated = whole[np.arange(windows) * len(whole) // windows]
    short, long = leave_out(
        ids, first, length=length, windows=windows, count=2, long_length=3 * length
    )
    assert short.shape == (2, length)
    assert long.shape == (1, 3 * length)
    for window in (*short, *long):
        assert window[: len(first)].tolist() == first
        assert np.all(np.diff(window[len(first) :]) == 1)  # what follows in the text
    parts = [calibrated, short[:, len(first) :], long[:, len(first) :]]
    seen = np.concatenate([part.reshape(-1) for part in parts])
    assert len(np.unique(seen)) == len(seen)


def test_the_long_window_is_in_the_middle_of_the_largest_gap():
    short, long = leave_out(
        np.arange(100, dtype=np.int32), [], length=10, windows=1, count=0, long_length=20
    )
    assert short is None
    np.testing.assert_array_equal(long, [np.arange(45, 65)])  # of [10, 100)


def test_where_nothing_fits():
    ids = np.arange(40, dtype=np.int32)
    assert leave_out(ids, [], length=10, windows=4, count=1, long_length=20) == (None, None)
    short, long = leave_out(ids, [], length=10, windows=3, count=5, long_length=20)
    assert long is None
    assert short.tolist() == [list(range(30, 40))]  # one of five


def test_arrays_hold_everything(rng):
    held = HeldBack(
        short={0: rng.integers(0, 9, (2, 5)), 11: rng.integers(0, 9, (1, 5))},
        long={11: rng.integers(0, 9, (1, 20))},
    )
    arrays = held.arrays()
    assert set(arrays) == {"short.0", "short.11", "long.11"}
    assert {x.dtype for x in arrays.values()} == {np.dtype(np.int32)}
    again = HeldBack.of_arrays(arrays | {"tokens": np.zeros(3), "text": np.zeros(3)})
    assert again.short.keys() == held.short.keys()
    assert again.long.keys() == held.long.keys()
    np.testing.assert_array_equal(again.short[0], held.short[0])
    np.testing.assert_array_equal(again.long[11], held.long[11])
    assert again.sha256 == held.sha256
    moved = HeldBack(short={0: held.short[0]}, long={0: held.short[11]})
    assert moved.sha256 != HeldBack(short=moved.long, long=moved.short).sha256
    assert HeldBack().sha256 != held.sha256


def test_windows_beyond_the_models_context_are_refused_held_back_ones_too():
    model, recipe = load_model(MODEL, resident=False), ObserveRecipe()
    fit = random_windows(model.spec.vocab, length=256)
    check_sizes(model, fit, recipe)
    with pytest.raises(
        TurboqError, match="windows of 257 tokens exceed the model's context of 256"
    ):
        check_sizes(model, random_windows(model.spec.vocab, length=257), recipe)
    for kind in ("short", "long"):
        held = HeldBack(**{kind: {0: np.zeros((1, 257), np.int32)}})
        with pytest.raises(TurboqError, match="windows held back of 257 tokens exceed"):
            check_sizes(model, dataclasses.replace(fit, held_back=held), recipe)
