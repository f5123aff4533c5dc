"""The side file: which tensors a plan needs, and whether the ones at hand are those."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from turboq.cache import joint
from turboq.cache.accounting import distinct_codecs
from turboq.plan.document import TableUse, table_uses
from turboq.plan.errors import PlanConflict, PlanError, member, shown
from turboq.plan.types import SIDES, Plan, TensorSpec, array_name

Tensors = dict[str, np.ndarray]

# A regenerated table may differ from the stored one by float32 rounding (6e-8 of its largest
# entry) and by the linear algebra library (1e-13); another random stream differs by about 1.
TABLE_TOLERANCE = 1e-6


def array_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every fitted array of a plan, by the rule of `turboq.plan.types`."""
    shapes = {}
    for layer in plan.layers:
        geometry = plan.model.layers[layer.index]
        kv_heads = geometry.kv_heads
        if layer.joint is not None:
            own = joint.shapes(kv_heads, layer.joint, geometry.k_dim, geometry.v_dim)
            shapes |= {array_name(layer.index, "joint", name): own[name] for name in own}
        for side in SIDES:
            chosen = layer.side(side)
            if chosen.stacked:
                for array, shape in chosen.codec.array_shapes.items():
                    shapes[array_name(layer.index, side, array)] = (kv_heads, *shape)
                continue
            for head in range(kv_heads):
                for array, shape in chosen.of(head).array_shapes.items():
                    shapes[array_name(layer.index, side, array, head)] = shape
    return shapes


def check_arrays(plan: Plan, arrays: Mapping[str, Any]) -> Tensors:
    """The fitted arrays in float32 on the host: exactly those the plan needs, all usable.

    Raises:
      PlanConflict: one is missing, unknown, of another shape or type, not finite, a codebook that
        does not ascend, a negative scale, or a turn without an inverse.
    """
    due = array_shapes(plan)
    _check_names("arrays", set(arrays), set(due))
    out = {}
    for name, shape in due.items():
        values = np.asarray(arrays[name])
        if values.dtype != np.float32:
            raise PlanConflict(name, f"{values.dtype} array must be float32")
        if values.shape != shape:
            raise PlanConflict(name, f"shape {list(values.shape)} must be {list(shape)}")
        bad = int(np.sum(~np.isfinite(values)))
        if bad:
            raise PlanConflict(name, f"{bad} of {values.size} values are NaN or infinite")
        array = name.rpartition(".")[2]
        if array == "codebook" and not np.all(np.diff(values, axis=-1) >= 0):
            raise PlanConflict(name, "a codebook must ascend")
        if array == "scale" and not np.all(values >= 0):
            raise PlanConflict(name, "a scale must not be negative")
        if array == "weights" and not np.all(values >= 0):
            raise PlanConflict(name, "weights must not be negative")
        if name.endswith(".joint.synthesis") and not _invertible(values):
            raise PlanConflict(name, "a turn of joined heads must have an inverse")
        out[name] = values
    return out


def _invertible(matrices: np.ndarray) -> bool:
    sign, size = np.linalg.slogdet(matrices.astype(np.float64))
    return bool(np.all(sign != 0) and np.all(np.isfinite(size)))


def table_tensors(plan: Plan) -> Tensors:
    """Static tables of the codecs in use as they are stored: float32, equal ones once."""
    tables = {codec: codec.tables for codec in distinct_codecs(plan.storage)}
    return {
        name: np.asarray(tables[use.codec][table], np.float32)
        for use in table_uses(plan)
        for table, name in use.tensors.items()
    }


def specs(tensors: Tensors) -> dict[str, TensorSpec]:
    """What the JSON lists of each tensor, sorted by name."""
    return {
        name: TensorSpec(dtype=tensors[name].dtype.name, shape=tensors[name].shape)
        for name in sorted(tensors)
    }


def write_bytes(tensors: Tensors) -> bytes:
    """safetensors bytes; equal tensors give equal bytes."""
    return safetensors.numpy.save({name: np.asarray(t, order="C") for name, t in tensors.items()})


