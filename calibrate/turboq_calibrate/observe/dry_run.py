"""Dry run of a capture: geometry, memory, disk and an ETA from one timed layer. Writes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from turboq.errors import TurboqError
from turboq.numbers.rotation import Rotation
from turboq_calibrate.models import decoder
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import sweeps
from turboq_calibrate.observe.recipe import CaptureRecipe, check_sizes
from turboq_calibrate.observe.reduce import to_host
from turboq_calibrate.observe.texts import Windows
from turboq_calibrate.run.peak_memory import nbytes, peak_rss
from turboq_calibrate.run.progress import clock

TIMED_PASSES = 2  # the first touches memory for the first time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a capture will need. Bytes and seconds; `seconds` leaves out checkpoints and loading."""

    geometry: tuple[str, ...]
    windows: int
    window: int
    chunks: int
    layer_bytes: int
    chunk_bytes: int
    temporary_bytes: int
    statistics_bytes: int
    peak_rss_bytes: int
    hidden_disk_bytes: int
    statistics_disk_bytes: int
    free_disk_bytes: int
    compile_seconds: float
    chunk_seconds: float
    seconds: float

    def lines(self) -> list[str]:
        """The report, one line each."""
        memory = self.layer_bytes + self.chunk_bytes + self.temporary_bytes + self.statistics_bytes
        return [
            *self.geometry,
            f"text: {self.windows} windows of {self.window} tokens, {self.chunks} chunks per sweep",
            f"memory: {_mib(memory)} = layer weights {_mib(self.layer_bytes)} + chunk "
            f"{_mib(self.chunk_bytes)} + temporary {_mib(self.temporary_bytes)} + statistics "
            f"{_mib(self.statistics_bytes)}; this process peaked at {_mib(self.peak_rss_bytes)}",
            f"disk: hidden states {_mib(self.hidden_disk_bytes)} while running, statistics at most "
            f"{_mib(self.statistics_disk_bytes)}; {_mib(self.free_disk_bytes)} free",
            f"time: about {clock(self.seconds)} = compile {self.compile_seconds:.1f} s + "
            f"{self.chunk_seconds:.2f} s per layer and chunk (timed on layer 0); checkpoints not "
            f"included",
        ]


def dry_run(
    model: Model,
    windows: Windows,
    out_dir: str | os.PathLike[str],
    recipe: CaptureRecipe | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Estimate:
    """Runs layer 0 on the first chunk, prints what the whole capture needs, and returns it.

    Raises:
      TurboqError: the recipe does not fit the model and text, or the disk is too small.
    """
    recipe = CaptureRecipe() if recipe is None else recipe
    check_sizes(model, windows, recipe)
    count, length = windows.tokens.shape
    chunks = -(-count // recipe.windows_per_chunk)
    specs = model.spec.layers
    hidden = count * length * model.spec.hidden * 4
    estimate = Estimate(
        geometry=_geometry(model),
        windows=count,
        window=length,
        chunks=chunks,
        statistics_bytes=max(_statistics_bytes(s) for s in specs),
        hidden_disk_bytes=min(2, len(specs)) * hidden,
        statistics_disk_bytes=sum(_statistics_bytes(s) for s in specs),
        free_disk_bytes=shutil.disk_usage(_existing(Path(out_dir))).free,
        **_timed(model, windows, recipe, chunks),
    )
    for line in estimate.lines():
        log(line)
    needed = estimate.hidden_disk_bytes + estimate.statistics_disk_bytes
    if needed > estimate.free_disk_bytes:
        raise TurboqError(f"{out_dir} needs up to {_mib(needed)} of disk, which is not free")
    return estimate


def _timed(model: Model, windows: Windows, recipe: CaptureRecipe, chunks: int) -> dict:
    spec, params = model.spec.layers[0], model.layer(0)
    tokens = jnp.asarray(windows.tokens[: recipe.windows_per_chunk])
    x = embed_tokens(model, tokens)
    positions = decoder.default_positions(tokens)
    center = {
        "k": np.zeros((spec.kv_heads, spec.head_dim), np.float32),
        "v": np.zeros((spec.kv_heads, spec.v_head_dim), np.float32),
    }
    scale = {s: np.ones(spec.kv_heads, np.float32) for s in center}
    rotations = tuple(
        Rotation(kind=recipe.rotation, dim=c.shape[1], seed=recipe.seed) for c in center.values()
    )
    start = time.monotonic()
    first = sweeps.moments_and_output.lower(spec, params, x, positions, skip=recipe.skip).compile()
    second = sweeps.codes.lower(
        spec, params, x, positions, center, scale, skip=recipe.skip, rotations=rotations
    ).compile()
    compiled = time.monotonic() - start
    passed, alive = 0.0, 0
    for _ in range(TIMED_PASSES):
        start = time.monotonic()
        y, moments = first(params, x, positions)
        codes = second(params, x, positions, center, scale)
        for side in jax.device_get(moments).values():
            side.pop("finite")
            to_host(side)
        jax.block_until_ready((y, codes))
        passed = time.monotonic() - start
        alive = nbytes(x, y, moments, codes)
    analysis = first.memory_analysis()
    kinds = len(set(model.spec.layers))
    return {
        "layer_bytes": nbytes(params),
        "chunk_bytes": alive,
        "temporary_bytes": int(analysis.temp_size_in_bytes) if analysis else 0,
        "peak_rss_bytes": peak_rss(),
        "compile_seconds": kinds * compiled,
        "chunk_seconds": passed,
        "seconds": kinds * compiled + passed * chunks * len(model.spec.layers),
    }


def _geometry(model: Model) -> tuple[str, ...]:
    spec = model.spec
    lines = [
        f"model: {spec.name} ({spec.family}), {len(spec.layers)} layers, hidden {spec.hidden}, "
        f"vocabulary {spec.vocab}, context {spec.context}"
    ]
    for layer, times in Counter(spec.layers).items():
        window = "" if layer.window is None else f", window {layer.window}"
        lines.append(
            f"  {times} x {layer.heads} query heads, {layer.kv_heads} KV heads, head dim "
            f"{layer.head_dim} (V {layer.v_head_dim}){window}"
        )
    return tuple(lines)


def _statistics_bytes(spec) -> int:
    """Bytes of all fields of one layer as they are in memory."""
    sizes = {
        "k": (spec.kv_heads, spec.head_dim),
        "v": (spec.kv_heads, spec.v_head_dim),
        "q": (spec.heads, spec.head_dim),
    }
    return sum(
        int(np.prod(st.shape_of(f, *sizes[side]))) * np.dtype(f.dtype).itemsize
        for side in st.SIDES
        for f in st.fields_of(side)
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
