"""Text sources and windows."""

import dataclasses
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq.plan import TextSource
from turboq_calibrate.models import Tokenizer
from turboq_calibrate.observe.texts import (
    Windows,
    load_text,
    mixed_windows,
    topic_split,
    windows,
)


class Letters:
    """One token per character; BOS is 7."""

    chat = None

    def __init__(self, bos_id: int | None = None, adds_bos: bool = False):
        self.bos_id, self.adds_bos = bos_id, adds_bos

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def normalized(text: str) -> list[str]:
    return [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]


def test_topics_are_split_by_name_into_disjoint_parts():
    heldout = normalized(load_text("topics:heldout").text)
    calibration = normalized(load_text("topics:calibration").text)
    assert not set(heldout) & set(calibration)
    # Oracle: the last hex digit decides divisibility by 4.
    last = {name: int(hashlib.sha256(name.encode()).hexdigest()[-1], 16) % 4 for name in topics}
    for name in topics:
        assert topic_split(name) == ("heldout" if last[name] == 0 else "calibration")
    of_heldout = {p for name, text in topics.items() if last[name] == 0 for p in normalized(text)}
    of_calibration = {p for name, text in topics.items() if last[name] for p in normalized(text)}
    assert set(heldout) == of_heldout
    assert set(calibration) == of_calibration - of_heldout
    # Both parts are worth having: a quarter and most of the rest.
    assert len("".join(heldout)) > 50_000
    assert len("".join(calibration)) > 200_000


