"""Statistics on disk: two safetensors files per layer and a manifest that hashes them.

    statistics/manifest.json            what was observed, and name, size, SHA-256 of every file
    statistics/layer_000.safetensors    tensors "SIDE.FIELD", heads first (statistics.FIELDS)
    statistics/tokens_000.safetensors   the reservoir's tokens in this layer (reservoir.Tokens)
    statistics/windows.safetensors      the windows [N, T] themselves and the text of each [N]

Integer fields are stored in the narrowest of 8, 16, 32 or 64 bits that holds their values and are
64 bits wide again when loaded; nothing else is converted. The manifest is written last: a folder
without one is unfinished.
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors import numpy as st_numpy

from turboq.errors import TurboqError, quoted, shortened
from turboq.files import atomic_write
from turboq.numbers.rope import Rope
from turboq.plan import ModelGeometry
from turboq.plan.document import to_json
from turboq.plan.errors import PlanError, shown
from turboq.plan.json_file import read_json
from turboq.plan.read import read
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.held_back import HeldBack
from turboq_calibrate.observe.layer_statistics import NO_TOKENS, LayerStatistics
from turboq_calibrate.observe.manifest import Contents
from turboq_calibrate.observe.reservoir import Tokens

MANIFEST = "manifest.json"
WINDOWS = "windows.safetensors"
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
    tensors: dict[str, np.ndarray] = {}
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
    tensors = _tensors(raw, source)
    sides: dict[str, st.Arrays] = {}
    for key, value in tensors.items():
        side, _, name = key.partition(".")
        if side not in st.SIDES or name not in st.BY_NAME:
            raise TurboqError(f"statistics file {source} holds an unknown tensor {quoted(key)}")
        sides.setdefault(side, {})[name] = value.astype(st.BY_NAME[name].dtype)
    return sides


def _tensors(raw: bytes, source: Path) -> dict[str, np.ndarray]:
    try:
        return st_numpy.load(raw)
    except (SafetensorError, ValueError) as error:
        raise TurboqError(f"statistics file {source} is damaged: {shortened(error)}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the folder holds, as JSON that `manifest.Contents` has checked."""

    version: int
    inputs: dict[str, Any]
    geometry: dict[str, Any]  # of the model, as plans hold it
    tokens: int  # counted per head: skipped first tokens are not in it
    bins: dict[str, Any]
    windows: dict[str, Any]  # file, bytes, sha256
    layers: tuple[dict[str, Any], ...]  # as `describe_layer` makes them

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def bins_description() -> dict[str, Any]:
    """The two families of bins, as the manifest records them."""
    return {
        "channels": dataclasses.asdict(st.CHANNEL_BINS),
        "norms": dataclasses.asdict(st.NORM_BINS),
    }


def layer_file(index: int) -> str:
    return f"layer_{index:03d}.safetensors"


def tokens_file(index: int) -> str:
    return f"tokens_{index:03d}.safetensors"


def describe_layer(
    folder: Path, index: int, path: str, layer: LayerStatistics, *, sampled: bool
) -> dict[str, Any]:
    """The manifest's entry for a layer whose files are on disk: files, rope, heads and dims."""
    return {
        "index": index,
        "path": path,
        **_describe_file(folder / layer_file(index)),
        "tokens": _describe_file(folder / tokens_file(index)) if sampled else None,
        "rope": None if layer.rotary is None else to_json(layer.rotary),
        **{name: [side.heads, side.dim] for name, side in layer.sides.items()},
    }


