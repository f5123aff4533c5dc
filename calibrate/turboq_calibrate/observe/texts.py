"""Text in, windows of tokens out: where calibration and evaluation text comes from.

A source is `topics:calibration` or `topics:heldout` (the Python language reference that every
interpreter carries in `pydoc_data.topics`, split by topic into two parts without a common
paragraph), `source:calibration` or `source:heldout` (the same of the standard library's Python
source, split by module) or the path of a UTF-8 file. Windows do not overlap and get no BOS token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from turboq.errors import TurboqError
from turboq.plan import TextSource

HELDOUT_ONE_IN = 4
SPLITS = ("calibration", "heldout")


@runtime_checkable
class Tokenizer(Protocol):
    """What `windows` needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One stretch of text and the hash that identifies it."""

    source: str
    text: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """N windows of T consecutive tokens; `available` is how many the text holds.

    text: which of `texts` each window is from (None: all from the one text `source`).
    bos: whether every window begins with the BOS token.
    """

    tokens: Int[np.ndarray, "N T"]
    source: str
    text_sha256: str
    available: int
    texts: tuple[TextSource, ...] = ()
    text: Int[np.ndarray, "N"] | None = None
    bos: bool = False

    @property
    def sha256(self) -> str:
        """Hash of the token numbers and their shape."""
        little = np.ascontiguousarray(self.tokens, dtype="<i4")
        return hashlib.sha256(f"{little.shape}".encode() + little.tobytes()).hexdigest()


def topic_split(name: str) -> str:
    """The part a topic or module is in: "heldout" when sha256(name), big-endian, is 0 mod 4.

    A hash, not a position, so that a name never changes sides when Python adds another.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return "heldout" if digest % HELDOUT_ONE_IN == 0 else "calibration"


def load_text(sources: str | Sequence[str | Path]) -> Text:
    """One text from one or several sources, joined by blank lines in the order given.

    Raises:
      TurboqError: a source is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    names = [sources] if isinstance(sources, str) else [str(s) for s in sources]
    if not names:
        raise TurboqError("no text given: name a UTF-8 file, or topics:calibration")
    parts = [_part(n) for n in names]
    text = "\n\n".join(parts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(source=",".join(names), text=text, sha256=digest)


def _part(name: str) -> str:
    kind, _, split = name.partition(":")
    if kind not in ("topics", "source"):
        return _file(Path(name))
    if split not in SPLITS:
        choices = ", ".join(f"{kind}:{s}" for s in SPLITS)
        raise TurboqError(f"unknown text source {name!r}: choose from {choices}")
    return _side(_topics() if kind == "topics" else _modules(), split)


def _side(texts: dict[str, str], split: str) -> str:
    """The texts of one side, by name; calibration without the paragraphs of the other."""
    heldout = [
        p for t in sorted(texts) if topic_split(t) == "heldout" for p in _paragraphs(texts[t])
    ]
    if split == "heldout":
        return "\n\n".join(heldout)
    # Some topics repeat others word for word ("compound" holds all of "if", "while", ...).
    seen = {_words(p) for p in heldout}
    calibration = [t for t in sorted(texts) if topic_split(t) == "calibration"]
    kept = [p for t in calibration for p in _paragraphs(texts[t]) if _words(p) not in seen]
    return "\n\n".join(kept)


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _modules() -> dict[str, str]:
    """Source of every single-file module at the top of the standard library, by module name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = (n for n in sys.stdlib_module_names if n.isidentifier())
    files = {name: folder / f"{name}.py" for name in names}
    found = {n: f.read_text(encoding="utf-8") for n, f in files.items() if f.is_file()}
    if not found:
        raise TurboqError(
            f"no standard-library source in {folder}: use a Python that has it, or give text files"
        )
    return found


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if p.strip()]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _file(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TurboqError(f"cannot read text file {path}: {error.strerror or error}") from error
    if b"\0" in raw:
        raise TurboqError(f"text file {path} is binary (it holds a zero byte): give UTF-8 text")
    try:
        # utf-8-sig drops the byte order mark that some editors put in front.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TurboqError(
            f"text file {path} is not UTF-8 (byte {error.start}): convert it to UTF-8"
        ) from error
    if not text.strip():
        raise TurboqError(f"text file {path} is empty")
    return text


def windows(
    text: Text,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int | None = None,
    start: int = 0,
    spread: bool = False,
) -> Windows:
    """Window i holds tokens [start + i*length, start + (i+1)*length) of the text.

    `count` windows are the first ones, or with `spread` evenly spaced ones, window
    floor(i * available / count), so that a small sample sees the whole text. None takes all.

    Raises:
      TurboqError: the text is shorter than one window, or holds fewer than `count` windows.
      ValueError: length, count or start make no sense.
    """
    if length < 1 or start < 0 or (count is not None and count < 1):
        raise ValueError(f"{length=} and {count=} must be 1 or more, {start=} 0 or more")
    ids = np.asarray(tokenizer.encode(text.text), dtype=np.int32)[start:]
    available = len(ids) // length
    if available == 0:
        raise TurboqError(
            f"text {text.source} has {len(ids)} tokens after token {start}, less than one window "
            f"of {length}: give more text or shorter windows"
        )
    if count is not None and count > available:
        raise TurboqError(
            f"text {text.source} holds {available} windows of {length} tokens, {count} were asked "
            f"for: give more text, fewer or shorter windows"
        )
    every = ids[: available * length].reshape(available, length)
    if count is not None:
        every = every[np.arange(count) * available // count] if spread else every[:count]
    return Windows(tokens=every, source=text.source, text_sha256=text.sha256, available=available)
