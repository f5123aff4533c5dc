"""The sample of tokens: which are chosen, and how they are kept, read and refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from stat_cases import random_windows
from unchecked import unchecked

from turboq.errors import TurboqError
from turboq.plan import TextSource
from turboq_calibrate.models import load_model
from turboq_calibrate.observe import reservoir
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe
from turboq_calibrate.observe.statistics_files import load_statistics

GOLDEN = Path(__file__).parents[2] / "golden" / "llama3"


def pairs(members):
    return list(zip(members.window.tolist(), members.position.tolist(), strict=True))


@pytest.mark.parametrize(("windows", "count"), [(3, 20), (40, 7), (40, 500), (5, 10**6), (4, 0)])
def test_the_smallest_numbers_are_chosen(windows, count):
    """Against all numbers at once, sorted."""
    every = []
    for n in range(windows):
        draw = np.random.Philox(key=[5, n]).random_raw(30)
        every += [(int(draw[t]), n, t) for t in range(3, 30)]
    want = sorted((n, t) for _, n, t in sorted(every)[:count])
    assert pairs(reservoir.choose(windows, 30, count=count, skip=3, seed=5)) == want


def test_the_choice_is_spread_evenly():
    found = reservoir.choose(64, 64, count=1024, skip=0, seed=1)
    for of in (found.window, found.position):
        # 1024 of 4096 tokens: 16 expected of 64, hypergeometric sd 3.4; 64 cells stay within 4.
        counts = np.bincount(of, minlength=64)
        assert counts.sum() == 1024
        assert np.abs(counts - 16).max() < 4 * 3.4
    other = reservoir.choose(64, 64, count=1024, skip=0, seed=2)
    assert 150 < len(set(pairs(found)) & set(pairs(other))) < 360  # 256 expected, sd 12


def test_members_of_a_range_of_windows():
    found = reservoir.choose(10, 8, count=25, skip=2, seed=0)
    part = found.take(found.of(3, 7))
    assert pairs(part) == [(n, t) for n, t in pairs(found) if 3 <= n < 7]


def quiet(model, windows, out, **recipe):
    chosen = ObserveRecipe(skip=2, windows_per_chunk=2, **recipe)
    return observe(model, windows, out, chosen, progress=False, log=lambda line: None)


def test_a_small_reservoir_is_part_of_a_large_one(tmp_path):
    model = load_model(GOLDEN)
    one = TextSource(name="a", sha256="a" * 64)
    windows = dataclasses.replace(
        random_windows(model.spec.vocab),
        texts=(one, dataclasses.replace(one, name="b")),
        text=np.array([0, 1, 1, 0], np.int32),
    )
    small = quiet(model, windows, tmp_path / "small", reservoir=9)
    every = quiet(model, windows, tmp_path / "every", reservoir=10**6)
    assert small.texts == ("a", "b")
    np.testing.assert_array_equal(small.windows, windows.tokens)
    np.testing.assert_array_equal(small.window_texts, windows.text)
    assert small.sha256 != every.sha256
    for i in range(2):
        a, b = small.tokens(i), every.tokens(i)
        assert (len(a), len(b)) == (9, 4 * 14)
        assert a.text.tolist() == windows.text[a.window].tolist()
        at = [pairs(b).index(place) for place in pairs(a)]
        for name in ("k", "v", "g_k", "g_v"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[at])
        assert small.layers[i].observed("k").metric == pytest.approx(
            every.layers[i].observed("k").metric
        )


def test_missing_and_damaged_samples_are_refused(tmp_path):
    model = load_model(GOLDEN)
    none = quiet(model, random_windows(model.spec.vocab), tmp_path / "none", reservoir=0)
    assert none.layers[0].k.count[0] == 4 * 14
    assert not list(none.folder.glob("tokens_*"))
    for call in (lambda: none.layers[0].observed("k"), lambda: none.tokens(0)):
        with pytest.raises(TurboqError, match="`turboq calibrate --reservoir=4096`"):
            call()
    some = quiet(model, random_windows(model.spec.vocab), tmp_path / "some", reservoir=5)
    for bad in ({"side": "q"}, {"side": "k", "rope": "later"}):
        with pytest.raises(ValueError, match="must be"), unchecked():
            some.layers[0].observed(**bad)
    path = some.folder / "tokens_001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    loaded = load_statistics(tmp_path / "some")
    assert loaded.layers[1].k.heads == loaded.layers[0].observed("k").heads
    with pytest.raises(TurboqError, match=r"tokens_001\.safetensors is damaged"):
        loaded.layers[1].observed("v")
    with pytest.raises(TurboqError, match="is damaged"):
        reservoir.Tokens.from_bytes(bytes(raw[:50]), path, k=(1, 1), v=(1, 1))
