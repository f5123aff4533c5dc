"""Named geometries of common models, for counting caches without a checkpoint.

`geometries.json` holds the fields of each model's `config.json` that decide its cache, with their
source; they are read by the same reader as a file (`turboq.what_fits.hf_config`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import json
import re

from turboq.errors import TurboqError
from turboq.what_fits.hf_config import from_config
from turboq.what_fits.layers import MAX_DIM, MAX_HEADS, MAX_LAYERS, CacheGeometry, CacheLayer

_SHAPE = re.compile(r"(\d{1,9})x(\d{1,9})x(\d{1,9})")


@functools.cache
def _table() -> dict[str, dict]:
    """Every entry by each of its names, the hub's included, in lower case."""
    text = (importlib.resources.files("turboq.what_fits") / "geometries.json").read_text(
        encoding="utf-8"
    )
    entries = json.loads(text)["geometries"]
    return {name: e for e in entries for name in (e["name"], *e.get("aliases", ()), *_hub(e))}


def _hub(entry: dict) -> tuple[str, ...]:
    """ORG/NAME of the source, without "instruct" and the like."""
    found = re.search(r"[\w.-]+/[\w.-]+", entry["source"])
    return () if found is None else (_plain_name(found[0].rstrip(".:")),)


def _plain_name(name: str) -> str:
    lower = name.strip().lower().replace("_", "-")
    return re.sub(r"(-(instruct|it|base|chat|hf))(-\d{4})?$", "", lower)


def names() -> tuple[str, ...]:
    """Names without their aliases, in the file's order."""
    return tuple(dict.fromkeys(entry["name"] for entry in _table().values()))


def geometry(name: str) -> CacheGeometry:
    """The geometry called `name`, or LAYERSxKVHEADSxDIM (60x4x128) for a plain one.

    The hub's names do too: google/gemma-3-27b-it. Case and the words "instruct", "it" and "base" at
    the end do not matter.

    Raises:
      TurboqError: an unknown name, with the nearest ones.
    """
    wanted = _plain_name(name)
    if shape := _SHAPE.fullmatch(wanted):
        return _plain(name, *map(int, shape.groups()))
    entry = _table().get(wanted) or _table().get(wanted.rpartition("/")[2])
    if entry is None:
        close = difflib.get_close_matches(wanted.rpartition("/")[2], _table(), n=6, cutoff=0.5)
        near = list(dict.fromkeys(_table()[found]["name"] for found in close))[:3]
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names())}"
        raise TurboqError(
            f"unknown geometry {name!r} ({hint}; or LAYERSxKVHEADSxDIM such as 60x4x128, "
            "or --model=PATH)"
        )
    found = from_config(entry["config"], entry["name"], source=entry["source"])
    note = "; ".join(text for text in (entry.get("note"), found.note) if text)
    return dataclasses.replace(
        found,
        parameters=entry.get("parameters"),
        active=entry.get("active"),
        experts=entry.get("experts"),
        note=note,
    )


def _plain(name: str, layers: int, kv_heads: int, dim: int) -> CacheGeometry:
    for what, value, high in (
        ("layers", layers, MAX_LAYERS), ("KV heads", kv_heads, MAX_HEADS), ("dim", dim, MAX_DIM),
    ):  # fmt: skip
        if not 1 <= value <= high:
            raise TurboqError(f"geometry {name!r}: {value} {what} must be 1..{high}")
    layer = CacheLayer(kind="full", kv_heads=kv_heads, k_dim=dim, v_dim=dim)
    return CacheGeometry(name=name, family="plain", layers=(layer,) * layers, source="its name")
