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
    """Every entry by each of its names."""
    text = (importlib.resources.files("turboq.what_fits") / "geometries.json").read_text(
        encoding="utf-8"
    )
    entries = json.loads(text)["geometries"]
    return {name: e for e in entries for name in (e["name"], *e.get("aliases", ()))}


def names() -> tuple[str, ...]:
    """Names without their aliases, in the file's order."""
    return tuple(dict.fromkeys(entry["name"] for entry in _table().values()))


def geometry(name: str) -> CacheGeometry:
    """The geometry called `name`, or LAYERSxKVHEADSxDIM (60x4x128) for a plain one.

    Case and the words "instruct", "it" and "base" at the end do not matter.

    Raises:
      TurboqError: an unknown name, with the nearest ones.
    """
    wanted = re.sub(r"-(instruct|it|base|chat)$", "", name.strip().lower().replace("_", "-"))
    if shape := _SHAPE.fullmatch(wanted):
        return _plain(name, *map(int, shape.groups()))
    entry = _table().get(wanted)
    if entry is None:
        near = difflib.get_close_matches(wanted, _table(), n=3, cutoff=0.5)
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
