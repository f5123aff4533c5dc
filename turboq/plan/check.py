"""Is this plan for that model, and how do two plans differ: field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from turboq.plan.document import document, to_json
from turboq.plan.errors import PlanConflict, member, shown
from turboq.plan.geometry import ModelGeometry
from turboq.plan.types import Plan

_MAX_SHOWN = 4


def check_model(plan: Plan, geometry: ModelGeometry) -> None:
    """Refuses a plan that was made for another model.

    The `name` is free to differ, and a layer's `rope` may be known on one side only.

    Raises:
      PlanConflict: one line with the fields that differ, plan against model.
    """
    ours, theirs = to_json(plan.model), to_json(geometry)
    found = [d for d in differences(ours, theirs, "model") if not _free(*d)]
    if not found:
        return
    lines = [f"{path}: plan {shown(a)}, model {shown(b)}" for path, a, b in found[:_MAX_SHOWN]]
    more = f" (and {len(found) - _MAX_SHOWN} more)" if len(found) > _MAX_SHOWN else ""
    raise PlanConflict(
        "", f"the plan is for another model ({plan.model.name}): {'; '.join(lines)}{more}"
    )


def _free(path: str, a: Any, b: Any) -> bool:
    return path == "model.name" or (path.endswith(".rope") and None in (a, b))


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every leaf where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from differences(a.get(key), b.get(key), member(path, key))
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{path}.length", len(a), len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, member(path, i))
    elif type(a) is not type(b) or a != b:
        yield path, a, b


def diff(a: Plan, b: Plan) -> str:
    """One line per field in which two plans differ; empty for equal plans.

    Hashes, which differ whenever anything does, are left out.
    """
    found = differences(document(a), document(b))
    return "\n".join(
        f"{path}: {shown(x)} -> {shown(y)}"
        for path, x, y in found
        if path not in ("hash", "arrays.sha256")
    )