def _describe_file(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return {"file": path.name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def write_windows(
    folder: Path,
    tokens: Int[np.ndarray, "N T"],
    text: Int[np.ndarray, "N"],
    held_back: HeldBack,
) -> None:
    """All windows of the run, a shard's too, and those held back."""
    arrays = {"tokens": tokens.astype(np.int32), "text": text.astype(np.int32)}
    atomic_write(folder / WINDOWS, st_numpy.save(arrays | held_back.arrays()))


def write_manifest(
    folder: Path,
    inputs: dict[str, Any],
    geometry: ModelGeometry,
    tokens: int,
    layers: list[dict[str, Any]],
) -> None:
    """Writes the manifest, which makes the folder complete."""
    manifest = Manifest(
        version=st.VERSION,
        inputs=inputs,
        geometry=to_json(geometry),
        tokens=tokens,
        bins=bins_description(),
        windows=_describe_file(folder / WINDOWS),
        layers=tuple(layers),
    )
    atomic_write(folder / MANIFEST, manifest.to_json())


class Statistics:
    """Statistics of a model: the manifest at once, each file read and checked when asked for.

    `statistics.layers[i].k` and `len(statistics.layers)` work; a layer is not kept, so memory stays
    at the layers in use.

    Raises:
      TurboqError: asked for a file that is missing or damaged.

    Examples:
      >>> import turboq_calibrate as tc
      >>> statistics = tc.load_statistics("run")  # what `calibrate` wrote
      >>> statistics.texts
      ('topics:calibration', 'source:calibration')
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @property
    def layers(self) -> Statistics:
        """Itself: the statistics of layer i are `layers[i]`, read when asked for."""
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts, in the order of `Observed.text`."""
        return tuple(text["name"] for text in self.manifest.inputs["text"]["texts"])

    @property
    def weights(self) -> Float[np.ndarray, "X"]:
        """What every text counts for in a mean over texts; their sum is 1."""
        each = [text.get("weight", 1.0) for text in self.manifest.inputs["text"]["texts"]]
        return np.array(each) / sum(each)

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of everything else."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    @property
    def windows(self) -> Int[np.ndarray, "N T"]:
        """The windows that were observed (of a shard: those of the whole run)."""
        return self._windows["tokens"]

    @property
    def window_texts(self) -> Int[np.ndarray, "N"]:
        """Which of `texts` each window is from."""
        return self._windows["text"]

    @property
    def held_back(self) -> HeldBack:
        """Windows to check a plan on, by the number of their text."""
        return HeldBack.of_arrays(self._windows)

    @functools.cached_property
    def geometry(self) -> ModelGeometry:
        """Of the model that was observed: a plan needs no model for it."""
        return read(ModelGeometry, self.manifest.geometry, "geometry", {})

    @functools.cached_property
    def _windows(self) -> dict[str, np.ndarray]:
        raw, path = self._checked(self.manifest.windows)
        arrays, texts = _tensors(raw, path), self.manifest.inputs["text"]
        shapes = {"tokens": (texts["windows"], texts["window"]), "text": (texts["windows"],)}
        for name, x in sorted(arrays.items()):
            if x.dtype != np.int32 or x.shape != shapes.get(name, x.shape):
                raise TurboqError(f"statistics file {path}: {name} is {x.dtype}{list(x.shape)}")
        if missing := sorted(shapes.keys() - arrays.keys()):
            raise TurboqError(f"statistics file {path} has no {missing[0]!r}")
        if not np.all((arrays["text"] >= 0) & (arrays["text"] < len(texts["texts"]))):
            raise TurboqError(f"statistics file {path}: a window is of no text")
        return arrays

    def __len__(self) -> int:
        return len(self.manifest.layers)

    def __getitem__(self, index: int) -> LayerStatistics:
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} must be within 0..{len(self) - 1}")
        entry = self.manifest.layers[index]
        source = self.folder / entry["file"]
        layer = layer_from_sides(
            from_bytes(*self._checked(entry)), source, self._rope(entry["rope"]),
            None if entry["tokens"] is None else functools.partial(self.tokens, index),
        )  # fmt: skip
        for name, side in layer.sides.items():
            if [side.heads, side.dim] != entry[name]:
                raise TurboqError(
                    f"statistics {source}: side {name} has {side.heads} heads of {side.dim}, its"
                    f" manifest says {entry[name]}"
                )
        return layer

    def _rope(self, table: dict[str, Any] | None) -> Rope | None:
        return None if table is None else read(Rope, table, "rope", {})

    def tokens(self, index: int) -> Tokens:
        """The sampled tokens of a layer.

        Raises:
          TurboqError: there are none, or their file is damaged.
        """
        layer = self.manifest.layers[index]
        if layer["tokens"] is None:
            raise TurboqError(NO_TOKENS)
        raw, source = self._checked(layer["tokens"])
        return Tokens.from_bytes(raw, source, k=tuple(layer["k"]), v=tuple(layer["v"]))

    def _checked(self, entry: dict[str, Any]) -> tuple[bytes, Path]:
        path = self.folder / entry["file"]
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise TurboqError(f"cannot read statistics {path}: {error.strerror}") from error
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise TurboqError(
                f"statistics file {path} is damaged: its SHA-256 is not the manifest's"
            )
        return raw, path


def layer_from_sides(
    sides: dict[str, st.Arrays],
    source: Path,
    rotary: Rope | None,
    read_tokens: Callable[[], Tokens] | None = None,
) -> LayerStatistics:
    """Checks fields and shapes of all sides that a layer with this rotary embedding has.

    Raises:
      TurboqError: a field is missing or has another shape than the table says.
    """
    expected = [s for s in st.SIDES if rotary is not None or not s.endswith("_before")]
    if extra := sorted(sides.keys() - set(expected)):
        raise TurboqError(f"statistics {source}: side {extra[0]} in a layer without RoPE")
    for side in expected:
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
    return LayerStatistics(
        sides={side: st.SideStatistics(arrays=sides[side]) for side in expected},
        rotary=rotary,
        read_tokens=read_tokens,
    )


def load_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """Opens the statistics in `folder` (or in its subfolder "statistics").

    Raises:
      TurboqError: there are none, they are unfinished, of another version or damaged.

    Examples:
      >>> import turboq_calibrate as tc
      >>> statistics = tc.load_statistics("run")  # what `calibrate` wrote
      >>> statistics.layers[0].k is not None
      True
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() and (folder / FOLDER / MANIFEST).exists():
        folder = folder / FOLDER
    path = folder / MANIFEST
    if not path.exists():
        raise TurboqError(f"no finished statistics in {folder}: run `turboq calibrate`")
    again = "run `turboq calibrate --model=MODEL --out=NEW_FOLDER` again"

    ours_bins = bins_description()

    def ours(table: Any) -> None:
        if not isinstance(table, dict):
            return
        found = cast(dict[str, Any], table)
        if found.get("version", st.VERSION) != st.VERSION:
            raise PlanError("version", f"{shown(found['version'])}, this turboq reads {st.VERSION}")
        if found.get("bins", ours_bins) != ours_bins:
            raise PlanError("bins", "counted over other bins")

    table = read_json(path, Contents, otherwise=again, first=ours)
    kept: dict[str, Any] = {f.name: table[f.name] for f in dataclasses.fields(Manifest)}
    kept["layers"] = tuple(table["layers"])
    return Statistics(folder, Manifest(**kept))
