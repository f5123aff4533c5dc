"""Dry run: geometry, memory, disk and an ETA from one timed layer and head. Writes nothing."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turboq.errors import TurboqError
from turboq_calibrate.models import decoder
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.models.spec import LayerSpec, Mamba
from turboq_calibrate.models.streamed_experts import Streamed, group_bytes
from turboq_calibrate.observe import passes
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.layer_statistics import sizes
from turboq_calibrate.observe.recipe import ObserveRecipe, check_sizes
from turboq_calibrate.observe.reduce import to_host
from turboq_calibrate.observe.texts import Windows
from turboq_calibrate.run.peak_memory import nbytes, peak_rss
from turboq_calibrate.run.progress import clock

FILE_HEADER = 8192  # bytes, at most, before the tensors of one file
TIMED_PASSES = 2  # the first touches memory for the first time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need. Bytes and seconds; `seconds` leaves out checkpoints and loading."""

    geometry: tuple[str, ...]
    windows: int
    window: int
    chunks: int
    weight_bytes: int
    chunk_bytes: int
    temporary_bytes: int
    statistics_bytes: int
    peak_rss_bytes: int
    hidden_disk_bytes: int
    statistics_disk_bytes: int
    free_disk_bytes: int
    compile_seconds: float
    chunk_seconds: float
    head_seconds: float
    seconds: float

    def lines(self) -> list[str]:
        """The report, one line each."""
        memory = self.weight_bytes + self.chunk_bytes + self.temporary_bytes + self.statistics_bytes
        return [
            *self.geometry,
            f"text: {self.windows} windows of {self.window} tokens, {self.chunks} chunks",
            f"memory: {_mib(memory)} = weights of a layer or the head {_mib(self.weight_bytes)} + "
            f"chunk {_mib(self.chunk_bytes)} + temporary {_mib(self.temporary_bytes)} + statistics "
            f"{_mib(self.statistics_bytes)}; this process peaked at {_mib(self.peak_rss_bytes)}",
            f"disk: hidden states and gradients {_mib(self.hidden_disk_bytes)} while running, "
            f"statistics at most {_mib(self.statistics_disk_bytes)}; "
            f"{_mib(self.free_disk_bytes)} free",
            f"time: about {clock(self.seconds)} = compile {self.compile_seconds:.1f} s + "
            f"{self.chunk_seconds:.2f} s per layer and chunk, both ways (timed on layer 0), + "
            f"{self.head_seconds:.2f} s per chunk for the head; checkpoints not included",
        ]


