"""Ladders of plans: what their rungs are, what is stored of them, and what is refused."""

import json
import re

import jsonschema
import numpy as np
import pytest
from plan_cases import geometry, random_fit

from turboq.cache.layer import TokenPolicy
from turboq.codecs import PerHead
from turboq.errors import TurboqError
from turboq.plan import collect_arrays, head_plan, load, save
from turboq.plan.document import plan_hash
from turboq.plan.ladder import (
    Ladder,
    LadderSide,
    Tier,
    ladder_schema,
    load_ladder,
    save_ladder,
    shared,
)

MODEL = geometry(layers=2, kv_heads=3, k_dim=16, v_dim=8)
KEYS = [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
TIERS = {(0, "k"): 3, (0, "v"): 1, (1, "k"): 2, (1, "v"): 3}
ORDER = (3, 0, 3, 2, 0)


def codec(layer, side, head, tier):
    """Head 0 has a bit more than the others in the first tier of keys."""
    bits = 5 - tier + (head == 0 and side == "k" and tier == 0)
    return PerHead(dim=16 if side == "k" else 8, bits=bits)


def plan_of(tiers):
    """The plan of a rung, made anew from its codecs."""
    chosen = dict(zip(KEYS, tiers, strict=True))
    plan = head_plan(
        MODEL, lambda i, s, h: codec(i, s, h, chosen[i, s]), policy=TokenPolicy(sinks=2)
    )
    return plan, collect_arrays(plan, random_fit(MODEL))


@pytest.fixture(scope="module")
def ladder():
    stored, sides = {}, []
    for n, (layer, side) in enumerate(KEYS):
        made = []
        for t in range(TIERS[layer, side]):
            plan, arrays = plan_of([t if i == n else 0 for i in range(4)])
            own = {k: x for k, x in arrays.items() if k.startswith(f"layers.{layer}.{side}.")}
            places = shared(own, stored)
            named = {k.split(".", 3)[3]: place for k, place in places.items()}
            store = plan.layers[layer].side(side)
            made.append(Tier(store=store, arrays=named))
        sides.append(LadderSide(layer=layer, side=side, tiers=tuple(made)))
    loss = tuple(float(n) for n in range(len(ORDER) + 1))
    return Ladder(
        model=MODEL, tokens=TokenPolicy(sinks=2), sides=tuple(sides), order=ORDER, loss=loss
    ), stored  # fmt: skip


def test_every_rung_is_the_plan_of_its_tiers(ladder, tmp_path):
    made, stored = ladder
    back, again = load_ladder(save_and(made, stored, tmp_path))
    assert back.rungs == made.rungs == 6
    tiers = [0, 0, 0, 0]
    for n in range(6):
        plan, arrays = back.rung(n, again)
        due, due_arrays = plan_of(tiers)
        assert plan.layers == due.layers
        assert plan.tokens == due.tokens
        assert plan.quality is not None
        assert plan.quality.predicted is not None
        assert plan.quality.predicted.kl_mean == n
        assert back.bits[n] == due.bytes.bits_per_token
        assert arrays.keys() == due_arrays.keys()
        for name, values in due_arrays.items():
            np.testing.assert_array_equal(arrays[name], values)
        if n < 5:
            tiers[ORDER[n]] += 1
    assert all(a > b for a, b in zip(back.bits, back.bits[1:], strict=False))
    saved = save(*back.rung(3, again), tmp_path / "rung")
    assert load(tmp_path / "rung")[0].layers == saved.layers
    for n in (-1, 6):
        with pytest.raises(TurboqError, match=rf"rung {n} must be within 0\.\.5"):
            back.rung(n, again)


def save_and(made, stored, folder):
    save_ladder(made, stored, folder)
    return folder


def test_arrays_that_tiers_share_are_stored_once(ladder, tmp_path):
    """PerHead's mean does not depend on its bits; its codebook does."""
    made, stored = ladder
    means = [name for name in stored if name.endswith(".mean") or ".mean." in name]
    # Layer 0 and 1 k: by head in the first tier, stacked in the others; 0 v and 1 v: stacked.
    assert sorted(means) == sorted(
        [f"layers.{i}.k.heads.{h}.mean" for i in (0, 1) for h in range(3)]
        + [f"layers.{i}.{s}.mean" for i in (0, 1) for s in "kv"]
    )
    whole = sum(x.nbytes for n in range(made.rungs) for x in made.rung(n, stored)[1].values())
    assert sum(x.nbytes for x in stored.values()) < whole / 3
    values = np.ones(3, np.float32)
    places = {"a": values}
    assert shared({"a": values * 2}, places) == {"a": "a.1"}
    assert shared({"a": values}, places) == {"a": "a"}
    assert shared({"a": values * 2}, places) == {"a": "a.1"}


def test_a_saved_ladder_satisfies_its_schema_and_replaces_another(ladder, tmp_path):
    made, stored = ladder
    save_ladder(made, stored, tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    schema = ladder_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads((tmp_path / "ladder.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    for key in document:
        broken = {k: x for k, x in document.items() if k != key}
        assert not jsonschema.Draft202012Validator(schema).is_valid(broken), key
    other = {name: x * np.float32(0.5) for name, x in stored.items()}
    save_ladder(made, other, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert len(files) == len(first) == 2
    assert files & first == {"ladder.json"}
    np.testing.assert_array_equal(load_ladder(tmp_path)[1]["layers.0.v.mean"],
                                  other["layers.0.v.mean"])  # fmt: skip


def test_a_ladder_where_a_plan_is_asked_is_named(ladder, tmp_path):
    save_ladder(*ladder, tmp_path)
    for path in (tmp_path, tmp_path / "ladder.json"):
        with pytest.raises(TurboqError, match="is a ladder of plans: take one of them with"):
            load(path)
    save(*plan_of([0, 0, 0, 0]), tmp_path / "plan")
    with pytest.raises(TurboqError, match=r"ladder.json"):
        load_ladder(tmp_path / "plan")
    with pytest.raises(TurboqError, match="is this a ladder"):
        load_ladder(tmp_path / "plan" / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["order"].append(1), r"order: must name side 1 0 times"),
        (lambda d: d["order"].pop(), r"order: must name side 0 2 times"),
        (lambda d: d["order"].append(9), r"order: names side 9, of 4"),
        (lambda d: d["loss"].pop(), r"loss: must be 6 numbers"),
        (lambda d: d["sides"].reverse(), r"sides: must be K and V of every layer"),
        (lambda d: d["sides"][0]["tiers"].reverse(), r"sides\[0\].tiers: have .* must fall"),
        (
            lambda d: d["sides"][0]["tiers"][2]["store"].update(dim=8),
            "k.dim: 8, but the model's k_dim is 16",
        ),
        (lambda d: d["sides"][1]["tiers"][0]["arrays"].pop("mean"), "belongs to no tier|missing"),
        (lambda d: d.update(colour=3), "colour: unknown field"),
        (lambda d: d.update({"x-own": 3}), "own .x-., which a ladder cannot keep"),
        (lambda d: d.update(ladder_version=2), "ladder_version: must be 1"),
    ],
)
def test_a_wrong_field_is_one_line(ladder, tmp_path, change, message):
    save_ladder(*ladder, tmp_path)
    path = tmp_path / "ladder.json"
    document = json.loads(path.read_text())
    change(document)
    document.pop("hash")
    path.write_text(json.dumps(document | {"hash": plan_hash(document)}))
    with pytest.raises(TurboqError) as error:
        load_ladder(tmp_path)
    assert re.search(message, str(error.value))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_was_edited_or_damaged_is_refused(ladder, tmp_path):
    save_ladder(*ladder, tmp_path)
    path = tmp_path / "ladder.json"
    text = path.read_text()
    path.write_text(text.replace('"sinks": 2', '"sinks": 3'))
    with pytest.raises(TurboqError, match="hash: is not that of the content"):
        load_ladder(tmp_path)
    path.write_text(text)
    (side,) = tmp_path.glob("*.safetensors")
    raw = bytearray(side.read_bytes())
    raw[-1] ^= 1
    side.write_bytes(raw)
    with pytest.raises(TurboqError, match="is damaged or exchanged"):
        load_ladder(tmp_path)
    side.unlink()
    with pytest.raises(TurboqError, match="no such"):
        load_ladder(tmp_path)
    odd = dict(ladder[1], extra=np.zeros(1, np.float32))
    with pytest.raises(TurboqError, match="extra: tensor belongs to no tier"):
        save_ladder(ladder[0], odd, tmp_path / "new")
    assert not (tmp_path / "new").exists()
