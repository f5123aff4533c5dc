"""Where a run's arrays live: one device, or a mesh of many, in one process or several.

On a mesh (axes "data" and "model") windows are divided over "data" and heads over "model"; each
process reads and writes the hidden states and gradients of its own windows in files that all of
them share, and statistics are merged by collectives, so every process holds the same totals. A
dimension that an axis does not divide is replicated instead: slower, never wrong.

JAX ends the surviving processes when a peer dies, so nothing is caught here: checkpoints are
frequent and atomic, hold no trace of the mesh, and a restart with another number of processes
continues.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from turboq_calibrate.models import decoder
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.models.streamed_experts import whole
from turboq_calibrate.observe import passes

Rows = Callable[[int, int], np.ndarray]


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices of all processes as [data, model]; `data` takes what `model` leaves.

    Raises:
      ValueError: the devices do not fill the mesh.
    """
    devices = jax.device_count()
    data = devices // model if data is None and model else data
    if not data or data * model != devices:
        raise ValueError(f"a mesh of {data=} x {model=} does not use all {devices} devices")
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto, AxisType.Auto))


class Placement:
    """One device of one process: arrays as they are."""

    primary = True

    def barrier(self, name: str) -> None:
        """Waits for all processes."""

    def params(self, spec: LayerSpec, params: decoder.Params) -> decoder.Params:
        """A layer's weights, placed."""
        return params

    def head_params(self, spec: ModelSpec, params: decoder.Params) -> decoder.Params:
        """The weights after the layers, placed."""
        return params

    def windows(self, shape: tuple[int, ...], dtype: str, read: Rows) -> Array:
        """An array [windows, ...] from `read(start, stop)` of its rows."""
        return jnp.asarray(read(0, shape[0]), dtype)

    def rows(self, x: Array) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of an array of windows, each row once over all processes."""
        yield 0, np.asarray(x)

    def forward(self, spec: LayerSpec, params, x, positions):
        """`passes.forward`."""
        return passes.forward(spec, params, x, positions)

    def head(self, spec: ModelSpec, params, x, windows, *, seed: int):
        """`passes.head`."""
        return passes.head(spec, params, x, windows, seed=seed)

    def reverse(self, spec: LayerSpec, params, x, positions, g, sampled, *, skip: int):
        """`passes.reverse`."""
        return passes.reverse(spec, params, x, positions, g, jnp.asarray(sampled), skip=skip)


@dataclasses.dataclass(frozen=True)
class MeshPlacement(Placement):
    """A mesh with axes "data" and "model" over all devices of all processes."""

    mesh: Mesh

    @property
    def primary(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return jax.process_index() == 0

    def barrier(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def params(self, spec: LayerSpec, params: decoder.Params) -> decoder.Params:
        # Experts are all in memory, each divided like one MLP.
        params, experts = whole(spec, params), spec.experts
        inside = spec.intermediate if experts is None else experts.intermediate
        # Rows of q, k, v are heads, and columns of o: a head stays on one device.
        by_head = spec.kv_heads % self.mesh.shape["model"] == 0
        by_unit = inside % self.mesh.shape["model"] == 0
        by_own_unit = (spec.intermediate or inside) % self.mesh.shape["model"] == 0

        def axes(name: str, ndim: int) -> tuple[str | None, ...]:
            matrix = name.removesuffix("_bias")
            if matrix in ("q", "k", "v", "attn_gate") and by_head:
                return ("model", None)[:ndim]
            if matrix in ("gate", "up") and by_own_unit:
                return ("model", None)[:ndim]
            if matrix in ("expert_gate", "expert_up") and by_unit:
                return (None, "model", None)
            if matrix == "expert_down" and by_unit:
                return (None, None, "model")
            if (name == "o" and by_head) or (name == "down" and by_own_unit):
                return (None, "model")
            return (None,) * ndim

        return {n: self._global(w, *axes(n, w.ndim)) for n, w in params.items()}

    def head_params(self, spec: ModelSpec, params: decoder.Params) -> decoder.Params:
        by_token = spec.vocab % self.mesh.shape["model"] == 0
        rows = ("model",) if by_token else ()
        return {
            n: self._global(w, *(rows if n == "unembedding" else ())) for n, w in params.items()
        }

    def windows(self, shape: tuple[int, ...], dtype: str, read: Rows) -> Array:
        def piece(index) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return np.asarray(read(start, stop), dtype)

        return jax.make_array_from_callback(shape, self._by_window(shape[0]), piece)

    def rows(self, x: Array) -> Iterator[tuple[int, np.ndarray]]:
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                yield shard.index[0].indices(x.shape[0])[0], np.asarray(shard.data)

    def forward(self, spec: LayerSpec, params, x, positions):
        by_window, whole = self._by_window(len(x)), self.sharding()
        return _jitted("forward", (by_window, whole), spec)(params, x, positions)

    def head(self, spec: ModelSpec, params, x, windows, *, seed: int):
        by_window, whole = self._by_window(len(x)), self.sharding()
        return _jitted("head", (by_window, whole), spec, seed=seed)(params, x, windows)

    def reverse(self, spec: LayerSpec, params, x, positions, g, sampled, *, skip: int):
        by_window, whole = self._by_window(len(x)), self.sharding()
        # Totals are replicated: their collectives are XLA's.
        call = _jitted("reverse", (by_window, whole, whole, whole), spec, skip=skip)
        return call(params, x, positions, g, self._global(sampled))

    def _by_window(self, windows: int) -> NamedSharding:
        divides = windows % self.mesh.shape["data"] == 0
        return self.sharding("data") if divides else self.sharding()

    def _global(self, value: Array | np.ndarray, *axes: str | None) -> Array:
        held = np.asarray(value)
        return jax.make_array_from_callback(
            held.shape, self.sharding(*axes), lambda index: held[index]
        )


@functools.lru_cache(maxsize=64)
def _jitted(name: str, out: Any, spec: LayerSpec | ModelSpec, **options: int):
    """A pass with its outputs placed, compiled once per spec, options and shapes."""
    call = functools.partial(getattr(passes, name), spec, **options)
    return jax.jit(call, out_shardings=out)