def dry_run(
    model: Model,
    windows: Windows,
    out_dir: str | os.PathLike[str],
    recipe: ObserveRecipe | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Estimate:
    """Times layer 0 and the head on the first chunk; prints and returns what a whole run needs.

    Raises:
      TurboqError: the recipe does not fit the model and text, or the disk is too small.
    """
    recipe = ObserveRecipe() if recipe is None else recipe
    check_sizes(model, windows, recipe)
    count, length = windows.tokens.shape
    chunks = -(-count // recipe.windows_per_chunk)
    specs = model.spec.layers
    boundary = count * length * model.spec.kept * 4
    inputs = count * length * len(specs) * model.spec.own_input * 4
    sampled = min(recipe.reservoir, count * (length - recipe.skip))
    estimate = Estimate(
        geometry=_geometry(model),
        windows=count,
        window=length,
        chunks=chunks,
        statistics_bytes=max(_statistics_bytes(s) for s in specs),
        # All hidden states, with one gradient when the head is done; then always one fewer state.
        hidden_disk_bytes=(len(specs) + 2) * boundary
        + inputs
        + max(_row_bytes(s) for s in specs) * sampled,
        statistics_disk_bytes=sum(_statistics_bytes(s) + _row_bytes(s) * sampled for s in specs)
        + len(specs) * (12 * sampled + 2 * FILE_HEADER)
        + 4 * count * (length + 1),
        free_disk_bytes=shutil.disk_usage(_existing(Path(out_dir))).free,
        **_timed(model, windows, recipe, chunks),
    )
    for line in estimate.lines():
        log(line)
    needed = estimate.hidden_disk_bytes + estimate.statistics_disk_bytes
    if needed > estimate.free_disk_bytes:
        raise TurboqError(f"{out_dir} needs up to {_mib(needed)} of disk, which is not free")
    return estimate


def _timed(model: Model, windows: Windows, recipe: ObserveRecipe, chunks: int) -> dict:
    spec, params, last = model.spec.layers[0], model.layer(0), model.head_params()
    tokens = jnp.asarray(windows.tokens[: recipe.windows_per_chunk])
    x = embed_tokens(model, tokens)
    positions = decoder.default_positions(tokens)
    numbers = jnp.arange(len(tokens), dtype=jnp.int32)
    kept = -(-recipe.reservoir // chunks)
    sampled = jnp.zeros((min(kept, tokens.size), 2), jnp.int32)
    forward = functools.partial(passes.forward, spec)
    reverse = functools.partial(passes.reverse, spec, skip=recipe.skip)
    start = time.monotonic()
    head = passes.head.lower(model.spec, last, x, numbers, seed=recipe.seed).compile()
    programs = [head]
    if not isinstance(params, Streamed):
        forward = jax.jit(forward).lower(params, x, positions).compile()
        reverse = jax.jit(reverse).lower(params, x, positions, x, sampled).compile()
        programs += [forward, reverse]
    else:  # its parts are compiled as they are called, here and not when they are timed
        programs.append(
            passes.reverse_part.lower(
                spec, params, x, positions, x, sampled, skip=recipe.skip, whole=False
            ).compile()
        )
        reverse(params, x, positions, forward(params, x, positions)[0], sampled)
    compiled = time.monotonic() - start

    def layer():
        y, _ = forward(params, x, positions)
        g, reduced, rows, _ = reverse(params, x, positions, y, sampled)
        for side in jax.device_get(reduced).values():
            to_host(side)
        return x, y, g, reduced, rows

    layer_seconds, alive = _seconds(layer)
    head_seconds, _ = _seconds(lambda: head(last, x, numbers))
    kinds = len(set(model.spec.layers))
    return {
        "weight_bytes": max(nbytes(params) + group_bytes(spec, params), nbytes(last)),
        "chunk_bytes": nbytes(alive),
        "temporary_bytes": max(_temporary(f) for f in programs),
        "peak_rss_bytes": peak_rss(),
        "compile_seconds": kinds * compiled,
        "chunk_seconds": layer_seconds,
        "head_seconds": head_seconds,
        "seconds": kinds * compiled
        + chunks * (layer_seconds * len(model.spec.layers) + head_seconds),
    }


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the last of `TIMED_PASSES` calls, and what it returned."""
    seconds, out = 0.0, None
    for _ in range(TIMED_PASSES):
        start = time.monotonic()
        out = jax.block_until_ready(call())
        seconds = time.monotonic() - start
    return seconds, out


def _temporary(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis else 0


def _geometry(model: Model) -> tuple[str, ...]:
    spec = model.spec
    lines = [
        f"model: {spec.name} ({spec.family}), {len(spec.layers)} layers, hidden {spec.hidden}, "
        f"vocabulary {spec.vocab}, context {spec.context}"
    ]
    for layer, times in Counter(spec.layers).items():
        window = "" if layer.window is None else f", window {layer.window}"
        experts = ""
        if layer.experts is not None:
            experts = f", {layer.experts.chosen} of {layer.experts.count} experts"
        if isinstance(layer.recurrent, Mamba):
            mamba = layer.recurrent
            lines.append(
                f"  {times} x Mamba-2 mixer, {mamba.heads} heads of {mamba.head_dim}, state of "
                f"{mamba.state_dim}, no KV cache{experts}"
            )
            continue
        if layer.recurrent is not None:
            delta = layer.recurrent
            lines.append(
                f"  {times} x gated delta-net, {delta.key_heads} key heads of {delta.key_dim}, "
                f"{delta.value_heads} value heads of {delta.value_dim}, no KV cache{experts}"
            )
            continue
        if layer.latent is not None:
            lines.append(
                f"  {times} x {layer.heads} query heads, one latent vector of {layer.v_head_dim} + "
                f"{layer.head_dim} rotated channels{experts}"
            )
            continue
        lines.append(
            f"  {times} x {layer.heads} query heads, {layer.kv_heads} KV heads, head dim "
            f"{layer.head_dim} (V {layer.v_head_dim}){window}{experts}"
        )
    return tuple(lines)


def _statistics_bytes(spec: LayerSpec) -> int:
    """Bytes of all fields of one layer as they are in memory."""
    return sum(
        int(np.prod(st.shape_of(f, *size))) * np.dtype(f.dtype).itemsize
        for side, size in sizes(spec).items()
        for f in st.fields_of(side)
    )


def _row_bytes(spec: LayerSpec) -> int:
    """Bytes of k, v, g_k and g_v of one sampled token."""
    return 8 * spec.kv_heads * (spec.head_dim + spec.v_head_dim)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
