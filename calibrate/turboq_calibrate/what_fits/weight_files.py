"""Bytes of a model's weights on disk: which files belong together, and whether all are there.

A checkpoint may lie beside copies of itself (`consolidated.safetensors`), and a split one is not
what its first file holds. What is counted is what a loader reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from turboq.errors import TurboqError, quoted
from turboq.json_object import read_object
from turboq_calibrate.models import gguf_split
from turboq_calibrate.models.hf import INDEX, SINGLE, shard_path


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
        if len(found) > 1 or gguf_split.NAME.fullmatch(found[0].name):
            series = gguf_split.series(found[0])
            if others := [path.name for path in found if path not in series]:
                raise TurboqError(
                    f"{quoted(others[0])} may be a copy of the same weights: without {INDEX} it is "
                    "not known which files belong together"
                )
            return _sum(series)
        return _sum(found)
    except TurboqError as error:
        return WeightFiles(None, str(error))


def of_gguf(own: gguf_split.Part) -> WeightFiles:
    """The tensors of a GGUF file and, as `split.count` says, of its other parts."""
    try:
        parts = gguf_split.with_others(own)
    except TurboqError as error:
        return WeightFiles(None, str(error))
    total = sum(tensor.nbytes for part in parts for tensor in part.tensors.values())
    if len(parts) == 1:
        return WeightFiles(total, f"the tensors of {own.path.name}")
    return WeightFiles(total, f"the tensors of all {len(parts)} parts of {own.path.name}")


def _sum(paths: list[Path], which: str = "") -> WeightFiles:
    """Sizes of whole files, headers included."""
    for path in paths:
        if not path.is_file():
            raise TurboqError(f"{path.name} is missing")
    total = sum(path.stat().st_size for path in paths)
    return WeightFiles(total, paths[0].name if len(paths) == 1 else f"{len(paths)} files{which}")
