"""Statistics on disk: one safetensors file per layer and a manifest that hashes them.

    statistics/manifest.json            what was captured, and name, size, SHA-256 of every file
    statistics/layer_000.safetensors    tensors "{k|v|q}.{field}", heads first (statistics.FIELDS)

Integer fields are stored in the narrowest of 8, 16, 32 or 64 bits that holds their values and are
64 bits wide again when loaded; nothing else is converted. The manifest is written last: a folder
without one is unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as st_numpy

from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq.numbers.rotation import Rotation
from turboq_calibrate.observe import statistics as st

MANIFEST = "manifest.json"
FOLDER = "statistics"


def narrow(a: np.ndarray) -> np.ndarray:
    """An integer array in the narrowest type that holds it."""
    low, high = int(a.min(initial=0)), int(a.max(initial=0))
    kinds = ("uint8", "uint16", "uint32") if low >= 0 else ("int8", "int16", "int32")
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return a.astype(kind)
    return a.astype(np.int64)


def to_bytes(sides: dict[str, st.Arrays]) -> bytes:
    """{side: {field: array}} as safetensors bytes; equal contents give equal bytes."""
    tensors = {}
    for side, arrays in sides.items():
        for name, value in arrays.items():
            packed = narrow(value) if value.dtype == np.int64 else value
            tensors[f"{side}.{name}"] = np.ascontiguousarray(packed)
    return st_numpy.save(tensors)


def from_bytes(raw: bytes, source: Path) -> dict[str, st.Arrays]:
    """Inverse of `to_bytes`.

    Raises:
      TurboqError: not a safetensors file, or a tensor that the table does not know.
    """
    try:
        tensors = st_numpy.load(raw)
    except (SafetensorError, ValueError) as error:
        raise TurboqError(f"statistics file {source} is damaged: {error}") from error
    sides: dict[str, st.Arrays] = {}
    for key, value in tensors.items():
        side, _, name = key.partition(".")
        if side not in st.SIDES or name not in st.BY_NAME:
            raise TurboqError(f"statistics file {source} holds an unknown tensor {key!r}")
        sides.setdefault(side, {})[name] = value.astype(st.BY_NAME[name].dtype)
    return sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the folder holds. `inputs` identifies the capture (`capture.capture_inputs`)."""

    version: int
    inputs: dict[str, Any]
    tokens: int  # counted per head: skipped first tokens are not in it
    bins: dict[str, Any]
    layers: tuple[dict[str, Any], ...]  # index, path, file, bytes, sha256, heads and dims

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def bins_description() -> dict[str, Any]:
    """The three families of bins, as the manifest records them."""
    return {
        "channels": dataclasses.asdict(st.CHANNEL_BINS),
        "norms": dataclasses.asdict(st.NORM_BINS),
        "codes": dataclasses.asdict(st.CODE_BINS),
    }


def layer_file(index: int) -> str:
    return f"layer_{index:03d}.safetensors"


def describe_layer(folder: Path, index: int, path: str, layer: st.LayerStatistics) -> dict:
    """The manifest's entry for a layer file that is on disk."""
    raw = (folder / layer_file(index)).read_bytes()
    return {
        "index": index,
        "path": path,
        "file": layer_file(index),
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        **{side: [getattr(layer, side).heads, getattr(layer, side).dim] for side in st.SIDES},
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST, manifest.to_json())


class Statistics:
    """Statistics of a model: the manifest at once, each layer read and checked when asked for.

    `statistics.layers[i].k` and `len(statistics.layers)` work; a layer is not kept, so memory stays
    at the layers in use.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @property
    def layers(self) -> Statistics:
        return self

    def __len__(self) -> int:
        return len(self.manifest.layers)

    def __getitem__(self, index: int) -> st.LayerStatistics:
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} must be within 0..{len(self) - 1}")
        entry = self.manifest.layers[index]
        path = self.folder / entry["file"]
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise TurboqError(f"cannot read statistics {path}: {error.strerror}") from error
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise TurboqError(
                f"statistics file {path} is damaged: its SHA-256 is not the manifest's"
            )
        return layer_from_sides(from_bytes(raw, path), path, self.manifest.inputs["recipe"])


def layer_from_sides(
    sides: dict[str, st.Arrays], source: Path, recipe: dict[str, Any]
) -> st.LayerStatistics:
    """Checks fields and shapes of all three sides.

    Raises:
      TurboqError: a field is missing or has another shape than the table says.
    """
    for side in st.SIDES:
        arrays = sides.get(side, {})
        wanted = {f.name for f in st.fields_of(side)}
        if arrays.keys() != wanted:
            raise TurboqError(
                f"statistics {source}: side {side} has fields {sorted(arrays)}, "
                f"not {sorted(wanted)}"
            )
        heads, dim = arrays["sum"].shape if arrays["sum"].ndim == 2 else (0, 0)
        for f in st.fields_of(side):
            if arrays[f.name].shape != st.shape_of(f, heads, dim):
                raise TurboqError(
                    f"statistics {source}: {side}.{f.name} has shape "
                    f"{list(arrays[f.name].shape)}, not {list(st.shape_of(f, heads, dim))}"
                )
    rotations = {
        side: Rotation(
            kind=recipe["rotation"], dim=sides[side]["sum"].shape[1], seed=recipe["seed"]
        )
        for side in ("k", "v")
    }
    return st.LayerStatistics(
        **{
            side: st.SideStatistics(arrays=sides[side], rotation=rotations.get(side))
            for side in st.SIDES
        }
    )


def load_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """Opens the statistics in `folder` (or in its subfolder "statistics").

    Raises:
      TurboqError: there are none, they are unfinished, of another version or damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() and (folder / FOLDER / MANIFEST).exists():
        folder = folder / FOLDER
    path = folder / MANIFEST
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise TurboqError(
            f"no finished statistics in {folder}: run `turboq calibrate` ({error.strerror})"
        ) from error
    except ValueError as error:
        raise TurboqError(f"statistics manifest {path} is damaged: {error}") from error
    names = {f.name for f in dataclasses.fields(Manifest)}
    if not isinstance(table, dict) or table.keys() != names:
        raise TurboqError(
            f"statistics manifest {path} must have exactly the fields {sorted(names)}"
        )
    if table["version"] != st.VERSION:
        raise TurboqError(
            f"statistics in {folder} have version {table['version']}, this turboq reads "
            f"{st.VERSION}: capture again into a new folder"
        )
    if table["bins"] != bins_description():
        raise TurboqError(f"statistics in {folder} were counted over other bins: capture again")
    table["layers"] = tuple(table["layers"])
    return Statistics(folder, Manifest(**table))
