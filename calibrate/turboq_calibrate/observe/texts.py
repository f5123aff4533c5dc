"""Text in, windows of tokens out: where calibration and evaluation text comes from.

A source is one of

    topics:calibration, topics:heldout    the Python language reference that every interpreter
                                          carries in `pydoc_data.topics`, split by topic into two
                                          parts without a common paragraph
    source:calibration, source:heldout    the same of the standard library's source, by module
    self:SEED                             text that the model itself writes (`self_text`)
    anything else                         the path of a UTF-8 file (./a:b where a name has a colon),
                                          of JSON lines where it ends in .jsonl (`jsonl_text`)

Each is a text of its own: windows do not overlap, and none holds tokens of two texts. SOURCE@3 has
three times the weight of a text without (`weights`).
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from turboq.errors import TurboqError
from turboq.plan import TextSource
from turboq_calibrate.models import Model
from turboq_calibrate.models.chat import ChatTemplate
from turboq_calibrate.models.params import parameter_count
from turboq_calibrate.models.spec import ModelSpec
from turboq_calibrate.observe import jsonl_text
from turboq_calibrate.observe.held_back import HeldBack, leave_out
from turboq_calibrate.observe.self_text import seed_of, self_windows, text_source
from turboq_calibrate.observe.weights import in_turn, place, weighted

HELDOUT_ONE_IN = 4
SPLITS = ("calibration", "heldout")
# What is calibrated on by default: what the model writes is broader than any one kind of text, and
# plans learned from it hold on other kinds (experiments/calibration_text.py).
CALIBRATION = ("self:0", "topics:calibration")
# Writing takes all weights in memory and a pass over them per token: not for a large model.
WRITES = 2_000_000_000  # parameters
CALIBRATION_OF_LARGE = ("topics:calibration", "source:calibration")
COUNT, LENGTH = 16, 512
LONG_CHECK = 4096  # tokens of a window to judge plans for a context by
# "kind:rest"; one letter before the colon is a drive.
KIND = re.compile(r"([A-Za-z_]\w+):")


@runtime_checkable
class Tokenizer(Protocol):
    """What windows need of a tokenizer; `models.Tokenizer` is one."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def chat(self) -> ChatTemplate | None: ...

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One stretch of text, its name (of a file without its folder) and the hash of its bytes."""

    source: str
    text: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """N windows of T tokens, window i from `texts[text[i]]`.

    available: windows of this length that the shortest text holds. What a model writes has no end:
      it counts as what was taken of it.
    bos: every window begins with the tokenizer's BOS token, followed by T - 1 tokens of text.
    held_back: windows between these, to check on.
    weights: of the texts; none: all are equal.

    Raises:
      ValueError: not one text per window, or a text that is not in `texts`; not one weight a text.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> windows = tc.mixed_windows(["topics:heldout"], model.tokenizer, length=64, count=2)
      >>> windows.tokens.shape, windows.text.tolist(), windows.source
      ((2, 64), [0, 0], 'topics:heldout')
    """

    tokens: Int[np.ndarray, "N T"]
    texts: tuple[TextSource, ...]
    text: Int[np.ndarray, "N"]
    available: int
    bos: bool = False
    held_back: HeldBack = dataclasses.field(default_factory=HeldBack)
    weights: tuple[Fraction, ...] = ()

    def __post_init__(self):
        if self.weights and len(self.weights) != len(self.texts):
            raise ValueError(f"{len(self.weights)} weights of {len(self.texts)} texts")
        if self.text.shape != self.tokens.shape[:1]:
            raise ValueError(f"{self.text.shape=} must be one text per window {self.tokens.shape}")
        if self.text.size and not 0 <= self.text.min() <= self.text.max() < len(self.texts):
            raise ValueError(f"texts {set(self.text.tolist())} must be in 0..{len(self.texts) - 1}")

    @property
    def source(self) -> str:
        """The names of the texts."""
        return ", ".join(t.name for t in self.texts)

    @property
    def text_sha256(self) -> str:
        """The text's hash; of several, the hash of their hashes in order."""
        if len(self.texts) == 1:
            return self.texts[0].sha256
        return hashlib.sha256(",".join(t.sha256 for t in self.texts).encode()).hexdigest()

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


