"""The cache geometry of a model on disk: a Hugging Face folder or config.json, or a .gguf header.

Needs no weights that this project can run, and often no weights at all; those that are there are
only measured.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from turboq.errors import TurboqError
from turboq.hub_cache import model_name
from turboq.what_fits.gguf_metadata import from_metadata
from turboq.what_fits.hf_config import from_config
from turboq.what_fits.layers import CacheGeometry
from turboq_calibrate.models import hub
from turboq_calibrate.models.config import read_config
from turboq_calibrate.what_fits import weight_files

MAX_CONFIG_BYTES = 16 << 20  # the largest real ones have a few hundred kB


def read_geometry(path: str | os.PathLike[str]) -> CacheGeometry:
    """The cache geometry at `path`: a folder with config.json, a .json or .gguf file, or a name of
    `hub.local`.

    Raises:
      TurboqError: absent, unreadable, truncated, or a field that is nonsensical or not understood.
    """
    path = Path(hub.local(path, hub.CONFIG))
    if not path.exists():
        raise TurboqError(f"model {path} does not exist")
    if path.is_dir():
        found = _from_json(path / "config.json", model_name(path))
        return _with(found, weight_files.of_folder(path))
    if path.suffix == ".json":
        return _from_json(path, model_name(path.parent))
    if path.suffix == ".gguf":
        return _from_gguf(path)
    raise TurboqError(f"model {path} must be a Hugging Face folder, a config.json or a .gguf file")


def _from_json(path: Path, name: str) -> CacheGeometry:
    if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
        raise TurboqError(f"{path} has {path.stat().st_size} bytes: not a configuration")
    return from_config(read_config(path), name, source=str(path))


def _from_gguf(path: Path) -> CacheGeometry:
    from turboq_calibrate.models import gguf_header, gguf_split

    part = gguf_split.Part(path, *gguf_header.read(path))
    if part.metadata.get(gguf_split.NUMBER):  # the first part describes the model
        path = gguf_split.series(path)[0]
        part = gguf_split.Part(path, *gguf_header.read(path))
    found = from_metadata(part.metadata, path.stem, source=str(path))
    return _with(found, weight_files.of_gguf(part))


def _with(found: CacheGeometry, files: weight_files.WeightFiles) -> CacheGeometry:
    return dataclasses.replace(found, weights_bytes=files.nbytes, weights_from=files.what)
