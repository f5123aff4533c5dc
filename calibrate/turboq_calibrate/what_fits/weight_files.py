"""Bytes of a model's weights on disk: which files belong together, and whether all are there.

A checkpoint may lie beside copies of itself (`consolidated.safetensors`), and a split one is not
what its first file holds. What is counted is what a loader reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turboq.errors import TurboqError, quoted, shortened
from turboq.json_object import read_object
from turboq_calibrate.models import gguf_header
from turboq_calibrate.models.hf import INDEX, SINGLE, shard_path

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)")


class WeightFiles(NamedTuple):
    """`nbytes` of what `what` names, or None and in `what` why it is not known."""

    nbytes: int | None
    what: str


def of_folder(folder: Path) -> WeightFiles:
    """Those of a Hugging Face folder: named by its index, or the one file, or all of a series."""
    try:
        if (folder / INDEX).is_file():
            names = read_object(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise TurboqError(f"{INDEX} has no weight_map")
            shards = {shard_path(folder, name, file) for name, file in names.items()}
            return _sum(sorted(shards), f" that {INDEX} names")
        if (folder / SINGLE).is_file():
            return _sum([folder / SINGLE])
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            return WeightFiles(None, "no weight files were seen")
        if len(found) > 1 or PART.fullmatch(found[0].name):
            series = _series(found[0])
            if others := [path.name for path in found if path not in series]:
                raise TurboqError(
                    f"{quoted(others[0])} may be a copy of the same weights: without {INDEX} it is "
                    "not known which files belong together"
                )
            return _sum(series)
        return _sum(found)
    except TurboqError as error:
        return WeightFiles(None, str(error))


def of_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[Any]) -> WeightFiles:
    """The tensors of a GGUF file and, as `split.count` says, of its other parts."""
    own = sum(tensor.nbytes for tensor in tensors)
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return WeightFiles(own, f"the tensors of {path.name}")
    try:
        series = _series(path)
        if len(series) != count:
            raise TurboqError(f"{path.name} is one of {quoted(count)} parts by split.count")
        total = 0
        for number, part in enumerate(series):
            fields, held, _ = gguf_header.read(part)
            if (fields.get("split.no"), fields.get("split.count")) != (number, count):
                raise TurboqError(f"{part.name} is not part {number} (from 0) of {count}")
            total += sum(tensor.nbytes for tensor in held.values())
    except TurboqError as error:
        return WeightFiles(None, str(error))
    return WeightFiles(total, f"the tensors of all {count} parts of {path.name}")


def _series(path: Path) -> list[Path]:
    """All files of the series that a name such as m-00001-of-00003 is one of.

    Raises:
      TurboqError: it is none, or one of them is missing.
    """
    named = PART.fullmatch(path.name)
    if not named:
        raise TurboqError(
            f"{shortened(path.name)} is one of several files and not named NAME-00001-of-00002, by "
            "which the others are found"
        )
    stem, _, count, suffix = named.groups()
    paths = [
        path.with_name(f"{stem}-{number:05d}-of-{count}{suffix}")
        for number in range(1, int(count) + 1)
    ]
    for part in paths:
        if not part.is_file():
            raise TurboqError(f"{part.name} is missing")
    return paths


def _sum(paths: list[Path], which: str = "") -> WeightFiles:
    """Sizes of whole files, headers included."""
    for path in paths:
        if not path.is_file():
            raise TurboqError(f"{path.name} is missing")
    total = sum(path.stat().st_size for path in paths)
    return WeightFiles(total, paths[0].name if len(paths) == 1 else f"{len(paths)} files{which}")