def load_text(source: str | Path, chat: ChatTemplate | None = None) -> Text:
    """The text of one source; `chat` writes the conversations of a JSON lines file.

    Raises:
      TurboqError: an unknown kind or part; a file that is missing, a folder, unreadable, empty,
        binary or not UTF-8; JSON lines without the fields (`jsonl_text`); `self:SEED`, which only
        `mixed_windows` can make.
    """
    name = source
    if isinstance(source, str) and (kind := kind_of(source)) is not None:
        if kind == "self":
            raise TurboqError(f"text {source} is written by a model, and none is given here")
        split = source.partition(":")[2]
        if split not in SPLITS:
            choices = ", ".join(f"{kind}:{s}" for s in SPLITS)
            raise TurboqError(f"unknown text source {source!r}: choose from {choices}")
        text = _side(_topics() if kind == "topics" else _modules(), split)
    else:
        path = Path(source)
        name, text = path.name, read_file(path)  # where a file lies says nothing about its text
        if path.suffix.lower() == ".jsonl":
            text = jsonl_text.text_of(text, path, chat)
    return Text(source=str(name), text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def kind_of(source: str) -> str | None:
    """What stands before the colon of a source; None for a path.

    Raises:
      TurboqError: a kind that does not exist, or no name at all.
    """
    if not source:
        raise TurboqError("a text without a name: give a UTF-8 file, or topics:calibration")
    match = KIND.match(source)
    if match is None:
        return None
    if match[1] not in ("topics", "source", "self"):
        raise TurboqError(
            f"unknown kind of text {match[1]!r} in {source!r}: known are topics, source and self "
            f"(a file of that name is ./{source})"
        )
    return match[1]


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


def read_file(path: Path) -> str:
    """A UTF-8 file as it is.

    Raises:
      TurboqError: it is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
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
    bos: bool | None = None,
) -> Windows:
    """Window i holds tokens [start + i*n, start + (i+1)*n) of the text.

    n is `length`, or with `bos` one less behind a BOS token; None does what the model's tokenizer
    does. `count` windows are the first ones, or with `spread` evenly spaced ones, window
    floor(i * available / count), so that a small sample sees the whole text. None takes all.

    Raises:
      TurboqError: the text is shorter than one window, or holds fewer than `count` windows; BOS is
        asked for and the tokenizer has none.
      ValueError: length, count or start make no sense.
    """
    ids = _ids(text, tokenizer)
    return _cut(text, ids[start:], _bos(tokenizer, bos), length, count, start, spread)


def _ids(text: Text, tokenizer: Tokenizer) -> Int[np.ndarray, "n"]:
    return np.asarray(tokenizer.encode(text.text), dtype=np.int32)


def _cut(
    text: Text, ids: Int[np.ndarray, "n"], first: list[int], length: int, count: int | None,
    start: int, spread: bool,
) -> Windows:  # fmt: skip
    """`windows` of the tokens from `start` on, each behind `first`."""
    if length < 1 or start < 0 or (count is not None and count < 1):
        raise ValueError(f"{length=} and {count=} must be 1 or more, {start=} 0 or more")
    each = length - len(first)
    if each < 1:
        raise TurboqError("windows of 1 token hold nothing behind BOS: make them longer")
    available = len(ids) // each
    if available == 0:
        raise TurboqError(
            f"text {text.source} has {len(ids)} tokens after token {start}, less than one window "
            f"of {each}: give more text or shorter windows"
        )
    if count is not None and count > available:
        raise TurboqError(
            f"text {text.source} holds {available} windows of {length} tokens, {count} were asked "
            f"for: give more text, fewer or shorter windows"
        )
    every = ids[: available * each].reshape(available, each)
    if count is not None:
        every = every[np.arange(count) * available // count] if spread else every[:count]
    begin = np.broadcast_to(np.asarray(first, np.int32), (len(every), len(first)))
    return Windows(
        tokens=np.concatenate([begin, every], axis=1),
        texts=(TextSource(name=text.source, sha256=text.sha256),),
        text=np.zeros(len(every), np.int32),
        available=available,
        bos=bool(first),
    )


def _bos(tokenizer: Tokenizer, bos: bool | None) -> list[int]:
    """What windows begin with: BOS or nothing."""
    if not (tokenizer.adds_bos if bos is None else bos):
        return []
    if tokenizer.bos_id is None:
        why = "bos=yes" if bos else "the model's tokenizer begins every text with BOS"
        raise TurboqError(f"{why}, but names no BOS token: use bos=no")
    return [tokenizer.bos_id]


def mixed_windows(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int | None,
    start: int = 0,
    spread: bool = True,
    bos: bool | None = None,
    check: int = 0,
    check_length: int = 0,
    model: Model | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Windows:
    """`count` windows shared between the texts as their weights say, in turn.

    Of equal weights window i is of text i mod n, so that every prefix, chunk and shard holds all
    texts. None takes all windows of all texts. Of each text: `windows`.

    Args:
      check: windows of each text to hold back, between the others; `check_length`: tokens of one
        longer window held back of the first text that has room (0: none).
      model: writes the text of `self:SEED`; without it such a source is refused.
      folder: keeps what the model wrote (`self_text.self_windows`).

    Raises:
      TurboqError: fewer windows than texts; a text twice, or one that holds too few windows, or
        whose weight leaves it none; whatever `load_text` and `windows` refuse.
      ValueError: windows to hold back between windows that are not spread.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> texts = ["topics:calibration", "source:calibration"]
      >>> windows = tc.mixed_windows(texts, model.tokenizer, length=64, count=4)
      >>> windows.tokens.shape, windows.text.tolist()  # in turn
      ((4, 64), [0, 1, 0, 1])
    """
    if not sources:
        raise TurboqError("no text given: name a UTF-8 file, or topics:calibration")
    n = len(sources)
    sources, weights = zip(*map(weighted, sources), strict=True)
    unequal = len(set(weights)) > 1
    if count is not None and count < n:
        raise TurboqError(f"{count} windows of {n} texts: take at least one window of each")
    if count is None and unequal:
        raise TurboqError("texts of different weights share a number of windows: name one, not all")
    turns = in_turn(weights, count or 0)
    own = [kind_of(source) == "self" for source in sources]
    for i, source in enumerate(sources):
        if source in sources[:i]:
            raise TurboqError(f"text {source} is given twice: name each text once")
        if own[i] and (model is None or count is None):
            what = "a model to write it" if model is None else "a number of windows"
            raise TurboqError(f"text {source} needs {what}, and none is given here")
    parts: dict[int, Windows] = {}
    ids: dict[int, Int[np.ndarray, "_"]] = {}
    written: dict[int, Int[np.ndarray, "_ T"]] = {}  # held back of what the model writes
    for i in sorted(range(n), key=own.__getitem__):  # cheap errors first: a model writes for hours
        share = None if count is None else turns.count(i)
        if share == 0:
            raise TurboqError(
                f"{count} windows leave text {sources[i]} none of its weight {weights[i]}: take "
                "more windows, or weights that are closer"
            )
        if own[i]:
            assert model is not None  # checked above
            assert share is not None
            parts[i], rest = _own_windows(model, sources[i], length, share, check, folder, progress)
            if check:
                written[i] = rest
        else:
            text, first = load_text(sources[i], _chat(sources[i], tokenizer)), _bos(tokenizer, bos)
            ids[i] = _ids(text, tokenizer)
            if first and ids[i][:1].tolist() == first:  # a chat template that writes BOS itself
                ids[i] = ids[i][1:]
            parts[i] = _cut(text, ids[i][start:], first, length, share, start, spread)
    found = _in_turn([parts[i] for i in range(n)], weights)
    if unequal:
        found = dataclasses.replace(found, weights=weights)
    if count is None or not (check or check_length):
        return found
    if start or not spread:
        raise ValueError(f"{start=} and {spread=}: windows are held back between spread ones only")
    held = _held_back(ids, written, tokenizer, found, check, check_length)
    return dataclasses.replace(found, held_back=held)


def _chat(source: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template, where a source may need it."""
    return tokenizer.chat if source.lower().endswith(".jsonl") else None


def _held_back(
    ids: dict[int, Int[np.ndarray, "_"]], written: dict[int, Int[np.ndarray, "_ T"]],
    tokenizer: Tokenizer, found: Windows, check: int, check_length: int,
) -> HeldBack:  # fmt: skip
    first = [tokenizer.bos_id] if found.bos and tokenizer.bos_id is not None else []
    short, long = dict(written), dict[int, Int[np.ndarray, "_"]]()
    for i in sorted(ids):
        some, one = leave_out(
            ids[i], first, length=found.tokens.shape[1], windows=found.text.tolist().count(i),
            count=check, long_length=0 if long else check_length,
        )  # fmt: skip
        short |= {} if some is None else {i: some}
        long |= {} if one is None else {i: one}
    return HeldBack(short=dict(sorted(short.items())), long=long)


def _own_windows(
    model: Model, source: str, length: int, count: int, check: int,
    folder: str | os.PathLike[str] | None, progress: bool,
) -> tuple[Windows, Int[np.ndarray, "_ T"]]:  # fmt: skip
    """`count` windows of what the model writes, and the `check` that follow them."""
    seed = seed_of(source)
    tokens = self_windows(
        model, seed=seed, length=length, count=count + check, folder=folder, progress=progress
    )
    taken = Windows(
        tokens=tokens[:count],
        texts=(text_source(model, seed),),
        text=np.zeros(count, np.int32),
        available=count,
        bos=bool((tokens[:, 0] == model.tokenizer.bos_id).all()),
    )
    return taken, tokens[count:]


def _in_turn(parts: Sequence[Windows], weights: Sequence[Fraction]) -> Windows:
    """The windows of all parts, turns taken as `weights.in_turn` has them."""
    texts = tuple(p.texts[0] for p in parts)
    for i, text in enumerate(texts):
        same = [t.name for t in texts[:i] if t.sha256 == text.sha256]
        if same:
            raise TurboqError(f"texts {same[0]} and {text.name} are the same: name each text once")
    text = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p.tokens) for p in parts])
    places = [
        place(j, w) for p, w in zip(parts, weights, strict=True) for j in range(len(p.tokens))
    ]
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    return Windows(
        tokens=np.concatenate([p.tokens for p in parts])[order],
        texts=texts,
        text=text[order],
        available=min(p.available for p in parts),
        bos=all(p.bos for p in parts),
    )


