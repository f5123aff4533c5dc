"""Making plans: the same codec everywhere, or a choice per layer, side and head."""

# pyright: strict

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from turboq.cache.layer import TokenPolicy
from turboq.codecs.base import Codec
from turboq.plan.errors import PlanConflict
from turboq.plan.geometry import LayerGeometry, ModelGeometry, RopeForm
from turboq.plan.provenance import Provenance, Quality
from turboq.plan.tensors import Tensors, check_arrays
from turboq.plan.types import SIDES, LayerPlan, Plan, SidePlan, array_name

Side = Literal["k", "v"]
Choice = Callable[[int, Side, int], Codec]  # (layer index, side, KV head) -> codec
Template = Codec | Callable[[int], Codec]  # at its own head dim, or the codec of every head dim
KRope = RopeForm | Callable[[int], RopeForm]  # the same in every layer, or by layer index
Joint = int | None | Callable[[int], int | None]  # the same
Fit = Callable[[int, Side, Codec], Mapping[str, Any]]  # -> array -> [K, *shape]


def uniform_plan(
    geometry: ModelGeometry,
    *,
    k: Template,
    v: Template,
    k_rope: KRope = "after",
    policy: TokenPolicy | None = None,
    arrays: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    quality: Quality | None = None,
) -> Plan:
    """One codec for all keys and one for all values.

    `k` and `v` are templates: a layer of another head dim takes them at its own. `k_rope` "before"
    stores keys before their rotary embedding in every layer that has one (some must). With
    `arrays` given, they are checked against the plan.

    Raises:
      PlanConflict: the arrays are not the plan's, or the geometry lacks the `rope` of a layer; no
        layer has a rotary embedding to store keys before.
      ValueError: a codec does not exist at a layer's head dim.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> plan = turboq.uniform_plan(geometry, k=codec, v=codec)
      >>> plan.bits_per_channel()
      3.25
    """
    k_rope = _checked(geometry, k_rope)
    layers = tuple(
        LayerPlan(
            index=layer.index,
            path=layer.path,
            k=SidePlan(codec=at_dim(k, layer.k_dim), rope=_form(k_rope, layer)),
            v=SidePlan(codec=at_dim(v, layer.v_dim)),
        )
        for layer in geometry.cache_layers
    )
    plan = Plan(
        model=geometry,
        tokens=policy or TokenPolicy(),
        layers=layers,
        provenance=provenance,
        quality=quality,
    )
    if arrays is not None:
        check_arrays(plan, arrays)
    return plan


def head_plan(
    geometry: ModelGeometry,
    choose: Choice,
    *,
    k_rope: KRope = "after",
    joint: Joint = None,
    policy: TokenPolicy | None = None,
    provenance: Provenance | None = None,
    quality: Quality | None = None,
) -> Plan:
    """The codec that `choose(layer, side, head)` gives for every KV head.

    The commonest codec of a side becomes its default (the first of equals), the others overrides.
    `k_rope` as in `uniform_plan`, `joint` as in `LayerPlan`.

    Raises:
      PlanConflict: a codec of another head dim, or the geometry lacks the `rope` of a layer; heads
        that cannot be joined.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> finer = turboq.TurboQuantMSE(dim=64, bits=5)
      >>> def choose(layer, side, head):
      ...     return finer if (layer, side, head) == (0, "k", 1) else codec
      >>> plan = turboq.head_plan(geometry, choose)
      >>> plan.bits_per_channel(), sorted(plan.layers[0].k.heads)
      (3.5, [1])
    """
    k_rope = _checked(geometry, k_rope)
    layers: list[LayerPlan] = []
    for layer in geometry.cache_layers:
        sides: dict[str, SidePlan] = {}
        for side in SIDES:
            codecs = [choose(layer.index, side, head) for head in range(layer.kv_heads)]
            common = collections.Counter(codecs).most_common(1)[0][0]
            heads = {h: codec for h, codec in enumerate(codecs) if codec != common}
            rope = _form(k_rope, layer) if side == "k" else "after"
            sides[side] = SidePlan(codec=common, heads=heads, rope=rope)
        own = joint(layer.index) if callable(joint) else joint
        layers.append(LayerPlan(index=layer.index, path=layer.path, joint=own, **sides))
    return Plan(
        model=geometry,
        tokens=policy or TokenPolicy(),
        layers=tuple(layers),
        provenance=provenance,
        quality=quality,
    )


def _checked(geometry: ModelGeometry, k_rope: KRope) -> KRope:
    return k_rope if callable(k_rope) else geometry.key_form(k_rope)


def _form(k_rope: KRope, layer: LayerGeometry) -> RopeForm:
    """A layer's own choice; of a choice for all, "before" is for layers that rotate keys."""
    if callable(k_rope):
        return k_rope(layer.index)
    return k_rope if layer.turns_keys else "after"


def at_dim(codec: Template, dim: int) -> Codec:
    """The same codec for heads of `dim` channels."""
    if not isinstance(codec, Codec):
        return codec(dim)
    return codec if codec.dim == dim else dataclasses.replace(codec, dim=dim)


def collect_arrays(plan: Plan, fit: Fit) -> Tensors:
    """Fitted arrays of a plan, by name, from a fit of whole layers.

    `fit(layer, side, codec)` gives the arrays of all K heads for one codec, and is called once per
    codec that a side uses; of a side with overrides each head takes its row.

    Raises:
      PlanConflict: the fit gave an array of another shape, not finite, or none.
    """
    out: dict[str, np.ndarray] = {}
    for layer in plan.layers:
        kv_heads = plan.model.layers[layer.index].kv_heads
        for side in SIDES:
            chosen = layer.side(side)
            codecs = plan.codecs(layer.index, side)
            for codec in dict.fromkeys(codecs):
                if not codec.array_shapes:
                    continue
                fitted = fit(layer.index, side, codec)
                for array, shape in codec.array_shapes.items():
                    path = array_name(layer.index, side, array)
                    if array not in fitted:
                        raise PlanConflict(path, f"the fit of {codec.name} gave no {array!r}")
                    values = np.asarray(fitted[array], np.float32)
                    if values.shape != (kv_heads, *shape):
                        due = [kv_heads, *shape]
                        raise PlanConflict(path, f"shape {list(values.shape)} must be {due}")
                    if chosen.stacked:
                        out[path] = values
                        continue
                    for head in (h for h in range(kv_heads) if codecs[h] == codec):
                        out[array_name(layer.index, side, array, head)] = values[head]
    return check_arrays(plan, out)
