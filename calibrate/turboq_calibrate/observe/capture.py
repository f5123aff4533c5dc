"""Capture: a model over text, layer by layer, to statistics on disk.

    hidden_0 = embedding
    for each layer:  sweep 1 over chunks: k, v, q -> moments;  hidden_{i+1} -> disk
                     sweep 2 over chunks: k, v -> codebook histograms around the means of sweep 1

Memory holds one layer's weights and one chunk of windows; disk holds two layers' hidden states.
After each chunk an Orbax checkpoint keeps the accumulators, so a killed run continues, and ends
with the same bytes: every step is deterministic, and files are renamed into place before the
checkpoint that relies on them.

    OUT/statistics/    the result (statistics_files)
    OUT/capture/       inputs.json, events.jsonl, run.json; while unfinished also the hidden states,
                       moments of the current layer and checkpoints
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.numbers.rotation import Rotation
from turboq_calibrate.models import decoder
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.hidden import HiddenFile
from turboq_calibrate.observe.placement import MeshPlacement, Placement
from turboq_calibrate.observe.recipe import (
    CaptureRecipe,
    Shard,
    capture_inputs,
    check_sizes,
    differences,
)
from turboq_calibrate.observe.reduce import to_host
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import Windows
from turboq_calibrate.run.checkpoints import Checkpoints
from turboq_calibrate.run.peak_memory import ArrayMeter, peak_rss
from turboq_calibrate.run.progress import Progress

FOLDER = "capture"
Observer = Callable[[str, dict[str, Any]], None]


def capture(
    model: Model,
    windows: Windows,
    out_dir: str | os.PathLike[str],
    recipe: CaptureRecipe | None = None,
    *,
    shard: Shard | None = None,
    mesh: Mesh | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
    log: Callable[[str], None] = print,
    observer: Observer | None = None,
) -> Statistics:
    """Captures statistics of `windows` into `out_dir`, continuing an unfinished run found there.

    Args:
      shard: capture only this part of the windows; needs the recipe's center="pilot". The shards'
        folders become one with `turboq_calibrate.observe.merge_shards.merge_shards`.
      mesh: of `placement.make_mesh`: windows and heads are divided over its devices, which may
        belong to several processes that share `out_dir`. All of them call `capture`.
      checkpoint_every: chunks between checkpoints; changes what a kill costs, not the result.
      progress: show a progress bar (plain lines without a terminal).
      log: where the closing line goes.
      observer: called with every event after it is logged (name, fields).

    Raises:
      TurboqError: the folder holds a capture of other inputs, or another process works there; NaN
        or infinity in activations; the folder cannot be written.
    """
    recipe = CaptureRecipe() if recipe is None else recipe
    if checkpoint_every < 1:
        raise ValueError(f"{checkpoint_every=} must be 1 or more chunks")
    if shard is not None and recipe.center != "pilot":
        raise ValueError(
            f"a shard needs center='pilot', not {recipe.center=}: its own mean differs"
        )
    check_sizes(model, windows, recipe)
    inputs = capture_inputs(model, windows, recipe, shard)
    place = Placement() if mesh is None else MeshPlacement(mesh)
    out = Path(out_dir)
    work = make_folder(out / FOLDER)
    with _locked(work) if place.primary else contextlib.nullcontext():
        if place.primary:
            _claim(work, inputs)
        place.barrier("claimed")
        if (out / files.FOLDER / files.MANIFEST).exists():
            finished = load_statistics(out_dir)
            _compare(work, finished.manifest.inputs, inputs)
            place.barrier("compared")
            if place.primary:
                _clear(work)
                log(f"statistics in {out_dir} are complete: nothing to capture")
            return finished
        run = _Run(model, windows, out, recipe, shard, place, inputs, checkpoint_every, observer)
        try:
            run.all_layers(progress and place.primary)
        finally:
            run.checkpoints.close()
        return run.finish(log)


def _claim(work: Path, inputs: dict[str, Any]) -> None:
    """Records the inputs of a new capture, or compares them with those of the one found."""
    path = work / "inputs.json"
    if not path.exists():
        _clear(work)  # whatever is left here belongs to an unknown capture
        atomic_write(path, json.dumps(inputs, indent=1, sort_keys=True) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise TurboqError(f"{path} is damaged ({error}): remove {work.parent}") from error
    _compare(work, found, inputs)


def _compare(work: Path, found: dict[str, Any], inputs: dict[str, Any]) -> None:
    lines = differences(found, inputs)
    if lines:
        raise TurboqError(
            f"{work.parent} holds a capture of other inputs ({'; '.join(lines)}): choose another "
            f"folder, or remove this one to start again"
        )


def _clear(work: Path) -> None:
    """Removes what only an unfinished capture needs."""
    for pattern in ("hidden_*", "moments_*"):
        for path in work.glob(pattern):
            path.unlink(missing_ok=True)
    if (work / "checkpoints").exists():
        shutil.rmtree(work / "checkpoints")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps a second capture out of the folder; the lock dies with the process."""
    with open(work / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TurboqError(f"another capture is running in {work.parent}") from None
        yield


class _Run:
    """One capture between its checkpoints. Position: (layer, sweep, chunks of the sweep done)."""

    def __init__(
        self,
        model: Model,
        windows: Windows,
        out_dir: Path,
        recipe: CaptureRecipe,
        shard: Shard | None,
        place: Placement,
        inputs: dict[str, Any],
        checkpoint_every: int,
        observer: Observer | None,
    ):
        self.model, self.recipe, self.inputs = model, recipe, inputs
        self.every, self.observer, self.place = checkpoint_every, observer, place
        self.work = out_dir / FOLDER
        self.statistics = make_folder(out_dir / files.FOLDER)
        self.checkpoints = Checkpoints(self.work / "checkpoints")
        size, tokens = recipe.windows_per_chunk, windows.tokens
        chunks = [(s, min(s + size, len(tokens))) for s in range(0, len(tokens), size)]
        part = (shard or Shard()).of(len(chunks))
        # A shard passes the first chunk of the text, for its mean, without counting it twice.
        self.pilot_only = part.start > 0
        self.windows = chunks[:1] * self.pilot_only + chunks[part.start : part.stop]
        self.tokens = np.concatenate([tokens[start:stop] for start, stop in self.windows])
        ends = np.cumsum([stop - start for start, stop in self.windows]).tolist()
        self.chunks = list(zip([0, *ends[:-1]], ends, strict=True))
        self.layers = len(model.spec.layers)
        self.meter = ArrayMeter()
        self.started = time.monotonic()

    def hidden(self, layer: int) -> HiddenFile:
        """States that enter `layer`."""
        shape = (*self.tokens.shape, self.model.spec.hidden)
        return HiddenFile(self.work / f"hidden_{layer:03d}.npy", shape)

    def all_layers(self, progress: bool) -> None:
        restored = self.checkpoints.restore()
        if restored is None:
            self._embed()
            (layer, sweep, chunk), tree = (0, 1, 0), {}
        else:
            (layer, sweep, chunk), tree = restored
            self._event("resumed", layer=layer, sweep=sweep, chunk=chunk)
        # Everything before the current layer's input has done its part.
        for old in range(layer if self.place.primary else 0):
            self.hidden(old).remove()
            self._moments_path(old).unlink(missing_ok=True)
        steps = 2 * len(self.chunks)
        done = layer * steps + (sweep - 1) * len(self.chunks) + chunk
        unit = self.tokens.size / (steps * self.layers)
        with Progress(
            self.tokens.size, label="capture", done=done * unit, enabled=progress
        ) as self.bar:
            for i in range(layer, self.layers):
                params = self.place.params(self.model.spec.layers[i], self.model.layer(i))
                if sweep == 1:
                    self._sweep_1(i, params, chunk, tree)
                    chunk, tree = 0, {}
                self._sweep_2(i, params, chunk, tree)
                sweep, chunk, tree = 1, 0, {}

    def finish(self, log: Callable[[str], None]) -> Statistics:
        """Writes the manifest and what the run cost, and clears the working files."""
        if not self.place.primary:
            self.place.barrier("finished")
            return load_statistics(self.statistics)
        path = self.model.spec.path
        entries, counted = [], 0
        for i in range(self.layers):
            layer = self._read(self.statistics / files.layer_file(i))
            layer = files.layer_from_sides(
                layer, self.statistics / files.layer_file(i), self.inputs["recipe"]
            )
            counted = int(layer.k.count.max())
            entries.append(files.describe_layer(self.statistics, i, path(i), layer))
        manifest = files.Manifest(
            version=st.VERSION,
            inputs=self.inputs,
            tokens=counted,
            bins=files.bins_description(),
            layers=tuple(entries),
        )
        files.write_manifest(self.statistics, manifest)
        self._event("finished")
        _clear(self.work)
        seconds = time.monotonic() - self.started
        cost = {
            "seconds": round(seconds, 3),
            "peak_rss_bytes": peak_rss(),
            "peak_array_bytes": self.meter.peak,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        atomic_write(self.work / "run.json", json.dumps(cost, indent=1, sort_keys=True) + "\n")
        log(
            f"captured {self.tokens.size:,} tokens through {self.layers} layers in "
            f"{seconds:.1f} s; peak memory {peak_rss() / 2**20:,.0f} MiB "
            f"(capture's own arrays {self.meter.peak / 2**20:,.0f} MiB)"
        )
        self.place.barrier("finished")
        return load_statistics(self.statistics)

    def _embed(self) -> None:
        if self.place.primary:
            hidden = self.hidden(0)
            hidden.create()
            for start, stop in self.chunks:
                hidden.write(start, np.asarray(embed_tokens(self.model, self.tokens[start:stop])))
            self._event("embedded")
        self.place.barrier("embedded")

    def _sweep_1(self, i: int, params: decoder.Params, first: int, tree: dict) -> None:
        spec, last = self.model.spec.layers[i], i + 1 == self.layers
        if not tree:
            tree = {
                "k": st.zeros("k", 1, spec.kv_heads, spec.head_dim),
                "v": st.zeros("v", 1, spec.kv_heads, spec.v_head_dim),
                "q": st.zeros("q", 1, spec.heads, spec.head_dim),
            }
        if first == 0 and not last:
            if self.place.primary:
                self.hidden(i + 1).create()
            self.place.barrier(f"hidden {i + 1}")
        for c in range(first, len(self.chunks)):
            x, positions = self._input(i, c)
            if last:
                y = None
                reduced = self.place.moments_only(spec, params, x, positions, skip=self.recipe.skip)
            else:
                y, reduced = self.place.moments_and_output(
                    spec, params, x, positions, skip=self.recipe.skip
                )
            host = jax.device_get(reduced)
            self._check_finite(i, c, host, y)
            if y is not None:
                for row, states in self.place.rows(y):
                    self.hidden(i + 1).write(self.chunks[c][0] + row, states)
                self._event("hidden", layer=i + 1, chunk=c)
            tree = self._merged(c, tree, host, params, x, y, reduced)
            self._step(i, 1, c, tree)
        if self.place.primary:
            atomic_write(self._moments_path(i), files.to_bytes(tree))
            self._event("moments", layer=i)
        self.place.barrier(f"moments {i}")
        self._save(i, 2, 0, {})

    def _sweep_2(self, i: int, params: decoder.Params, first: int, tree: dict) -> None:
        spec, recipe = self.model.spec.layers[i], self.recipe
        moments = self._read(self._moments_path(i))
        around = moments if recipe.center == "all" else self._pilot(i, params)
        sides = {side: st.SideStatistics(arrays=around[side]) for side in ("k", "v")}
        center = {s: x.mean.astype(np.float32) for s, x in sides.items()}
        scale = {s: x.rms.astype(np.float32) for s, x in sides.items()}
        rotations = tuple(
            Rotation(kind=recipe.rotation, dim=x.dim, seed=recipe.seed) for x in sides.values()
        )
        if not tree:
            tree = {s: st.zeros(s, 2, x.heads, x.dim) for s, x in sides.items()}
        for c in range(first, len(self.chunks)):
            x, positions = self._input(i, c)
            reduced = self.place.codes(
                spec,
                params,
                x,
                positions,
                center,
                scale,
                skip=recipe.skip,
                rotations=rotations,
            )
            host = jax.device_get(reduced)
            tree = self._merged(c, tree, host, params, x, reduced, moments)
            self._step(i, 2, c, tree)
        for s in sides:
            moments[s] |= tree[s] | {"center": center[s], "scale": scale[s]}
        if self.place.primary:
            atomic_write(self.statistics / files.layer_file(i), files.to_bytes(moments))
            self._event("layer", layer=i)
        if i + 1 < self.layers:
            self._save(i + 1, 1, 0, {})
            if self.place.primary:
                self.hidden(i).remove()
                self._moments_path(i).unlink(missing_ok=True)

    def _pilot(self, i: int, params: decoder.Params) -> dict[str, st.Arrays]:
        """Moments of the first chunk of the text: the same numbers in every shard."""
        x, positions = self._input(i, 0)
        spec = self.model.spec.layers[i]
        found = self.place.moments_only(spec, params, x, positions, skip=self.recipe.skip)
        host = jax.device_get(found)
        self._check_finite(i, 0, host, None)
        return {side: to_host(arrays) for side, arrays in host.items()}

    def _input(self, i: int, c: int):
        start, stop = self.chunks[c]
        shape = (stop - start, *self.tokens.shape[1:])
        hidden = self.hidden(i)
        at = np.asarray(decoder.default_positions(jnp.asarray(self.tokens[start:stop])))
        x = self.place.windows(
            (*shape, self.model.spec.hidden), "float32",
            lambda a, b: hidden.read(start + a, start + b),
        )  # fmt: skip
        return x, self.place.windows(shape, "int32", lambda a, b: at[a:b])

    def _check_finite(self, i: int, c: int, host: dict, y: jax.Array | None) -> None:
        start, stop = self.windows[c]
        where = f"layer {i} ({self.model.spec.path(i)}), chunk {c} (windows {start} to {stop - 1})"
        for side in st.SIDES:
            bad = np.flatnonzero(~host[side].pop("finite"))
            if len(bad):
                raise TurboqError(
                    f"NaN or infinity in {side} of head {', '.join(map(str, bad))}, {where}: the "
                    f"weights or the text drive this layer out of float32"
                )
        if y is not None and not bool(jnp.all(jnp.isfinite(y))):
            raise TurboqError(f"NaN or infinity in the output of {where}")

    def _moments_path(self, i: int) -> Path:
        return self.work / f"moments_{i:03d}.safetensors"

    def _read(self, path: Path) -> dict[str, st.Arrays]:
        try:
            return files.from_bytes(path.read_bytes(), path)
        except OSError as error:
            raise TurboqError(
                f"cannot read {path}: {error.strerror}; remove {self.work.parent} to start again"
            ) from error

    def _merged(self, c: int, tree: dict, host: dict, *alive: Any) -> dict:
        """The accumulators with chunk c added; `alive` is what else memory holds just now."""
        if c == 0 and self.pilot_only:
            return tree
        wide = {s: to_host(host[s]) for s in tree}
        merged = {s: st.merge_arrays(tree[s], wide[s]) for s in tree}
        self.meter.see(tree, wide, merged, alive)
        return merged

    def _step(self, i: int, sweep: int, c: int, tree: dict) -> None:
        """A chunk is done. The last one of a sweep is saved with what follows the sweep."""
        done = c + 1
        if done < len(self.chunks) and done % self.every == 0:
            self._save(i, sweep, done, tree)
        self.bar.advance(
            self.tokens.size / (2 * self.layers * len(self.chunks)),
            f"layer {i + 1} of {self.layers}",
        )

    def _save(self, layer: int, sweep: int, chunk: int, tree: dict) -> None:
        # What a checkpoint relies on must be on disk in every process before it is made.
        self.place.barrier(f"save {layer} {sweep} {chunk}")
        if not self.place.primary:
            return
        step = (2 * layer + sweep - 1) * (len(self.chunks) + 1) + chunk
        self.checkpoints.save(step, (layer, sweep, chunk), tree)
        self._event("checkpoint", layer=layer, sweep=sweep, chunk=chunk)

    def _event(self, name: str, **fields: Any) -> None:
        """One line of events.jsonl, on its way to disk before the next step begins."""
        record = {"event": name, "time": round(time.time(), 3), "pid": os.getpid(), **fields}
        try:
            with open(self.work / "events.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TurboqError(f"cannot write {self.work}/events.jsonl: {error.strerror}") from error
        if self.observer is not None:
            self.observer(name, fields)
