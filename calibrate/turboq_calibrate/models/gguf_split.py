"""The parts of a split GGUF file (NAME-00001-of-00003.gguf), as llama.cpp writes them.

The first one describes the model, all say which one they are (`split.no`, from 0) of how many
(`split.count`), and how many tensors they hold together (`split.tensors.count`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turboq.errors import TurboqError, quoted, shortened
from turboq_calibrate.models import gguf_header
from turboq_calibrate.models.gguf_header import TensorInfo

NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)")
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


class Part(NamedTuple):
    """One file: where it lies, and what `gguf_header.read` finds in it."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray


def read(path: Path) -> list[Part]:
    """All parts of the model that `path` is one of, in order; one if it is whole.

    Raises:
      TurboqError: a part that is missing, damaged, or of another split.
    """
    return with_others(Part(path, *gguf_header.read(path)))


def with_others(own: Part) -> list[Part]:
    """`read` where one part has been read."""
    count = own.metadata.get(COUNT, 1)
    if count in (0, 1):
        return [own]
    paths = series(own.path)
    if len(paths) != count:
        raise TurboqError(f"{own.path} is one of {quoted(count)} parts by {COUNT}")
    parts = [own if p == own.path else Part(p, *gguf_header.read(p)) for p in paths]
    for number, part in enumerate(parts):
        if (part.metadata.get(NUMBER), part.metadata.get(COUNT)) != (number, count):
            raise TurboqError(f"{part.path} is not part {number} (from 0) of {count}")
    total = sum(len(part.tensors) for part in parts)
    seen: set[str] = set()
    for part in parts:
        if part.metadata.get(TENSORS, total) != total:
            raise TurboqError(
                f"{part.path} says {TENSORS}={quoted(part.metadata[TENSORS])}, but the "
                f"{count} parts hold {total}: one of them is of another split"
            )
        if twice := sorted(seen & set(part.tensors)):
            raise TurboqError(
                f"{part.path}: tensor {shortened(twice[0])} is in another part too: one of "
                "them is of another split"
            )
        seen |= set(part.tensors)
    return parts


def series(path: Path) -> list[Path]:
    """All files of the series that a name such as m-00001-of-00003 is one of.

    Raises:
      TurboqError: it is none, or one of them is missing.
    """
    named = NAME.fullmatch(path.name)
    if not named or not 1 <= int(named[2]) <= int(named[3]):
        raise TurboqError(
            f"{path} is one of several files and not named NAME-00001-of-00002, by which the "
            "others are found"
        )
    stem, _, count, suffix = named.groups()
    paths = [
        path.with_name(f"{stem}-{number:05d}-of-{count}{suffix}")
        for number in range(1, int(count) + 1)
    ]
    for part in paths:
        if not part.is_file():
            raise TurboqError(f"{part} is missing: all parts of a model lie in one folder")
    return paths
