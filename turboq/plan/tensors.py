"""The side file: which tensors a plan needs, and whether the ones at hand are those."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from turboq.cache import composed
from turboq.cache.accounting import distinct_codecs
from turboq.plan.document import TableUse, table_uses
from turboq.plan.errors import PlanConflict, PlanError, member, shown
from turboq.plan.types import SIDES, Plan, TensorSpec, array_name

Tensors = dict[str, np.ndarray]

# A regenerated table may differ from the stored one by float32 rounding (6e-8 of its largest
# entry) and by the linear algebra library (1e-13); another random stream differs by about 1.
TABLE_TOLERANCE = 1e-6

# Type of a tensor -> what safetensors calls it, and NumPy.
_STORED = {"float32": ("F32", "<f4"), "int8": ("I8", "<i1"), "int32": ("I32", "<i4")}


def array_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every fitted array of a plan, by the rule of `turboq.plan.types`."""
    return {name: shape for name, (shape, _) in array_types(plan).items()}


def array_types(plan: Plan) -> composed.Shapes:
    """Name -> shape and type: float32, but for the matrices of joined heads."""
    out: composed.Shapes = {}
    for layer in plan.layers:
        kv_heads = plan.model.layers[layer.index].kv_heads
        k, v = (plan.codecs(layer.index, side) for side in SIDES)
        if layer.joint is not None:
            k, v = (tuple(composed.held(codec) for codec in side) for side in (k, v))
            own = composed.shapes(k, v, layer.joint)
            out |= {array_name(layer.index, "joint", name): kind for name, kind in own.items()}
        for side, each in zip(SIDES, (k, v), strict=True):
            if layer.side(side).stacked:
                for array, shape in each[0].array_shapes.items():
                    out[array_name(layer.index, side, array)] = (kv_heads, *shape), "float32"
                continue
            for head, codec in enumerate(each):
                for array, shape in codec.array_shapes.items():
                    out[array_name(layer.index, side, array, head)] = shape, "float32"
    return out


def check_arrays(plan: Plan, arrays: Mapping[str, Any]) -> Tensors:
    """The fitted arrays on the host: exactly those the plan needs, all usable.

    Raises:
      PlanConflict: one is missing, unknown, of another shape or type, not finite, a codebook that
        does not ascend, a negative scale or one of a matrix that is not positive.
    """
    due, places = array_types(plan), _places(plan)
    _check_names("arrays", set(arrays), set(due))
    out = {}
    for name, (shape, kind) in due.items():
        values = np.asarray(arrays[name])
        if values.dtype != kind:
            raise PlanConflict(name, f"{values.dtype} array must be {kind}")
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
        if array == "coded" and not np.array_equal(values, places[name]):
            raise PlanConflict(name, "does not say which coordinates the codecs of the units have")
        if array in composed.SCALES and not np.all(values > 0):
            raise PlanConflict(name, "scales of a matrix must be positive")
        out[name] = values
    return out


def _places(plan: Plan) -> dict[str, np.ndarray]:
    """Of joined heads which coordinates their matrices are of."""
    out = {}
    for layer in plan.layers:
        if layer.joint is None:
            continue
        k, v = (plan.codecs(layer.index, side) for side in SIDES)
        out[array_name(layer.index, "joint", "coded")] = composed.places(k, v, layer.joint)
    return out


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
        kind, item = _STORED[spec.dtype]
        if tensor["dtype"] != kind:
            raise PlanConflict(name, f"stored as {tensor['dtype']}, must be {kind}")
        if tuple(tensor["shape"]) != spec.shape:
            raise PlanConflict(name, f"shape {tensor['shape']}, but listed {list(spec.shape)}")
        out[name] = np.frombuffer(tensor["data"], item).reshape(spec.shape)
    return out


def check_listing(plan: Plan, stated: tuple[TableUse, ...]) -> None:
    """Cheap checks of names and shapes, before any table is regenerated or file read.

    Raises:
      PlanConflict: tensors listed are not the fitted arrays and the stated tables.
    """
    assert plan.arrays is not None
    listed, due = plan.arrays.tensors, array_types(plan)
    tables = {name for use in stated for name in use.tensors.values()}
    earlier = next(
        (n for n in sorted(set(due) - set(listed)) if n.endswith(".analysis_channels")), None
    )
    if earlier is not None:  # what files of joined heads held before
        raise PlanConflict(
            "arrays.tensors", f"{shown(earlier)} is missing: make the plan again (turboq plan)"
        )
    _check_names("arrays.tensors", set(listed), set(due) | tables)
    for name, (shape, kind) in due.items():
        path = member("arrays.tensors", name)
        if listed[name].shape != shape:
            raise PlanConflict(path, f"shape {list(listed[name].shape)} must be {list(shape)}")
        if listed[name].dtype != kind:
            raise PlanConflict(path, f"{listed[name].dtype} must be {kind}")
    need = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in listed.values())
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