def read_bytes(raw: bytes, listed: Mapping[str, TensorSpec]) -> Tensors:
    """The tensors of a side file, which must be exactly those that the JSON lists.

    Raises:
      PlanError: not a safetensors file, or a damaged one.
      PlanConflict: its tensors are not those listed.
    """
    try:
        found = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError as error:
        raise PlanError("", f"not a whole safetensors file: {error}") from None
    _check_names("arrays.tensors", set(found), set(listed))
    out = {}
    for name, spec in listed.items():
        tensor = found[name]
        if tensor["dtype"] != "F32":
            raise PlanConflict(name, f"stored as {tensor['dtype']}, must be F32")
        if tuple(tensor["shape"]) != spec.shape:
            raise PlanConflict(name, f"shape {tensor['shape']}, but listed {list(spec.shape)}")
        out[name] = np.frombuffer(tensor["data"], "<f4").reshape(spec.shape)
    return out


def check_listing(plan: Plan, stated: tuple[TableUse, ...]) -> None:
    """Cheap checks of names and shapes, before any table is regenerated or file read.

    Raises:
      PlanConflict: tensors listed are not the fitted arrays and the stated tables.
    """
    assert plan.arrays is not None
    listed, due = plan.arrays.tensors, array_shapes(plan)
    tables = {name for use in stated for name in use.tensors.values()}
    _check_names("arrays.tensors", set(listed), set(due) | tables)
    for name, shape in due.items():
        if listed[name].shape != shape:
            path = member("arrays.tensors", name)
            raise PlanConflict(path, f"shape {list(listed[name].shape)} must be {list(shape)}")
    need = 4 * sum(math.prod(spec.shape) for spec in listed.values())
    if need > plan.arrays.size:
        raise PlanConflict("arrays.size", f"{plan.arrays.size} bytes cannot hold the {need} listed")


def check_tables(plan: Plan, stated: tuple[TableUse, ...], tensors: Tensors) -> None:
    """Stored tables equal the ones that this version derives from the codecs.

    One codec at a time, so a hostile file costs at most one table more than it really holds.

    Raises:
      PlanConflict: a codec or table is missing, extra, or has other values.
    """
    n = 0
    for codec in distinct_codecs(plan.storage):
        tables = codec.tables
        if not tables:
            continue
        if n == len(stated) or stated[n].codec != codec:
            raise PlanConflict(f"tables[{n}].codec", f"must be {shown(codec.config())}")
        names = stated[n].tensors
        _check_names(f"tables[{n}].tensors", set(names), set(tables))
        for table, due in tables.items():
            _check_table(f"tables[{n}].tensors.{table}", names[table], tensors, due)
        n += 1
    if n < len(stated):
        raise PlanConflict(f"tables[{n}].codec", "is not in use, or was listed before")
    if stated != table_uses(plan):
        raise PlanConflict("tables", "equal tables must share one tensor, numbered in order of use")


def _check_table(path: str, name: str, tensors: Tensors, due: np.ndarray) -> None:
    if name not in tensors:
        raise PlanConflict(path, f"tensor {shown(name)} is not in the file")
    values, due = tensors[name], np.asarray(due, np.float32)
    if values.shape != due.shape:
        raise PlanConflict(name, f"shape {list(values.shape)} must be {list(due.shape)}")
    worst = float(np.max(np.abs(values - due)))
    if not worst <= TABLE_TOLERANCE * float(np.max(np.abs(due))):  # NaN fails too
        raise PlanConflict(
            name, f"differs by {worst:.3g} from the table that the codec's description gives"
        )


def _check_names(path: str, found: set[str], due: set[str]) -> None:
    missing, extra = sorted(due - found), sorted(found - due)
    if missing:
        raise PlanConflict(path, f"{shown(missing[0])} is missing ({len(missing)} in all)")
    if extra:
        raise PlanConflict(path, f"{shown(extra[0])} is not needed ({len(extra)} in all)")
