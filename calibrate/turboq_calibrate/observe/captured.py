"""Statistics of a model that transformers ran (`hf.capture`): the same files as of any other.

The request holds the windows and the numbers that labels are drawn with, so that both ways see the
same text and draw the same labels. Keys are taken as attention sees them: nothing is known of a
rotary embedding, and plans store such keys as they come (`rope_layout` "none").
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as st_numpy

from turboq.errors import TurboqError, quoted
from turboq.files import atomic_write, make_folder
from turboq.plan import LayerGeometry, ModelGeometry
from turboq.plan.json_file import read_json
from turboq_calibrate.models.config import read_config
from turboq_calibrate.models.hf import open_safetensors, weight_files
from turboq_calibrate.models.model import fingerprint_of
from turboq_calibrate.models.tokenizer import Tokenizer, from_folder
from turboq_calibrate.observe import passes, reduce, reservoir
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.recipe import ObserveRecipe, observe_inputs
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import Windows

# As `hf.capture` has them, which runs where this package may not be installed.
VERSION = 1
REQUEST, CAPTURE = "request.safetensors", "capture.json"
PROGRAM = Path(__file__).parents[1] / "hf" / "capture.py"

_side = jax.jit(reduce.side, static_argnums=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What is known of a model that turboq itself need not run."""

    folder: Path
    family: str
    name: str
    context: int
    vocab: int

    @property
    def tokenizer(self) -> Tokenizer:
        return from_folder(self.folder)

    @property
    def identity(self) -> dict[str, str]:
        """As a manifest has it. Hashes the weight files."""
        fingerprint = fingerprint_of(weight_files(self.folder))
        return {
            "fingerprint": fingerprint, "family": self.family, "name": self.name,
            "dtype": "float32",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One layer, as `hf.capture.describe` says it."""

    index: int
    path: str
    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None
    borrows_cache_of: int | None
    latent: bool = dataclasses.field(default=False, metadata={"optional": True})

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Heads and dim of every side."""
        return {
            "k": (self.kv_heads, self.k_dim), "v": (self.kv_heads, self.v_dim),
            "q": (self.q_heads, self.k_dim),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """`capture.json`."""

    version: int
    request_sha256: str
    family: str
    layers: tuple[Seen, ...]
    torch: str
    transformers: str

    def __post_init__(self):
        if self.version != VERSION:
            raise ValueError(f"version={self.version}, this turboq reads {VERSION}")


def source_of(folder: str | os.PathLike[str]) -> Source:
    """A Hugging Face folder of any family.

    Raises:
      TurboqError: no configuration, or one without a vocabulary or context.
    """
    path = Path(folder)
    config = read_config(path / "config.json")
    inside = config.get("text_config")
    text = inside if isinstance(inside, dict) else config
    numbers = {}
    for key in ("vocab_size", "max_position_embeddings"):
        value = text.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TurboqError(f"{path}/config.json: {key}={quoted(value)} must be a whole number")
        numbers[key] = value
    family = text.get("model_type") or config.get("model_type")
    return Source(
        folder=path, family=str(family), name=path.resolve().name,
        context=numbers["max_position_embeddings"], vocab=numbers["vocab_size"],
    )  # fmt: skip


def request(folder: str | os.PathLike[str], windows: Windows, recipe: ObserveRecipe) -> Path:
    """Writes what `hf.capture` is to run; one that is there already must be the same.

    Raises:
      TurboqError: the folder holds another request.
    """
    path = make_folder(folder) / REQUEST
    count, length = windows.tokens.shape
    numbers = jnp.arange(count, dtype=jnp.uint32)
    arrays = {
        "tokens": windows.tokens.astype(np.int32),
        "uniforms": np.asarray(passes.uniforms(recipe.seed, numbers, length)),
    }
    raw = st_numpy.save(arrays, {"windows_per_chunk": str(recipe.windows_per_chunk)})
    if not path.exists():
        atomic_write(path, raw)
    elif path.read_bytes() != raw:
        raise TurboqError(
            f"{path} is of other text or another recipe: choose another folder, or remove this one"
        )
    return path


def is_captured(folder: str | os.PathLike[str]) -> bool:
    """Whether `hf.capture` has finished."""
    return (Path(folder) / CAPTURE).exists()


def observe_captured(
    folder: str | os.PathLike[str],
    source: Source,
    windows: Windows,
    out_dir: str | os.PathLike[str],
    recipe: ObserveRecipe,
    *,
    log: Callable[[str], None] = print,
) -> Statistics:
    """Writes statistics of what was captured into `out_dir`, a layer at a time.

    Raises:
      TurboqError: a capture of another request, a missing or misshapen array, NaN or infinity;
        `out_dir` holds other statistics.
    """
    raw, out = Path(folder), Path(out_dir)
    path = request(raw, windows, recipe)
    table = read_json(raw / CAPTURE, Capture, otherwise=f"remove {raw} and capture again")
    seen = [Seen(**layer) for layer in table["layers"]]
    if table["request_sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
        raise TurboqError(f"{raw / CAPTURE} is of another request: run hf/capture.py again")
    inputs = observe_inputs(source.identity, windows, recipe)
    statistics = make_folder(out / files.FOLDER)
    if (statistics / files.MANIFEST).exists():
        raise TurboqError(f"{out} holds statistics already: choose another folder")
    members = reservoir.choose(
        *windows.tokens.shape, count=recipe.reservoir, skip=recipe.skip, seed=recipe.seed
    )
    for layer in seen:
        _layer(raw, statistics, layer, windows, recipe, members)
    files.write_windows(statistics, windows.tokens, windows.text, windows.held_back)
    entries = [_described(statistics, layer, recipe) for layer in seen]
    counted = len(windows.tokens) * (windows.tokens.shape[1] - recipe.skip)
    geometry = ModelGeometry(
        fingerprint=inputs["model"]["fingerprint"], family=source.family, name=source.name,
        layers=tuple(LayerGeometry(**vars(layer), rope_layout="none") for layer in seen),
    )  # fmt: skip
    files.write_manifest(statistics, inputs, geometry, counted, entries)
    log(
        f"statistics of {windows.tokens.size:,} tokens through {len(seen)} layers, captured by "
        f"transformers {table['transformers']}"
    )
    return load_statistics(out_dir)


def _layer(
    raw: Path, statistics: Path, layer: Seen, windows: Windows, recipe: ObserveRecipe, members
) -> None:
    """The two files of one layer."""
    tree = {side: st.zeros(side, *size) for side, size in layer.sizes.items()}
    rows = []
    count = len(windows.tokens)
    starts = range(0, count if layer.kv_heads else 0, recipe.windows_per_chunk)
    for c, start in enumerate(starts):
        stop = min(start + recipe.windows_per_chunk, count)
        found = _read(raw / f"chunk_{c:03d}" / f"layer_{layer.index:03d}.safetensors", layer, (
            stop - start, windows.tokens.shape[1]))  # fmt: skip
        for side in tree:
            g = found.get(f"g_{side}")
            x, g = (None if y is None else y[:, recipe.skip :] for y in (found[side], g))
            new = reduce.to_host(jax.device_get(_side(side, x, g)))
            tree[side] = st.merge_arrays(tree[side], new)
        own = members.take(members.of(start, stop))
        at = (own.window - start, own.position)
        parts = [found[name][at].reshape(len(own), -1) for name in ("k", "v", "g_k", "g_v")]
        rows.append(np.concatenate(parts, axis=1))
    if recipe.reservoir:
        width = 2 * layer.kv_heads * (layer.k_dim + layer.v_dim)
        kept = np.concatenate(rows) if rows else np.zeros((len(members), width), np.float32)
        tokens = reservoir.Tokens.from_rows(
            kept, members, windows.text[members.window], layer.sizes["k"], layer.sizes["v"]
        )
        atomic_write(statistics / files.tokens_file(layer.index), tokens.to_bytes())
    atomic_write(statistics / files.layer_file(layer.index), files.to_bytes(tree))


def _read(path: Path, layer: Seen, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise TurboqError(f"{path} is missing: run hf/capture.py again")
    sizes = layer.sizes | {f"g_{side}": layer.sizes[side] for side in ("k", "v")}
    out = {}
    with open_safetensors(path) as f:
        for name, size in sizes.items():
            if name not in f.keys():  # noqa: SIM118  (not a dict)
                raise TurboqError(f"{path}: array {name} is missing: run hf/capture.py again")
            out[name] = f.get_tensor(name)
            if out[name].shape != (*shape, *size) or out[name].dtype != np.float32:
                raise TurboqError(
                    f"{path}: {name} is {out[name].dtype}{list(out[name].shape)}, not "
                    f"float32{[*shape, *size]}"
                )
            if not np.isfinite(out[name]).all():
                raise TurboqError(
                    f"NaN or infinity in {name} of layer {layer.index} ({layer.path}): the weights "
                    "or the text drive this out of float32"
                )
    return out


def _described(statistics: Path, layer: Seen, recipe: ObserveRecipe) -> dict[str, Any]:
    path = statistics / files.layer_file(layer.index)
    found = files.layer_from_sides(files.from_bytes(path.read_bytes(), path), path, None)
    return files.describe_layer(
        statistics, layer.index, layer.path, found, sampled=recipe.reservoir > 0
    )
