"""Text sources and windows."""

import hashlib
from pydoc_data.topics import topics

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq_calibrate.observe.texts import load_text, topic_split, windows


class Letters:
    """One token per character."""

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


def test_files_are_joined_and_hashed(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffgrüße".encode())
    (tmp_path / "b").write_text("x\n")
    text = load_text([str(tmp_path / "a"), tmp_path / "b"])
    assert text.text == "grüße\n\nx\n"
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.source == f"{tmp_path}/a,{tmp_path}/b"
    assert load_text(str(tmp_path / "b")).sha256 != text.sha256


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
    with pytest.raises(TurboqError, match="no text"):
        load_text([])


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