def calibration_sources(spec: ModelSpec) -> tuple[str, ...]:
    """The texts that a model is calibrated on by default: its own and topics, if it is not large.

    What decides is the model alone, so that every machine takes the same text.
    """
    return CALIBRATION if parameter_count(spec) <= WRITES else CALIBRATION_OF_LARGE


def calibration_windows(
    model: Model,
    *,
    count: int = COUNT,
    length: int = LENGTH,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Windows:
    """What `turboq calibrate` observes by default, and what it holds back.

    `count` windows of `length` tokens in all: of a model of at most 2e9 parameters half of text
    that it writes itself, half of `topics:calibration`. `seed` is that of
    what the model writes, `folder` keeps it.

    Raises:
      TurboqError: windows longer than the model's context, or whatever `mixed_windows` refuses.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> tc.calibration_windows(model, count=2, length=32).tokens.shape
      (2, 32)
    """
    sources = [x.replace("self:0", f"self:{seed}") for x in calibration_sources(model.spec)]
    return mixed_windows(
        sources, model.tokenizer, length=length, count=count, check=1,
        check_length=long_check(model.spec.context, length), model=model, folder=folder,
    )  # fmt: skip


def long_check(context: int, length: int, wanted: int | None = None) -> int:
    """Tokens of the longer check window: four windows, at most the model's context; 0 if no more
    than one window fits. For plans at a context of `wanted` tokens so many, at most `LONG_CHECK`
    (or four windows)."""
    four = 4 * length
    longest = min(context, four if wanted is None else min(wanted, max(four, LONG_CHECK)))
    return longest if longest > length else 0
