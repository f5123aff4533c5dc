"""Plans whose KV heads are coded as one vector: what reaches the layers, what is refused."""

import dataclasses

import jax
import numpy as np
import plan_cases
import pytest

from turboq.codecs import Exact, KiviKey
from turboq.plan import (
    PlanConflict,
    PlanError,
    SidePlan,
    check_arrays,
    compose,
    document,
    save,
    summary,
)
from turboq.plan.document import table_uses
from turboq.plan.tensors import check_listing


def test_joined_heads_reach_the_layers():
    plan, arrays = plan_cases.joined()
    layers = plan.kv_layers(arrays)
    assert [layer.joint_heads for layer in layers] == [3, 2]
    # Eight coordinates of every unit are coded: 3 and 2 heads, K and V of each.
    assert [layer.joint["analysis"].shape for layer in layers] == [(1, 48, 72), (2, 32, 64)]
    assert [layer.joint["synthesis"].shape for layer in layers] == [(1, 72, 48), (2, 64, 32)]
    for index, layer in zip((0, 2), layers, strict=True):
        for name, values in layer.joint.items():
            np.testing.assert_array_equal(values, arrays[f"layers.{index}.joint.{name}"])
            assert values.dtype == arrays[f"layers.{index}.joint.{name}"].dtype
    found = document(plan)["layers"]
    assert [layer["joint"] for layer in found] == [3, 2]
    assert "joint" not in document(plan_cases.rich()[0])["layers"][0]
    text = summary(plan)
    assert "keys and values of 2, 3 heads are one vector" in text
    # Codes cost what they cost alone; two turns of what is coded are all that is in memory.
    alone = tuple(dataclasses.replace(layer, joint=None) for layer in plan.layers)
    bare = dataclasses.replace(plan, layers=alone)
    assert bare.bytes == plan.bytes
    held = [(x.joint, [(g.k_arrays, g.v_arrays) for g in x.groups]) for x in layers]
    assert plan.residency(100).arrays == sum(x.nbytes for x in jax.tree.leaves(held))


def _layers(**changes):
    def make():
        plan, _ = plan_cases.joined()
        first = dataclasses.replace(plan.layers[0], **changes)
        return dataclasses.replace(plan, layers=(first, plan.layers[1]))

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_layers(joint=2), r"layers\[0\].joint: 2 does not divide 3 KV heads"),
        (_layers(joint=0), "joint=0 must be 1..1024"),
        (
            _layers(k=SidePlan(codec=Exact(dim=16))),
            r'layers\[0\].joint: keys are joined .* before RoPE .*, but k.rope is "after"',
        ),
        (
            _layers(k=SidePlan(codec=KiviKey(dim=16, bits=2, group=32), rope="before")),
            r"layers\[0\].joint: codec kivi_key stores blocks of 32 tokens",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_of_joined_heads_are_checked():
    plan, arrays = plan_cases.joined()
    name = "layers.2.joint.synthesis"
    with pytest.raises(PlanConflict, match=rf'arrays: "{name}" is missing'):
        check_arrays(plan, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(PlanError, match=rf"{name}: fitted array is missing"):
        plan.kv_layer(2, {n: a for n, a in arrays.items() if n != name})
    for array, value, message in (
        ("center", np.nan, "NaN or infinite"),
        ("synthesis_scale", 0.0, "scales of a matrix must be positive"),
        ("coded", 0, "which coordinates the codecs of the units have"),
        ("analysis_channels", -1.0, "scales of a matrix must be positive"),
    ):
        wrong = f"layers.2.joint.{array}"
        with pytest.raises(PlanConflict, match=message):
            check_arrays(plan, arrays | {wrong: np.full_like(arrays[wrong], value)})
    with pytest.raises(PlanConflict, match=f"{name}: float32 array must be int8"):
        check_arrays(plan, arrays | {name: arrays[name].astype(np.float32)})
    fitted = {f"layers.{i}.joint.mean": arrays[f"layers.{i}.joint.mean"] for i in (0, 2)}
    with pytest.raises(PlanError, match=r"layers.0.joint.synthesis: fitted array of joined heads"):
        compose(plan, fitted)


def test_joined_plans_of_earlier_versions_are_refused(tmp_path):
    """Their matrices have no scales of channels."""
    plan, arrays = plan_cases.joined()
    saved = save(plan, arrays, tmp_path)
    assert saved.arrays is not None
    listed = {n: spec for n, spec in saved.arrays.tensors.items() if not n.endswith("channels")}
    earlier = dataclasses.replace(saved, arrays=dataclasses.replace(saved.arrays, tensors=listed))
    with pytest.raises(
        PlanConflict, match=r"layers.0.joint.analysis_channels. is missing: make the plan"
    ):
        check_listing(earlier, table_uses(earlier))
