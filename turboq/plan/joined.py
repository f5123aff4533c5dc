"""Arrays of joined heads: from what was fitted, unit by unit, to what a plan stores of them.

fitted   layers.{i}.joint.{mean|synthesis}, and every array of every unit's codec
stored   layers.{i}.joint.{array} of `turboq.cache.composed`, and the rest of the units'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from turboq.cache import composed, joint
from turboq.plan.errors import PlanError
from turboq.plan.types import SIDES, LayerPlan, Plan, array_name


def compose(plan: Plan, fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's arrays; those of heads that are not joined as they are.

    `layers.{i}.joint.variances` [J, C], where given, says how the joint coordinates vary.

    Raises:
      PlanError: an array is missing.
      ValueError: a synthesis without an inverse.
    """
    out = dict(fitted)
    for layer in plan.layers:
        if layer.joint is None:
            continue
        start = array_name(layer.index, "joint", "")
        own = {name[len(start) :]: out.pop(name) for name in fitted if name.startswith(start)}
        if missing := [name for name in joint.ARRAYS if name not in own]:
            raise PlanError(start + missing[0], "fitted array of joined heads is missing")
        k, v = (_units(plan, layer, side, out) for side in SIDES)
        made = composed.compose(k, v, layer.joint, own)
        out |= {start + name: values for name, values in made.items()}
    return out


def _units(plan: Plan, layer: LayerPlan, side: str, out: dict[str, Any]) -> list[composed.Unit]:
    """Of every head its codec and fitted arrays; those that are not stored leave `out`."""
    chosen, found, gone = layer.side(side), [], set[str]()
    for head, codec in enumerate(plan.codecs(layer.index, side)):
        own = {}
        for array in codec.array_shapes:
            name = array_name(layer.index, side, array, None if chosen.stacked else head)
            if name not in out:
                raise PlanError(name, "fitted array of a unit is missing")
            own[array] = np.asarray(out[name])[head] if chosen.stacked else np.asarray(out[name])
            if array not in composed.held(codec).array_shapes:
                gone.add(name)
        found.append((codec, own))
    for name in gone:
        del out[name]
    return found
