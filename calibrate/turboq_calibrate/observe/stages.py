"""The stages of one run between its checkpoints: layers forwards, the head, layers backwards.

Stage s < L runs layer s, stage L the head, stage s > L layer 2 L - s backwards. Position of a run:
(stage, chunks of the stage done).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq_calibrate.models import decoder
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.models.params import layer_size
from turboq_calibrate.observe import reservoir
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.layer_statistics import sizes
from turboq_calibrate.observe.passes import Finite
from turboq_calibrate.observe.placement import Placement
from turboq_calibrate.observe.recipe import ObserveRecipe, Shard
from turboq_calibrate.observe.reduce import to_host
from turboq_calibrate.observe.rows import RowsFile
from turboq_calibrate.observe.texts import Windows
from turboq_calibrate.run.checkpoints import Checkpoints
from turboq_calibrate.run.peak_memory import ArrayMeter
from turboq_calibrate.run.progress import Progress

Observer = Callable[[str, dict[str, Any]], None]
BACKWARD = 3  # passes over the weights of one step backwards: the layer again, then its transpose


class Stages:
    """One run of all stages over this shard's windows, continued where its checkpoint says."""

    def __init__(
        self,
        model: Model,
        windows: Windows,
        work: Path,
        statistics: Path,
        recipe: ObserveRecipe,
        shard: Shard | None,
        place: Placement,
        checkpoint_every: int,
        observer: Observer | None,
    ):
        self.model, self.recipe, self.place = model, recipe, place
        self.work, self.statistics = work, statistics
        self.every, self.observer = checkpoint_every, observer
        self.layers = len(model.spec.layers)
        count, length = windows.tokens.shape
        size = recipe.windows_per_chunk
        chunks = [(s, min(s + size, count)) for s in range(0, count, size)]
        part = (shard or Shard()).of(len(chunks))
        self.chunks = chunks[part.start : part.stop]  # first and last window of each
        self.start, stop = self.chunks[0][0], self.chunks[-1][1]
        self.tokens, self.text = windows.tokens[self.start : stop], windows.text
        chosen = reservoir.choose(
            count, length, count=recipe.reservoir, skip=recipe.skip, seed=recipe.seed
        )
        self.members = chosen.take(chosen.of(self.start, stop))
        within = [chosen.of(*chunk) for chunk in chunks]
        self.most = max(rows.stop - rows.start for rows in within)  # one shape for all shards
        self.counted = len(self.tokens) * (length - recipe.skip)
        self.meter = ArrayMeter()
        self.checkpoints = Checkpoints(work / "checkpoints")

    def close(self) -> None:
        self.checkpoints.close()

    def all(self, progress: bool) -> None:
        """Runs every stage that is left."""
        restored = self.checkpoints.restore()
        if restored is None:
            self._embed()
            (stage, chunk), tree = (0, 0), {}
        else:
            (stage, chunk), tree = restored
            self.event("resumed", stage=stage, chunk=chunk)
        costs = self._costs()
        done = sum(costs[:stage]) + costs[stage] * chunk / len(self.chunks)
        unit = self.tokens.size / sum(costs)
        with Progress(
            self.tokens.size, label="observe", done=done * unit, enabled=progress
        ) as self.bar:
            for s in range(stage, 2 * self.layers + 1):
                self._remove_before(s)
                self.unit = costs[s] * unit / len(self.chunks)
                if s < self.layers:
                    self._forward(s, s, chunk)
                elif s == self.layers:
                    self._head(s, chunk)
                else:
                    self._reverse(s, 2 * self.layers - s, chunk, tree)
                chunk, tree = 0, {}

    def describe(self) -> list[dict[str, Any]]:
        """The manifest's entries of all layers, from their files."""
        entries = []
        for i, spec in enumerate(self.model.spec.layers):
            path = self.statistics / files.layer_file(i)
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise TurboqError(
                    f"cannot read {path}: {error.strerror}; remove {self.work.parent} to start "
                    "again"
                ) from error
            layer = files.layer_from_sides(files.from_bytes(raw, path), path, spec.rope)
            entry = files.describe_layer(
                self.statistics, i, self.model.spec.path(i), layer,
                sampled=self.recipe.reservoir > 0,
            )  # fmt: skip
            entries.append(entry)
        return entries

    def event(self, name: str, **fields: Any) -> None:
        """One line of events.jsonl, on its way to disk before the next step begins."""
        record = {"event": name, "time": round(time.time(), 3), "pid": os.getpid(), **fields}
        try:
            with open(self.work / "events.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TurboqError(f"cannot write {self.work}/events.jsonl: {error.strerror}") from error
        if self.observer is not None:
            self.observer(name, fields)

    def _costs(self) -> list[int]:
        """Multiplications per token of every stage, roughly: the weights it passes over."""
        spec = self.model.spec
        layers = [layer_size(s, s.experts.chosen if s.experts else 0) for s in spec.layers]
        backward = [BACKWARD * cost for cost in reversed(layers)]
        return [*layers, BACKWARD * spec.vocab * spec.hidden, *backward]

    # Files

    def _hidden(self, layer: int) -> RowsFile:
        """States that enter `layer`; those of layer L enter the head."""
        return self._boundary("hidden", layer)

    def _gradient(self, layer: int) -> RowsFile:
        """Gradients at the states that enter `layer`."""
        return self._boundary("gradient", layer)

    def _boundary(self, kind: str, layer: int) -> RowsFile:
        shape = (*self.tokens.shape, self.model.spec.kept)
        return RowsFile(self.work / f"{kind}_{layer:03d}.npy", shape)

    def _inputs(self, layer: int) -> list[RowsFile]:
        """The input of its own that `layer` reads, which no layer changes."""
        shape = (*self.tokens.shape, self.model.spec.own_input)
        return [RowsFile(self.work / f"inputs_{layer:03d}.npy", shape)] if shape[-1] else []

    def _sampled(self, layer: int) -> RowsFile:
        """k, v, g_k, g_v of the sampled tokens, one row each."""
        spec = self.model.spec.layers[layer]
        width = 2 * spec.kv_heads * (spec.head_dim + spec.v_head_dim)
        return RowsFile(self.work / f"sampled_{layer:03d}.npy", (len(self.members), width))

    def _remove_before(self, stage: int) -> None:
        """Removes what only earlier stages needed."""
        if not self.place.primary:
            return
        for layer in range(2 * self.layers - stage + 1, self.layers + 1):
            self._hidden(layer).remove()
            self._gradient(layer + 1).remove()
            if layer < self.layers:
                self._sampled(layer).remove()
                for file in self._inputs(layer):
                    file.remove()

    def _create(self, stage: int, *wanted: RowsFile) -> None:
        if self.place.primary:
            for file in wanted:
                file.create()
        self.place.barrier(f"created {stage}")

    def _read(self, file: RowsFile, c: int, *beside: RowsFile, zeros: int = 0) -> jax.Array:
        """The chunk's rows, with channels of other files or zeros behind its own."""
        start, stop = (n - self.start for n in self.chunks[c])
        width = file.shape[-1] + sum(other.shape[-1] for other in beside) + zeros

        def rows(a: int, b: int) -> np.ndarray:
            parts = [f.read(start + a, start + b) for f in (file, *beside)]
            return np.concatenate([*parts, np.zeros((*parts[0].shape[:-1], zeros))], axis=-1)

        return self.place.windows((stop - start, *file.shape[1:-1], width), "float32", rows)

    def _write(self, file: RowsFile, c: int, x: jax.Array) -> None:
        for row, states in self.place.rows(x):
            file.write(self.chunks[c][0] - self.start + row, states[..., : file.shape[-1]])

    def _numbers(self, c: int) -> jax.Array:
        """Numbers of the chunk's windows in the whole text."""
        numbers = np.arange(*self.chunks[c])
        return self.place.windows(numbers.shape, "int32", lambda a, b: numbers[a:b])

    def _positions(self, c: int) -> jax.Array:
        start, stop = self.chunks[c]
        tokens = self.tokens[start - self.start : stop - self.start]
        at = np.asarray(decoder.default_positions(jnp.asarray(tokens)))
        return self.place.windows(at.shape, "int32", lambda a, b: at[a:b])

    # Stages

    def _embed(self) -> None:
        if self.place.primary:
            files = [self._hidden(0), *(f for i in range(self.layers) for f in self._inputs(i))]
            for file in files:
                file.create()
            ends = np.cumsum([file.shape[-1] for file in files])
            for start, stop in self.chunks:
                rows = slice(start - self.start, stop - self.start)
                x = np.asarray(embed_tokens(self.model, self.tokens[rows]))
                for file, part in zip(files, np.split(x, ends[:-1], axis=-1), strict=True):
                    file.write(rows.start, part)
            self.event("embedded")
        self.place.barrier("embedded")

    def _forward(self, stage: int, i: int, first: int) -> None:
        spec, params = self.model.spec.layers[i], self._params(i)
        out = self._hidden(i + 1)
        if first == 0:
            self._create(stage, out)
        for c in range(first, len(self.chunks)):
            x = self._read(self._hidden(i), c, *self._inputs(i))
            y, finite = self.place.forward(spec, params, x, self._positions(c))
            self._check_finite(finite, "", self._layer(i), c)
            self._write(out, c, y)
            self.event("hidden", layer=i + 1, chunk=c)
            self.meter.see(params, x, y)
            self._done(stage, c, {}, f"layer {i + 1} of {self.layers} forwards")

    def _head(self, stage: int, first: int) -> None:
        spec = self.model.spec
        params = self.place.head_params(spec, self.model.head_params())
        out = self._gradient(self.layers)
        if first == 0:
            self._create(stage, out)
        for c in range(first, len(self.chunks)):
            x = self._read(self._hidden(self.layers), c)
            windows = self._numbers(c)
            g, finite = self.place.head(spec, params, x, windows, seed=self.recipe.seed)
            self._check_finite(finite, "the gradient at ", "head", c)
            self._write(out, c, g)
            self.event("gradient", layer=self.layers, chunk=c)
            self.meter.see(params, x, g)
            self._done(stage, c, {}, "head")

    def _reverse(self, stage: int, i: int, first: int, tree: dict) -> None:
        spec, params = self.model.spec.layers[i], self._params(i)
        kept = [self._sampled(i)] if self.recipe.reservoir else []
        out = [self._gradient(i)] if i else []
        if first == 0:
            self._create(stage, *kept, *out)
            tree = {side: st.zeros(side, *size) for side, size in sizes(spec).items()}
        for c in range(first, len(self.chunks)):
            x = self._read(self._hidden(i), c, *self._inputs(i))
            g = self._read(self._gradient(i + 1), c, zeros=self.model.spec.own_input)
            rows, sampled = self._members(c)
            g_x, reduced, found, finite = self.place.reverse(
                spec, params, x, self._positions(c), g, sampled, skip=self.recipe.skip
            )
            self._check_finite(finite, "the gradient at ", self._layer(i), c)
            for file in out:
                self._write(file, c, g_x)
            if kept and self.place.primary:
                kept[0].write(rows.start, np.asarray(found)[: rows.stop - rows.start])
            self.event("gradient", layer=i, chunk=c)
            wide = {side: to_host(arrays) for side, arrays in jax.device_get(reduced).items()}
            # A layer without keys and values has no statistics.
            merged = tree | {s: st.merge_arrays(tree[s], arrays) for s, arrays in wide.items()}
            self.meter.see(tree, wide, merged, params, x, g, g_x, reduced, found)
            tree = merged
            self._done(stage, c, tree, f"layer {i + 1} of {self.layers} backwards")
            if c + 1 == len(self.chunks) and self.place.primary:
                self._finish_layer(i, tree)
        if i:
            self._save(stage + 1, 0, {})

    def _finish_layer(self, i: int, tree: dict) -> None:
        spec = self.model.spec.layers[i]
        if self.recipe.reservoir:
            size = sizes(spec)
            tokens = reservoir.Tokens.from_rows(
                self._sampled(i).read(0, len(self.members)), self.members,
                self.text[self.members.window], size["k"], size["v"],
            )  # fmt: skip
            atomic_write(self.statistics / files.tokens_file(i), tokens.to_bytes())
        atomic_write(self.statistics / files.layer_file(i), files.to_bytes(tree))
        self.event("layer", layer=i)

    def _params(self, i: int) -> decoder.Params:
        return self.place.params(self.model.spec.layers[i], self.model.layer(i))

    def _layer(self, i: int) -> str:
        return f"layer {i} ({self.model.spec.path(i)})"

    def _members(self, c: int) -> tuple[slice, np.ndarray]:
        """Rows of the chunk's sampled tokens, and (window in the chunk, position), padded."""
        start, stop = self.chunks[c]
        rows = self.members.of(start, stop)
        found = self.members.take(rows)
        out = np.zeros((self.most, 2), np.int32)
        out[: len(found)] = np.stack([found.window - start, found.position], axis=1)
        return rows, out

    def _check_finite(self, finite: Finite, of: str, where: str, c: int) -> None:
        start, stop = self.chunks[c]
        found = jax.device_get(finite)
        for name in sorted(found, key=lambda n: n not in st.SIDES):  # heads before what they made
            bad = np.flatnonzero(~found[name])
            if len(bad):
                heads = ", ".join(map(str, bad))
                what = f"{name} of head {heads}" if name in st.SIDES else f"the {name}"
                raise TurboqError(
                    f"NaN or infinity in {of}{what}, {where}, chunk {c} (windows {start} to "
                    f"{stop - 1}): the weights or the text drive this out of float32"
                )

    def _done(self, stage: int, c: int, tree: dict, note: str) -> None:
        """A chunk is done. The last one of a stage is saved with what follows the stage."""
        done = c + 1
        if done < len(self.chunks) and done % self.every == 0:
            self._save(stage, done, tree)
        elif done == len(self.chunks) and stage <= self.layers:
            self._save(stage + 1, 0, {})
        self.bar.advance(self.unit, note)

    def _save(self, stage: int, chunk: int, tree: dict) -> None:
        # What a checkpoint relies on must be on disk in every process before it is made.
        self.place.barrier(f"save {stage} {chunk}")
        if not self.place.primary:
            return
        step = stage * (len(self.chunks) + 1) + chunk
        self.checkpoints.save(step, (stage, chunk), tree)
        self.event("checkpoint", stage=stage, chunk=chunk)
