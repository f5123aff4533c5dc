"""One way to name how K and V are stored, in every flag, list and table.

    WORD    = [LABEL=]SIDE[/SIDE]           one for K and V, or K's and V's: q8_0/q4_0
    SIDE    = FORMAT | CODEC[:SETTING]...   turboquant_mse:3, ggml:q4_0, fp8:e5m2:scale=head
    SETTING = VALUE | FIELD=VALUE           VALUE is the codec's bits, or else its type

A FORMAT is what an engine stores (`turboq.what_fits.formats`): q8_0 is rotated where stock
llama.cpp rotates it, ggml:q8_0 never. NAME:VALUE of codecs NAME_key and NAME_value is both: kivi:2.
In a list a number repeats the codec before it (turboquant_mse:2,3), and so does a value after
FIELD=VALUE (fp8:scale=token,none). JAX is imported only when a codec is named.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboq.errors import TurboqError
from turboq.what_fits.formats import ALIASES, FORMATS, plain_name

if TYPE_CHECKING:
    from turboq.codecs import Codec

# What a VALUE without a name sets: the first of these that the codec has.
SHORT = ("bits", "rows", "type", "format", "dtype")
SYNTAX = "such as f16, q8_0/q4_0, turboquant_mse:3, kivi:2, ggml:type=q4_0"
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_TWINS: dict[str, dict[str, str]] = {
    **{name: {"codec": "exact", "dtype": dtype} for name, dtype in _FLOATS.items()},
    "fp8": {"codec": "fp8", "scale": "none"},
    "fp8_per_token_head": {"codec": "fp8"},
    "int8_per_token_head": {"codec": "int8_token_head"},
    "int4_per_token_head": {"codec": "int4_token_head"},
    "nvfp4": {"codec": "nvfp4"},
}
_GGML = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_BITS = re.compile(r"(?:turbo_?quant|turbo|tq)?[-_: ]?([1-8])[-_ ]?(?:b|bits?)?")


@dataclasses.dataclass(frozen=True)
class Side:
    """K or V: the name of a format or a codec, and settings (field, value) of a codec."""

    name: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def format(self) -> str | None:
        """Its name in `FORMATS`; None for a codec."""
        return None if self.settings else plain_name(self.name)

    @property
    def label(self) -> str:
        """As tables print it: turboquant_mse 3b, ggml q4_0, fp8 e5m2 scale=head."""
        if self.format is not None:
            return self.format
        parts = [self.name]
        for field, value in self.settings:
            if field == "bits":
                parts.append(f"{value}b")
            else:
                parts.append(value if field in SHORT else f"{field}={value}")
        return " ".join(parts)

    def having(self, given: Mapping[str, str]) -> Side:
        """With more settings.

        Raises:
          TurboqError: one that is set already, or that the codec does not have or take.
        """
        for field, value in self.settings:
            if field in given:
                raise TurboqError(f"{self.name}: {field}={value} and --{field}: name it once")
        return side(":".join([self.text, *(f"{f}={v}" for f, v in given.items())]))

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        return ":".join([self.name, *(f"{f}={v}" for f, v in self.settings)])

    def codec(self, side: str, dim: int, rotated: bool = True) -> Codec:
        """The codec of `side` ("k" or "v") for heads of `dim` channels.

        `rotated`: whether llama.cpp rotates this model's cache at all (formats only).

        Raises:
          TurboqError: an engine's format that turboq has no codec for; a setting that the codec
            does not have or take, or that it needs.
        """
        from turboq.codecs import from_config

        if self.format is not None:
            return _twin(self.format, side, dim, rotated)
        fields = fields_of(self.name)
        config = {field: _value(self.name, field, text, fields) for field, text in self.settings}
        for field, kind in fields.items():
            if kind.required and field not in config:
                raise TurboqError(_needs(self.name, field))
        return from_config({"codec": self.name, "dim": dim} | config)


@dataclasses.dataclass(frozen=True)
class Word:
    """How K and V are stored, and what the row or option is called."""

    label: str
    k: Side
    v: Side

    def at(self, rotated: bool = True) -> Callable[[str, int], Codec]:
        """The codec of (side, dim)."""
        return lambda side, dim: (self.k if side == "k" else self.v).codec(side, dim, rotated)


@dataclasses.dataclass(frozen=True)
class Field:
    """A codec's field: its type, and whether it has no default."""

    kind: Any
    required: bool


def parse(text: str) -> Word:
    """What `text` names.

    Raises:
      TurboqError: no such format or codec, with the nearest; a setting that is none.
    """
    label, what = labelled(text)
    k, slash, v = what.partition("/")
    if slash and (not v or "/" in v):
        raise TurboqError(f"{text!r} must name K and V as K/V, {SYNTAX}")
    sides = [side(k), side(v)] if slash else pair(k)
    if label is None:
        names = [s.label for s in sides]
        label = names[0] if names[0] == names[1] else "/".join(names)
        if not slash and sides[0].name != sides[1].name:  # kivi:2
            name = what.partition(":")[0]
            label = Side(name, sides[0].settings).label
    return Word(label, *sides)


