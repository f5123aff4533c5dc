"""Seeded damage to documents and files, for the fuzz and schema tests."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    9,
    255,
    1024,
    2**31,
    2**53 - 1,
    0.5,
    -1e300,
    "",
    "0",
    "float32",
    "per_head",
    "exact",
    "haar",
    "sphere",
    "head",
    "before",
    "after",
    "../../etc/passwd",
    "a\nb",
    "\U0001f600 \u2028",
    "x" * 4097,
    [],
    [0],
    [[]],
    {},
    {"codec": "exact", "dim": 8, "dtype": "bfloat16"},
    {"x-a": 1},
    {"0": {}},
)
KEYS = (
    *("x-fuzz", "extra", "", "heads", "codec", "bits", "0", "2", "1023", "1024", "seed", "a\nb"),
    *("rope", "inv_freq", "scaling"),
)


def containers(value: Any) -> Iterator[Any]:
    """Every object and array of a document."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def pick(rng: np.random.Generator, items) -> Any:
    return items[int(rng.integers(len(items)))]


def mutate(document: Any, rng: np.random.Generator) -> Any:
    """A copy with one change of structure or value."""
    doc = json.loads(json.dumps(document))  # a copy in a fraction of deepcopy's time
    every = list(containers(doc))
    at = pick(rng, [c for c in every if c])
    keys = list(at) if isinstance(at, dict) else range(len(at))
    key = pick(rng, list(keys))
    kind = int(rng.integers(9))
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[pick(rng, KEYS)] = copy.deepcopy(pick(rng, (at[key], *JUNK)))
    elif kind == 2 and isinstance(at, dict):
        at[pick(rng, KEYS)] = at.pop(key)
    elif kind == 3 and len(at) > 1:
        other = pick(rng, list(keys))
        at[key], at[other] = at[other], at[key]
    elif kind == 4 and isinstance(at, list):
        at.insert(key, copy.deepcopy(pick(rng, at)))
    elif kind == 5:
        at[key] = copy.deepcopy(pick(rng, every))
    elif kind <= 7 and type(at[key]) in (int, float):
        at[key] = pick(rng, (at[key] + 1, at[key] - 1, at[key] * 2, -at[key], at[key] + 8))
    else:
        at[key] = copy.deepcopy(pick(rng, JUNK))
    return doc


def damage(raw: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes of bytes: flipped, cut, inserted, copied from elsewhere, removed."""
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 4))):
        at, n = int(rng.integers(len(out) + 1)), int(rng.integers(1, 40))
        other = int(rng.integers(len(out) + 1))
        kind = int(rng.integers(7))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.bytes(n)
        elif kind == 3:
            out[at:at] = out[other : other + n]
        elif kind == 4:
            del out[at : at + n]
        elif kind == 5 and at < len(out):
            out[at] = pick(rng, b'{}[]",:0129eE.-+ntfaN\\ \n\x00\xff')
        else:
            out[at : at + n] = pick(rng, (b"NaN", b"-Infinity", b"1e999", b"[[[[", b'"\\ud800"'))
    return bytes(out)


def damage_header(raw: bytes, rng: np.random.Generator) -> bytes:
    """The header of a safetensors file changed as JSON, the data kept."""
    (size,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(mutate(json.loads(raw[8 : 8 + size]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def repeat_key(text: str, rng: np.random.Generator) -> str:
    """JSON text in which one member of one object is given twice."""
    starts = [i for i, c in enumerate(text) if c == "{" and text[i + 1 : i + 2] == '"']
    at = pick(rng, starts) + 1
    key, end = json.JSONDecoder().raw_decode(text[at:])
    return f"{text[:at]}{json.dumps(key)}{text[at + end : at + end + 1]} 0, {text[at:]}"
