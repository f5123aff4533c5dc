"""Plan <-> JSON document: the published fields, in the published order.

document(plan)   what plan.json says          parse(document)   what it means, or one error
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Any

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.codecs import CODECS
from turboq.codecs.base import Codec
from turboq.plan.canonical import digest
from turboq.plan.errors import PlanConflict, PlanError, member, shown
from turboq.plan.geometry import MAX_LAYERS, ModelGeometry
from turboq.plan.provenance import Provenance, Quality
from turboq.plan.read import Extra, check_fields, check_object, fields_of, optional_fields, read
from turboq.plan.types import SCHEMA_VERSION, ArrayFile, Bytes, LayerPlan, Plan, Producer, SidePlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableUse:
    """Static tables of one codec in the side file: table -> tensor name.

    They are there for other engines: turboq derives them from the codec's description and refuses
    a file that disagrees.
    """

    codec: Codec
    tensors: dict[str, str]


_FIELDS: dict[str, Any] = {
    "schema_version": int,
    "producer": Producer,
    "hash": str,
    "model": ModelGeometry,
    "tokens": TokenPolicy,
    "layers": tuple[LayerPlan, ...],
    "arrays": ArrayFile,
    "tables": tuple[TableUse, ...],
    "bytes": Bytes,
    "provenance": Provenance,
    "quality": Quality,
}
_OPTIONAL = frozenset(("provenance", "quality"))
_RECOMPUTED = ("hash", "tables", "bytes")


def table_uses(plan: Plan) -> tuple[TableUse, ...]:
    """One entry per codec in use that has tables.

    Equal tables share one tensor `tables/{table}.{n}`, numbered by first appearance.
    """
    names: dict[tuple, str] = {}
    count: dict[str, int] = {}
    uses = []
    for codec in accounting.distinct_codecs(plan.storage):
        tensors = {}
        for table, values in codec.tables.items():
            key = accounting.table_key(table, values)
            if key not in names:
                names[key] = f"tables/{table}.{count.get(table, 0)}"
                count[table] = count.get(table, 0) + 1
            tensors[table] = names[key]
        if tensors:
            uses.append(TableUse(codec=codec, tensors=tensors))
    return tuple(uses)


def document(plan: Plan) -> dict[str, Any]:
    """The JSON document of a plan, hash included.

    Raises:
      PlanError: `plan.extra` names an object that the document does not have.
    """
    values = {
        "schema_version": plan.schema_version,
        "producer": plan.producer,
        "model": plan.model,
        "tokens": plan.tokens,
        "layers": plan.layers,
        "arrays": plan.arrays,
        "tables": table_uses(plan),
        "bytes": plan.bytes,
        "provenance": plan.provenance,
        "quality": plan.quality,
    }
    out = {name: to_json(value) for name, value in values.items() if value is not None}
    _insert_extra(out, plan.extra)
    head = {name: out.pop(name) for name in ("schema_version", "producer")}
    return {**head, "hash": plan_hash({**head, **out}), **out}


def fingerprint(plan: Plan) -> str:
    """The "hash" of the document of a plan: equal for equal plans, arrays included once saved."""
    return document(plan)["hash"]


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12), which ships inside the package.

    With the codecs of other packages that are here, by the types of their fields.
    """
    found = json.loads(resources.files("turboq").joinpath("plan.schema.json").read_text("utf-8"))
    definitions = found["$defs"]
    for name in (name for name in CODECS if name not in definitions):
        definitions[name] = _codec_schema(name)
        definitions["codecs"]["oneOf"].append({"$ref": f"#/$defs/{name}"})
    return found


def _codec_schema(name: str) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    fields = {
        field: {"type": kinds.get(kind, "array")} for field, kind in fields_of(CODECS[name]).items()
    }
    properties = {"codec": {"const": name}} | fields | {"dim": {"$ref": "#/$defs/dim"}}
    required = [field for field in fields if field not in optional_fields(CODECS[name])]
    return {"type": "object", "properties": properties, "required": ["codec", *required]}


def plan_hash(document: dict[str, Any]) -> str:
    """`sha256:` of the RFC 8785 form of the document without its own "hash" field."""
    return digest({key: value for key, value in document.items() if key != "hash"})


