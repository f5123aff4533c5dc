"""JSON values -> frozen dataclasses, driven by their type hints, with a path in every error.

One rule for every object with named fields: all fields are present, `null` where there is nothing;
those marked optional are left out instead; `x-` fields are kept; any other field is an error.
Ranges are checked by the dataclasses themselves; their ValueError gets the path here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from typing import Any

from turboq.codecs import CODECS, unknown_codec
from turboq.codecs.base import Codec
from turboq.plan.errors import PlanConflict, PlanError, member, shown

Extra = dict[str, dict[str, Any]]  # path of an object -> its `x-` fields

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def read(kind: Any, value: Any, path: str, extra: Extra) -> Any:
    """`value` as `kind`: a scalar, `X | None`, Literal, tuple, dict[str, X], Any or a dataclass.

    Raises:
      PlanError: anything that is not exactly that.
    """
    origin, args = _form(kind)
    if kind is Any:
        return value
    if kind in _SCALARS:
        return _scalar(kind, value, path)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else read(args[0], value, path, extra)
    if origin is typing.Literal:
        if type(value) is not str or value not in args:
            raise PlanError(path, f"{shown(value)} must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _tuple(args, value, path, extra)
    if origin is dict:
        check_object(value, path)
        return {key: read(args[1], item, member(path, key), extra) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Codec):
        return read_codec(value, path, extra)
    if hasattr(kind, "read_json"):
        return kind.read_json(value, path, extra)
    return read_object(kind, value, path, extra)


@functools.cache
def _form(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


def read_object(cls: type, value: Any, path: str, extra: Extra) -> Any:
    """A dataclass from an object with its fields; `cls.derived` properties are given and agree."""
    known, derived = fields_of(cls), getattr(cls, "derived", ())
    check_fields(value, path, (*known, *derived), optional=optional_fields(cls), extra=extra)
    for name in optional_fields(cls):
        if name in value and value[name] is None:
            raise PlanError(member(path, name), "null: leave the field out")
    values = {
        name: read(hint, value[name], member(path, name), extra)
        for name, hint in known.items()
        if name in value
    }
    made = build(cls, values, path)
    for name in derived:
        due = getattr(made, name)
        stated = read(type(due), value[name], member(path, name), extra)
        if stated != due:
            raise PlanConflict(
                member(path, name), f"{shown(stated)}, but the fields give {shown(due)}"
            )
    return made


def read_codec(value: Any, path: str, extra: Extra, also: tuple[str, ...] = ()) -> Codec:
    """A codec from its flat description; `also` names further fields of the same object."""
    check_object(value, path)
    if "codec" not in value:
        raise PlanError(member(path, "codec"), "missing")
    name = value["codec"]
    if type(name) is not str or name not in CODECS:
        raise PlanError(member(path, "codec"), unknown_codec(name))
    cls = CODECS[name]
    known = fields_of(cls)
    optional = optional_fields(cls)
    check_fields(value, path, ("codec", *known, *also), optional=optional | {*also}, extra=extra)
    values = {
        field: read(hint, value[field], member(path, field), extra)
        for field, hint in known.items()
        if field in value or field not in optional
    }
    codec = build(cls, values, path)
    for name in optional & values.keys():
        if name not in codec.config():
            raise PlanError(member(path, name), f"{shown(values[name])}: leave the field out")
    for check in ("fields", "array_shapes"):  # some descriptions fail only when they are used
        _guarded(lambda check=check: getattr(codec, check), tuple(values), path)
    return codec


def build(cls: type, values: dict[str, Any], path: str) -> Any:
    """`cls(**values)`, with the path of the field in the error."""
    return _guarded(lambda: cls(**values), tuple(values), path)


def _guarded(make, names: tuple[str, ...], path: str) -> Any:
    try:
        return make()
    except PlanError as error:
        raise error.under(path) from None
    except ValueError as error:
        reason = " ".join(str(error).replace("self.", "").split())
        named = [name for name in names if re.search(rf"\b{re.escape(name)}=", reason)]
        kind = PlanConflict if len(named) > 1 else PlanError
        raise kind(member(path, named[0]) if len(named) == 1 else path, reason) from None


def check_object(value: Any, path: str) -> None:
    if not isinstance(value, dict):
        raise PlanError(path, f"{shown(value)} must be an object")


def check_fields(
    value: Any, path: str, known: tuple[str, ...], *, optional: frozenset[str], extra: Extra
) -> None:
    """All of `known` but `optional` are there, nothing else is; `x-` fields go to `extra`."""
    check_object(value, path)
    for key in value:
        if key.startswith("x-"):
            extra.setdefault(path, {})[key] = value[key]
        elif key not in known:
            close = difflib.get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise PlanError(member(path, key), f"unknown field; {hint} (own fields begin with x-)")
    for name in known:
        if name not in value and name not in optional:
            raise PlanError(member(path, name), "missing")


@functools.cache
def fields_of(cls: type) -> dict[str, Any]:
    """Name -> type hint of every field, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


@functools.cache
def optional_fields(cls: type) -> frozenset[str]:
    """Fields that the document may leave out."""
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata.get("optional"))


def _scalar(kind: type, value: Any, path: str) -> Any:
    # `type`, not isinstance: true is an int in Python and must not pass for 1.
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise PlanError(path, f"{shown(value)} must be {_SCALARS[kind]}")
    return value


def _tuple(args: tuple, value: Any, path: str, extra: Extra) -> tuple:
    if not isinstance(value, list):
        raise PlanError(path, f"{shown(value)} must be an array")
    if args[-1] is Ellipsis:
        kinds = [args[0]] * len(value)
    elif len(args) == len(value):
        kinds = list(args)
    else:
        raise PlanError(path, f"{len(value)} items must be {len(args)}")
    return tuple(
        read(kind, item, member(path, i), extra)
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def read_heads(value: Any, path: str, extra: Extra) -> dict[int, Codec]:
    """Per-head overrides: a map from head number to codec (a map has no `x-` fields)."""
    check_object(value, path)
    if not value:
        raise PlanError(path, "no head is overridden: leave it out")
    for key in value:
        if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key):
            raise PlanError(member(path, key), 'must be a head number such as "2"')
    return {int(k): read_codec(item, member(path, k), extra) for k, item in value.items()}
