"""Tokenizers: a Hugging Face `tokenizer.json`, or the same built from GGUF metadata."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from turboq.errors import TurboqError, quoted, shortened
from turboq.json_object import read_object
from turboq_calibrate.models import chat
from turboq_calibrate.models.chat import ChatTemplate
from turboq_calibrate.models.splits import SPLITS, Splits

# GGUF token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
KINDS = ("gpt2", "llama", "gemma4")  # of tokenizer.ggml.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back.

    `encode` adds no special tokens: `adds_bos` says that the model expects `bos_id` in front of a
    text, and who makes a text of tokens puts it there.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    adds_bos: bool = False
    read_chat: Callable[[], ChatTemplate | None] = lambda: None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens only where the text spells them.

        Raises:
          TurboqError: `text` holds a byte that no token has (the backend would drop it silently).
        """
        if self._missing_bytes:
            lost = self._missing_bytes.intersection(text.encode("utf-8"))
            if lost:
                raise TurboqError(
                    f"the text holds byte {min(lost):#04x}, for which the model's vocabulary has "
                    "no token: remove it"
                )
        with _library("the model's tokenizer cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Text of token ids."""
        with _library("the model's tokenizer cannot decode"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def chat(self) -> ChatTemplate | None:
        """The model's chat template; read when first asked for.

        Raises:
          TurboqError: it is there and cannot be read.
        """
        return self._chat

    @functools.cached_property
    def _chat(self) -> ChatTemplate | None:
        return self.read_chat()

    @functools.cached_property
    def _missing_bytes(self) -> frozenset[int]:
        """Bytes that a byte-level vocabulary has no token for; empty for other kinds."""
        byte_level = isinstance(self.backend.decoder, decoders.ByteLevel)
        if not byte_level or getattr(self.backend.model, "unk_token", None) is not None:
            return frozenset()
        return frozenset(
            byte
            for byte, symbol in enumerate(byte_symbols())
            if self.backend.token_to_id(symbol) is None
        )

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (as GPT-2 defined it).

    Printable Latin-1 stands for itself; the other bytes are numbered on from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    BOS and EOS are those of `generation_config.json` or `config.json`. Text begins with BOS where
    `add_bos_token` of `tokenizer_config.json` says so or, without that field, where the
    post-processor of `tokenizer.json` adds it.

    Raises:
      TurboqError: `tokenizer.json` is absent or not readable as one; a configuration is no JSON.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TurboqError(
            f"{folder} has no tokenizer.json: save the tokenizer there "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    _check_merges(path, read_object(path, "save the tokenizer there again"))
    with _library(f"{path} is not a readable tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The file may ask for both, and a long text would lose its end without a word.
    backend.no_truncation()
    backend.no_padding()
    ids: dict[str, list[int]] = {"bos": [], "eos": []}
    for name in ("generation_config.json", "config.json"):
        settings = _settings(folder / name)
        for key, found in ids.items():
            value = settings.get(f"{key}_token_id")
            given = [] if value is None else value if isinstance(value, list) else [value]
            if any(type(i) is not int for i in given):
                raise TurboqError(
                    f"{folder / name}: {key}_token_id={quoted(value)} must be a token number, or "
                    "several"
                )
            found += [] if found else given
    bos = ids["bos"][0] if ids["bos"] else None
    file = folder / "tokenizer_config.json"
    adds_bos = _settings(file).get("add_bos_token")
    if adds_bos is None:
        with _library(f"{path} is not a usable tokenizer"):
            adds_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
    if type(adds_bos) is not bool:
        raise TurboqError(f"{file}: add_bos_token={quoted(adds_bos)} must be true or false")
    return Tokenizer(
        backend=backend, bos_id=bos, eos_ids=tuple(ids["eos"]), adds_bos=adds_bos,
        read_chat=functools.partial(chat.from_folder, folder),
    )  # fmt: skip


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file's fields; none when there is no such file."""
    return read_object(file) if file.is_file() else {}


def _check_merges(path: Path, document: dict[str, Any]) -> None:
    """Refuses merges that make the library end the whole process: it cuts the prefix of continuing
    pieces off the second part of every merge without looking."""
    model = document.get("model")
    if not isinstance(model, dict):
        return
    prefix = model.get("continuing_subword_prefix")
    if not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        second = pair[-1] if isinstance(pair, list) and pair else None
        if isinstance(second, str) and not second.startswith(prefix):
            raise TurboqError(
                f"{path} is not a readable tokenizer: merge {quoted(merge)} continues a word, and "
                f"does not begin with continuing_subword_prefix={quoted(prefix)}"
            )


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Errors of the tokenizers package as one line: bare Exceptions, and panics of Rust."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TurboqError(f"{what}: {_line(error)}") from error


def from_gguf(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that GGUF metadata describes.

    Raises:
      TurboqError: absent, incomplete, or of a kind not listed in `SPLITS`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise TurboqError(f"{path} has no tokenizer (tokenizer.ggml.model is missing)")
    if kind not in KINDS:
        raise TurboqError(
            f"{path}: tokenizer model {quoted(kind)} is not supported (supported: "
            f"{', '.join(KINDS)})"
        )
    tokens = _list(metadata, "tokens", str, path)
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "token_type", int, path, len(tokens))
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata, tokens, path)
    elif kind == "gemma4":
        unknown = _unknown(tokens, types)
        backend = _of_characters(tokens, _merges(metadata, path), unknown, path, prefix=False)
    else:
        backend = _sentencepiece(metadata, tokens, types, path)
    added = [
        AddedToken(token, normalized=False, special=type_ != USER_DEFINED)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (CONTROL, USER_DEFINED) or (type_ == UNKNOWN and kind != "gpt2")
    ]
    backend.add_tokens(added)
    bos, *eos = (_token_id(metadata, name, path) for name in ("bos", "eos", "eot", "eom"))
    default = kind != "gpt2" or _splits(metadata, path).bos
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", default)
    if type(adds_bos) is not bool:
        raise TurboqError(
            f"{path}: tokenizer.ggml.add_bos_token={quoted(adds_bos)} must be true or false"
        )
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(e for e in eos if e is not None)),
        adds_bos=adds_bos,
        read_chat=functools.partial(chat.from_gguf, metadata, tokens, path),
    )


def _list(
    metadata: dict[str, Any], name: str, item: type, path: Path, length: int | None = None
) -> list[Any]:
    """A list field of the tokenizer's metadata, of `item`s, of the right length."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        raise TurboqError(f"{path} has no usable tokenizer: tokenizer.ggml.{name} is missing")
    if not isinstance(values, list) or any(type(v) is not item for v in values):
        raise TurboqError(f"{path}: tokenizer.ggml.{name} must be a list of {item.__name__}")
    if length is not None and len(values) != length:
        raise TurboqError(f"{path}: {len(values)} tokenizer.ggml.{name} for {length} tokens")
    return values


def _token_id(metadata: dict[str, Any], name: str, path: Path) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and type(value) is not int:
        raise TurboqError(
            f"{path}: tokenizer.ggml.{name}_token_id={quoted(value)} must be a number"
        )
    return value


def _line(error: BaseException) -> str:
    """The first line of another package's message."""
    return shortened(str(error).partition("\n")[0])


def _byte_level_bpe(
    metadata: dict[str, Any], tokens: list[str], path: Path
) -> tokenizers.Tokenizer:
    splits = _splits(metadata, path)
    backend = _bpe(tokens, _merges(metadata, path), path, splits.whole)
    backend.pre_tokenizer = splits.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if (normalizer := splits.normalizer()) is not None:
        backend.normalizer = normalizer
    return backend


def _merges(metadata: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    return [tuple(m.split(" ", 1)) for m in _list(metadata, "merges", str, path)]


def _splits(metadata: dict[str, Any], path: Path) -> Splits:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITS:
        raise TurboqError(
            f"{path}: pre-tokenizer {quoted(pre)} is not supported (supported: "
            f"{', '.join(SPLITS)}): the model's Hugging Face folder has a tokenizer.json, which is "
            "read whatever it does"
        )
    return SPLITS[pre]


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: list[int], path: Path
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: adjacent pieces whose union scores highest merge first, then bytes.

    Every split of a piece into two pieces is a merge; merges are ranked by the score of the union.
    """
    scores = _list(metadata, "scores", float, path, len(tokens))
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise TurboqError(f"{path}: tokenizer.ggml.{key} is set, which is not supported")
    mergeable = {
        token: i
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ == NORMAL
    }
    merges = [
        (-float(scores[i]), mergeable[token[:cut]], mergeable[token[cut:]], i, cut)
        for token, i in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    pairs = [(tokens[i][:cut], tokens[i][cut:]) for _, _, _, i, cut in sorted(merges)]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return _of_characters(tokens, pairs, _unknown(tokens, types), path, prefix=prefix)


def _unknown(tokens: list[str], types: list[int]) -> str | None:
    return tokens[types.index(UNKNOWN)] if UNKNOWN in types else None


def _of_characters(
    tokens: list[str], merges: list[Any], unknown: str | None, path: Path, *, prefix: bool
) -> tokenizers.Tokenizer:
    """BPE of characters, spaces written as a letter; what has no token is bytes. Gemma 4's merges
    are those of its file."""
    backend = _bpe(
        tokens, merges, path, False, byte_fallback=True, fuse_unk=True, unk_token=unknown
    )
    space = normalizers.Replace(" ", "▁")
    tail = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        backend.decoder = decoders.Sequence([*tail, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = space
        backend.decoder = decoders.Sequence(tail)
    return backend


def _bpe(
    tokens: list[str], merges: list[Any], path: Path, ignore_merges: bool, **options: Any
) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TurboqError(f"{path}: {len(tokens) - len(vocab)} tokens of the vocabulary repeat")
    with _library(f"{path}: the tokenizer's merges are not usable"):
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges, **options)
    return tokenizers.Tokenizer(model)