def labelled(text: str) -> tuple[str | None, str]:
    """(LABEL, the rest) of LABEL=REST; a setting's "=" comes behind a colon."""
    match = re.match(r"([^=:/,]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match and not os.path.exists(text) else (None, text)


def is_path(text: str) -> bool:
    """Whether an item is a file or folder rather than a word."""
    return plain_name(text) is None and os.path.exists(text)


def folder_name(path: str) -> str:
    """What a plan is called: its folder."""
    found = Path(path)
    return (found.parent if found.suffix == ".json" else found).resolve().name


def pair(text: str) -> list[Side]:
    """K's and V's side of a SIDE that stands for both."""
    name, colon, rest = text.partition(":")
    if plain_name(text) is None and not is_codec(name) and is_codec(f"{name}_key"):
        return [side(f"{name}_{which}{colon}{rest}") for which in ("key", "value")]
    return [side(text)] * 2


def side(text: str) -> Side:
    """One SIDE.

    Raises:
      TurboqError: as `parse`.
    """
    name, *settings = text.split(":")
    if not settings and plain_name(name) is not None:
        return Side(name)
    if not is_codec(name):
        if plain_name(name) is not None:
            raise TurboqError(f"{text!r}: {name} is an engine's format and takes no settings")
        raise TurboqError(unknown(text))
    fields = fields_of(name)
    found: dict[str, str] = {}
    for item in settings:
        field, equals, value = item.partition("=")
        if not equals:
            field, value = next((f for f in SHORT if f in fields), ""), item
        if not value or field not in fields:
            takes = ", ".join(f"{f}=" for f in fields) or "no settings"
            raise TurboqError(f"{text!r}: {item!r} is no setting of codec {name}: it takes {takes}")
        if field in found:
            raise TurboqError(f"{text!r} sets {field} twice")
        _value(name, field, value, fields)
        found[field] = value
    return Side(name, tuple(found.items()))


def is_codec(name: str) -> bool:
    """Whether a codec of that name is registered."""
    from turboq.codecs import CODECS

    return name in CODECS


def fields_of(name: str) -> dict[str, Field]:
    """Fields of a registered codec but its dim."""
    import typing

    from turboq.codecs import CODECS

    cls = CODECS[name]
    kinds = typing.get_type_hints(cls)
    return {
        f.name: Field(kinds[f.name], f.default is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
        if f.name != "dim"
    }


def unknown(text: str) -> str:
    """What an error says of a name that is no format and no codec."""
    from turboq.codecs import CODECS

    name = text.partition(":")[0]
    if outside := CODECS.missing(name):
        return outside
    if match := _BITS.fullmatch(text.lower()):
        return f"{text!r} is no codec or format: did you mean turboquant_mse:{match[1]}?"
    pairs = [n.removesuffix("_key") for n in CODECS if n.endswith("_key")]
    near = difflib.get_close_matches(name.lower(), [*CODECS, *pairs, *FORMATS, *ALIASES], n=3)
    if near:
        return f"{text!r} is no codec, format or path: did you mean {' or '.join(near)}?"
    return (
        f"{text!r} is no codec, format or path ({SYNTAX}); formats are {', '.join(FORMATS)}; "
        f"codecs are {', '.join(sorted(CODECS))}"
    )


def split(entries: str | Iterable[str]) -> list[str]:
    """The items of a flag's lists: separated by commas, the flag repeated or not.

    An entry that is a file or folder (or LABEL=PATH of one) is one item, commas and all.

    Raises:
      TurboqError: an empty item, or several that only spaces part.
    """
    found: list[str] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        if is_path(labelled(entry)[1]):
            found.append(entry)
            continue
        before = ""  # the item that a value without a name repeats
        for item in map(str.strip, entry.split(",")):
            if not item:
                raise TurboqError(f"{entry!r} has an empty item between its commas")
            parted(item)
            if before and _repeats(before, item):
                item = before[: max(map(before.rfind, ":=")) + 1] + item
            found.append(item)
            before = item if ":" in item else ""
    return found


def parted(item: str) -> str:
    """The item, unless it is several with spaces between.

    Raises:
      TurboqError: no such path, and spaces in it.
    """
    what = labelled(item)[1]
    if len(several := what.split()) > 1 and not os.path.exists(what):
        raise TurboqError(
            f"{item!r} is no path: of several, commas stand between: {','.join(several)}"
        )
    return item


def _repeats(before: str, item: str) -> bool:
    if re.fullmatch(r"\d+(\.\d+)?", item):
        return True
    plain = not re.search(r"[:=/]", item)
    return plain and "=" in before.rpartition(":")[2] and not is_codec(item)


def _value(name: str, field: str, text: str, fields: dict[str, Field]) -> Any:
    kind = fields[field].kind
    if kind is str:
        return text
    try:
        if kind in (int, float):
            return kind(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise TurboqError(f"codec {name}: {field}={text!r} must be {kind.__name__}") from None
    raise TurboqError(
        f"codec {name}: {field} cannot be written in a word; `turboq plan --budget` chooses it"
    )


def _needs(name: str, field: str) -> str:
    if field in SHORT:
        example = {"bits": "3", "rows": "128", "type": "q4_0"}.get(field, "...")
        return f"codec {name} needs {field}: {name}:{example}, or --{field}"
    return f"codec {name} needs {field}, which `turboq plan --budget --candidates` chooses"


def _twin(name: str, side: str, dim: int, rotated: bool) -> Codec:
    """The turboq codec that stores what an engine's format stores."""
    from turboq.codecs import from_config
    from turboq.codecs.ggml import attn_rot

    if name in _TWINS:
        return from_config({"dim": dim} | _TWINS[name])
    if name in _GGML:
        turned = attn_rot(dim, side) if rotated else {}
        return from_config({"codec": "ggml", "dim": dim, "type": name} | turned)
    why = {
        "int8": "static scales: per_channel:8 is fitted to statistics",
        "int4": "static scales: per_channel:4 is fitted to statistics",
    }.get(name, "")
    if FORMATS[name].slot:
        why = "vLLM keeps the first and last two layers exact: turboq plan --engine=vllm"
    raise TurboqError(f"turboq has no codec for {name}" + (f" ({why})" if why else ""))