def to_json(value: Any) -> Any:
    """Dataclasses to objects (codecs flat, overrides under "heads"), tuples to arrays."""
    if isinstance(value, Codec):
        return {key: to_json(item) for key, item in value.config().items()}
    if isinstance(value, SidePlan):
        heads = {str(h): to_json(value.heads[h]) for h in sorted(value.heads)}
        rope = {} if value.rope == "after" else {"rope": value.rope}
        return to_json(value.codec) | rope | ({"heads": heads} if heads else {})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = ((n, getattr(value, n)) for n in optional_fields(type(value)))
        skip = {n for n, x in given if x is False or x in (None, (), {})}  # a 0 is a number
        names = [f.name for f in dataclasses.fields(value) if f.name not in skip]
        return {n: to_json(getattr(value, n)) for n in (*names, *getattr(value, "derived", ()))}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def parse(value: Any) -> tuple[Plan, tuple[TableUse, ...]]:
    """The plan that a JSON document describes, and the static tables that it claims.

    Hash and bytes are recomputed and must agree. Arrays and tables are a matter of the side file:
    `turboq.plan.load` reads both.

    Raises:
      PlanError: a field is wrong by itself (the published schema refuses it too).
      PlanConflict: fields disagree with each other.
    """
    check_object(value, "")
    version = value.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        raise PlanError(
            "schema_version",
            f"{version} is not supported: this turboq reads {SCHEMA_VERSION}; "
            "`turboq plan` writes it anew",
        )
    extra: Extra = {}
    check_fields(value, "", tuple(_FIELDS), optional=_OPTIONAL, extra=extra)
    if isinstance(value["layers"], list) and len(value["layers"]) > MAX_LAYERS:
        raise PlanError("layers", f"{len(value['layers'])} layers exceed the limit {MAX_LAYERS}")
    values = {
        name: read(kind, value[name], name, extra)
        for name, kind in _FIELDS.items()
        if name in value
    }
    stated = {name: values.pop(name) for name in _RECOMPUTED}
    plan = Plan(**values, extra=extra)
    _check_bytes(stated["bytes"], plan.bytes)
    due = plan_hash(value)
    if stated["hash"] != due:
        raise PlanConflict(
            "hash", f"{shown(stated['hash'])}, but the content gives {due}: edited or damaged"
        )
    return plan, stated["tables"]


def _check_bytes(stated: Bytes, due: Bytes) -> None:
    for name in ("layer_bits_per_token", "bits_per_token", "bytes_per_token"):
        a, b = getattr(stated, name), getattr(due, name)
        if a != b:
            raise PlanConflict(f"bytes.{name}", f"{shown(a)}, but the codecs give {shown(b)}")
    a, b = stated.bits_per_channel, due.bits_per_channel
    if abs(a - b) > 1e-9 * b:
        raise PlanConflict("bytes.bits_per_channel", f"{a}, but the codecs give {b}")


def _insert_extra(out: dict[str, Any], extra: Extra) -> None:
    left = dict(extra)
    pending: list[tuple[str, Any]] = [("", out)]
    while pending and left:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += [(member(path, key), item) for key, item in value.items()]
            value.update(left.pop(path, {}))
        elif isinstance(value, list):
            pending += [(member(path, i), item) for i, item in enumerate(value)]
    if left:
        raise PlanError(next(iter(left)), "plan.extra has fields for an object that is not there")


def pretty(value: Any, width: int = 220) -> str:
    """JSON for people: what fits on a line (one layer's geometry, one codec) stays on it."""
    return _pretty(value, 0, 0, width)


def _pretty(value: Any, indent: int, before: int, width: int) -> str:
    """`before` characters of the line are taken already."""
    compact = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if before + len(compact) < width or not isinstance(value, dict | list) or not value:
        return compact
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        keys = [f"{pad}{json.dumps(key, ensure_ascii=False)}: " for key in value]
        opened, closed = "{", "}"
    else:
        keys = [pad] * len(value)
        opened, closed = "[", "]"
    items = value.values() if isinstance(value, dict) else value
    lines = [k + _pretty(x, indent + 2, len(k), width) for k, x in zip(keys, items, strict=True)]
    return opened + "\n" + ",\n".join(lines) + "\n" + " " * indent + closed