def test_files_are_hashed_and_named_without_their_folder(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffgrüße".encode())
    (tmp_path / "b").write_text("x\n")
    text = load_text(str(tmp_path / "a"))
    assert text.text == "grüße"
    assert text.sha256 == hashlib.sha256("grüße".encode()).hexdigest()
    assert text.source == "a"
    assert load_text(tmp_path / "b").sha256 != text.sha256
    (tmp_path / "c:d").write_text("y")
    assert load_text(tmp_path / "c:d").source == "c:d"  # a Path is a path, colon and all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"abc\0def", "is binary"),
        (b"abc\xff\xfe", "is not UTF-8 (byte 3)"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(TurboqError) as error:
        load_text(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_sources_are_named(tmp_path):
    for source in (str(tmp_path / "no"), str(tmp_path), "topics:train"):
        with pytest.raises(TurboqError, match=source):
            load_text(source)
    for source, message in (
        ("wiki:test", "unknown kind of text 'wiki' in 'wiki:test': known are topics, source and"),
        ("self:0", "self:0 is written by a model"),
        ("", "a text without a name"),
    ):
        with pytest.raises(TurboqError, match=message):
            load_text(source)


def test_windows_do_not_overlap(tmp_path):
    (tmp_path / "t").write_text("".join(chr(97 + i) for i in range(23)))
    text = load_text(str(tmp_path / "t"))
    every = windows(text, Letters(), length=5)
    assert every.tokens.dtype == np.int32
    assert every.available == 4
    np.testing.assert_array_equal(every.tokens, 97 + np.arange(20).reshape(4, 5))
    assert windows(text, Letters(), length=5, start=4).available == 3
    later = windows(text, Letters(), length=5, start=3, count=2)
    np.testing.assert_array_equal(later.tokens, 100 + np.arange(10).reshape(2, 5))
    spread = windows(text, Letters(), length=5, count=2, spread=True)
    np.testing.assert_array_equal(spread.tokens, every.tokens[[0, 2]])
    np.testing.assert_array_equal(
        windows(text, Letters(), length=5, count=3, spread=True).tokens, every.tokens[[0, 1, 2]]
    )


def test_window_hash_sees_tokens_and_shape(tmp_path):
    (tmp_path / "t").write_text("abcdefghijkl")
    text = load_text(str(tmp_path / "t"))
    hashes = {
        windows(text, Letters(), length=length, start=start).sha256
        for length, start in ((3, 0), (4, 0), (6, 0), (4, 1), (12, 0))
    }
    assert len(hashes) == 5


def test_short_text_is_refused(tmp_path):
    (tmp_path / "t").write_text("abcdefgh")
    text = load_text(str(tmp_path / "t"))
    with pytest.raises(TurboqError, match="8 tokens after token 0, less than one window of 9"):
        windows(text, Letters(), length=9)
    with pytest.raises(TurboqError, match="holds 2 windows of 4 tokens, 3 were asked"):
        windows(text, Letters(), length=4, count=3)
    for arguments in ({"length": 0}, {"length": 2, "count": 0}, {"length": 2, "start": -1}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            windows(text, Letters(), **arguments)


# ---- BOS


def test_windows_begin_with_bos_where_the_tokenizer_does(tmp_path):
    (tmp_path / "t").write_text("abcdefghijk")
    text, plain, adds = load_text(tmp_path / "t"), Letters(7), Letters(7, True)
    got = windows(text, adds, length=4)
    assert got.bos
    assert got.available == 3  # of three letters each, not two of four
    np.testing.assert_array_equal(got.tokens[:, 0], 7)
    np.testing.assert_array_equal(got.tokens[:, 1:], 97 + np.arange(9).reshape(3, 3))
    np.testing.assert_array_equal(got.tokens, windows(text, plain, length=4, bos=True).tokens)
    assert not windows(text, plain, length=4).bos
    np.testing.assert_array_equal(
        windows(text, adds, length=4, bos=False).tokens, windows(text, plain, length=4).tokens
    )
    spread = windows(text, adds, length=4, count=2, spread=True)
    np.testing.assert_array_equal(spread.tokens, got.tokens[[0, 1]])


def test_bos_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "t").write_text("abcdefghijk")
    text = load_text(tmp_path / "t")
    with pytest.raises(TurboqError, match="bos=yes, but names no BOS token"):
        windows(text, Letters(), length=4, bos=True)
    with pytest.raises(TurboqError, match="tokenizer begins every text with BOS, but names no"):
        windows(text, Letters(None, True), length=4)
    with pytest.raises(TurboqError, match="windows of 1 token hold nothing"):
        windows(text, Letters(7, True), length=1)


# ---- several texts


@pytest.fixture
def three(tmp_path):
    """Texts a of 8, b of 20 and c of 40 letters, each its own letter and place: 256 k + i."""
    for i, (name, size) in enumerate({"a": 8, "b": 20, "c": 40}.items()):
        (tmp_path / name).write_text("".join(chr(256 * (i + 1) + j) for j in range(size)))
    return [str(tmp_path / name) for name in "abc"]


def test_one_source_is_windows_of_it(three):
    for count in (None, 3):
        mixed = mixed_windows(three[1:2], Letters(), length=4, count=count)
        alone = windows(load_text(three[1]), Letters(), length=4, count=count, spread=True)
        np.testing.assert_array_equal(mixed.tokens, alone.tokens)
        assert (mixed.sha256, mixed.text_sha256, mixed.source) == (
            alone.sha256,
            hashlib.sha256(load_text(three[1]).text.encode()).hexdigest(),
            "b",
        )


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_texts_take_turns_in_equal_shares(three, count):
    got = mixed_windows(three, Letters(), length=4, count=count)
    assert got.source == "a, b, c"
    assert got.texts == tuple(
        TextSource(name=Path(n).name, sha256=hashlib.sha256(Path(n).read_bytes()).hexdigest())
        for n in three
    )
    assert got.available == 2
    np.testing.assert_array_equal(got.text, np.arange(count) % 3)
    assert (got.tokens // 256 == got.text[:, None] + 1).all()  # no window of two texts
    for i, name in enumerate(three):
        share = int((got.text == i).sum())
        own = windows(load_text(name), Letters(), length=4, count=share, spread=True)
        np.testing.assert_array_equal(got.tokens[got.text == i], own.tokens)


def test_all_windows_of_all_texts_in_turn(three):
    got = mixed_windows(three, Letters(), length=4, count=None)
    assert got.text.dtype == np.int32
    assert got.text.tolist() == [0, 1, 2] * 2 + [1, 2] * 3 + [2] * 5
    for i, letters in enumerate((8, 20, 40)):
        own = got.tokens[got.text == i].reshape(-1)
        np.testing.assert_array_equal(own, 256 * (i + 1) + np.arange(letters))


def test_hash_of_texts_sees_each_and_their_order(three):
    hashes = {
        mixed_windows(sources, Letters(), length=2, count=4).text_sha256
        for sources in (three, three[::-1], three[:2], three[:1])
    }
    assert len(hashes) == 4


def test_mixed_bos_and_no_spread(three):
    got = mixed_windows(three, Letters(7, True), length=4, count=6, spread=False)
    assert got.bos
    np.testing.assert_array_equal(got.tokens[:, 0], 7)
    np.testing.assert_array_equal(got.tokens[5, 1:], 256 * 3 + 3 + np.arange(3))
    assert not mixed_windows(three, Letters(7, True), length=4, count=6, bos=False).bos


def test_bad_mixtures_are_one_clear_line(three, tmp_path):
    (tmp_path / "again").write_text(load_text(three[0]).text)
    for sources, count, message in (
        ([], 4, "no text given"),
        (three, 2, "2 windows of 3 texts: take at least one"),
        (three, 7, "text a holds 2 windows of 4 tokens, 3 were asked for"),
        ([*three, three[1]], 5, "b is given twice"),
        ([*three, str(tmp_path / "again")], 4, "texts a and again are the same"),
        ([*three, "self:1"], 4, "text self:1 needs a model to write it"),
    ):
        with pytest.raises(TurboqError, match=message):
            mixed_windows(sources, Letters(), length=4, count=count)
    source = TextSource(name="a", sha256="0" * 64)
    for text in ([0, 1], [0, -1]):
        text = np.array(text, np.int32)
        with pytest.raises(ValueError, match=r"must be in 0\.\.0"):
            Windows(tokens=np.zeros((2, 4), np.int32), texts=(source,), text=text, available=2)


def test_the_models_tokenizer_is_one():
    assert {f.name for f in dataclasses.fields(Tokenizer)} >= {"bos_id", "adds_bos"}
    assert hasattr(Tokenizer, "chat")
