"""Bytes from outside -> JSON values, with every hostile or ambiguous input refused by path.

Python's parser takes more than JSON (NaN, duplicate keys, integers of any size, UTF-16) and a deep
document exhausts its stack. Here size and nesting are bounded before parsing, the rest after.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from turboq.plan.errors import PlanError, member

MAX_JSON_BYTES = 16 << 20  # 1024 layers with every one of 8 heads overridden take about 5 MiB
MAX_DEPTH = 32
MAX_INT = 2**53 - 1  # largest that every JSON reader keeps exact
MAX_TEXT = 4096

# Possessive: linear time, and no backtracking state for a string of many megabytes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# By byte: how it changes the depth of nesting.
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


class _Refused:
    """Stands where the document holds something that no plan may hold."""

    def __init__(self, reason: str):
        self.reason = reason


def parse_json(raw: bytes) -> Any:
    """The JSON value of UTF-8 bytes.

    Raises:
      PlanError: too large, too deep, not UTF-8, not JSON, a duplicate key, NaN or Infinity, an
        integer beyond 2**53 - 1, a string beyond 4096 characters or with half a surrogate pair.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise PlanError("", f"{len(raw)} bytes of JSON are more than the limit {MAX_JSON_BYTES}")
    if _depth(raw) > MAX_DEPTH:
        raise PlanError("", f"JSON nested deeper than the limit of {MAX_DEPTH} levels")
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=lambda name: _Refused(f"{name} is not a finite number"),
        )
    except UnicodeDecodeError as error:
        raise PlanError("", f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError("", f"not JSON: {error}") from None
    _check_values(document)
    return document


def _depth(raw: bytes) -> int:
    marks = np.frombuffer(_STRING.sub(b"", raw), np.uint8)
    return int(np.cumsum(_STEP[marks], dtype=np.int32).max(initial=0))


def _integer(digits: str) -> int | _Refused:
    if len(digits) <= 17 and abs(int(digits)) <= MAX_INT:
        return int(digits)
    return _Refused("integer beyond 2**53 - 1")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                out[key] = _Refused("given twice")
            seen.add(key)
    return out


def _check_values(document: Any) -> None:
    # (value, link to the parent): the path is only spelled out for an error.
    pending: list[tuple[Any, tuple]] = [(document, ())]
    while pending:
        value, link = pending.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                _check_text(key, (link, key))
                pending.append((item, (link, key)))
        elif isinstance(value, list):
            pending.extend((item, (link, i)) for i, item in enumerate(value))
        elif isinstance(value, str):
            _check_text(value, link)
        elif isinstance(value, float) and not math.isfinite(value):
            raise PlanError(_path(link), "not a finite number")
        elif isinstance(value, _Refused):
            raise PlanError(_path(link), value.reason)


def _check_text(text: str, link: tuple) -> None:
    if len(text) > MAX_TEXT:
        raise PlanError(_path(link), f"text of {len(text)} characters: the limit is {MAX_TEXT}")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise PlanError(_path(link), "text holds half of a surrogate pair")


def _path(link: tuple) -> str:
    keys = []
    while link:
        link, key = link
        keys.append(key)
    path = ""
    for key in reversed(keys):
        path = member(path, key)
    return path
