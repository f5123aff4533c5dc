"""Plans that store keys before their rotary embedding: what engines hold, and the reader."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from plan_cases import geometry, random_fit
from tolerances import TOL

from turboq.codecs import FP8, NVFP4, Ggml, PerChannel, PerHead
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, qwix_arrays, reader_example
from turboq.export.base import entries
from turboq.export.reader import page
from turboq.export.report import engine_plan, make_report
from turboq.export.static import peaks
from turboq.numbers.rope import Rope, Scaling
from turboq.plan import ModelGeometry, collect_arrays, save, uniform_plan
from turboq.plan.geometry import ROPE_FORMS, RopeForm

D = 64
LLAMA3 = Scaling(
    type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=128.0
)
ROPES = {
    "llama3": Rope(dim=D, theta=5e5, scaling=LLAMA3),
    "linear": Rope(dim=D, theta=1e4, scaling=Scaling(type="linear", factor=2.0)),
    "partial": Rope(dim=16, theta=1e4, layout="interleaved"),
    "given": Rope(dim=4, theta=1e4, inv_freq=(0.5, 0.125)),
}


def model(rope: Rope) -> ModelGeometry:
    plain = geometry(layers=6, kv_heads=2, k_dim=D, v_dim=D)
    layers = tuple(
        dataclasses.replace(x, rope=rope, rope_layout=rope.layout, rope_dim=rope.dim)
        for x in plain.layers
    )
    return dataclasses.replace(plain, layers=layers)


def planned(codec, rope: Rope = ROPES["llama3"], form: RopeForm = "before"):
    of = model(rope)
    plan = uniform_plan(of, k=codec, v=codec, k_rope=form)
    return plan, collect_arrays(plan, random_fit(of))


def test_an_engine_holds_the_same_codec_of_rotated_keys():
    """Data-free: approximated, said so, values exact; its own plan stores keys after RoPE."""
    plan, arrays = planned(Ggml(dim=D, type="q8_0"))
    engine = ENGINES["ik_llama.cpp"]
    found = engine.project(plan, arrays, Options())
    report = make_report(plan, arrays, engine, found, [*found.files, "engine_plan/plan.json"])
    assert report.status == "approximated"
    for _, side, head in report.entries():
        assert head.status == ("approximated" if side == "k" else "exact")
        assert head.dropped == (("keys before RoPE -> after",) if side == "k" else ())
    made = engine_plan(plan, arrays, found)
    assert made is not None
    assert {layer.k.rope for layer in made[0].layers} == {"after"}


@pytest.mark.parametrize(
    ("engine", "codec"),
    [
        ("vllm", FP8(dim=D, scale="head")),
        ("sglang", FP8(dim=D, scale="head")),
        ("ort-genai", PerChannel(dim=D, bits=8)),
        ("ort-genai", FP8(dim=D, scale="head")),
        ("modelopt", FP8(dim=D, scale="head")),
        ("modelopt", NVFP4(dim=D)),
    ],
)
def test_static_ranges_are_widened_to_what_rotated_keys_can_reach(engine, codec):
    plan, arrays = planned(codec)
    held = ENGINES[engine].project(plan, arrays, Options()).held
    for entry in entries(plan, arrays):
        if entry.side == "v":
            continue
        before = dataclasses.replace(entry, rope="after")
        a = peaks(before)
        assert a is not None
        reach = np.hypot(a, np.roll(a, D // 2))  # both channels of a pair at once
        found = peaks(dataclasses.replace(before, **_held(held[entry.place])))
        assert found is not None
        assert np.all(found >= reach * (1 - TOL["rule_f16"]))


def _held(held):
    return {"codec": held.codec, "arrays": dict(held.arrays)}


def test_qarrays_hold_no_fit_of_unrotated_keys():
    plan, arrays = planned(PerChannel(dim=D, bits=8))
    held = ENGINES["qwix"].project(plan, arrays, Options()).held
    assert "before RoPE" in held[0, "k", 0].note
    assert held[0, "v", 0].format == "QArray"
    x = jnp.zeros((1, 2, 2, D))
    with pytest.raises(TurboqError, match="keys before RoPE"):
        qwix_arrays.layer_qarrays(plan.kv_layer(0, arrays), x, x)


@pytest.mark.parametrize("name", ENGINES)
def test_constraints_name_the_forms_that_an_engine_loads(name):
    due = ROPE_FORMS if name in ("reader", "transformers") else ("after",)
    rules = ENGINES[name].constraints(model(ROPES["llama3"]))
    assert {rule.k_rope for rule in rules} == {due}


@pytest.mark.parametrize("form", ["before", "block:32"])
@pytest.mark.parametrize("name", ROPES)
def test_the_reader_turns_what_it_decodes(name, form, tmp_path):
    codec = PerHead(dim=D, bits=3)
    plan, arrays = planned(codec, ROPES[name], form)
    found = ENGINES["reader"].project(plan, arrays, Options())
    report = make_report(plan, arrays, ENGINES["reader"], found, list(found.files))
    assert report.status == "exact"
    save(plan, arrays, tmp_path)
    read, tensors = reader_example.read_plan(tmp_path)
    assert reader_example.codec_of(read, 1, "k", 1) == codec.config()
    entry = next(e for e in entries(plan, arrays) if e.place == (1, "k", 1))
    fields = page(entry)
    of = reader_example.arrays_of(read, tensors, 1, "k", 1)
    codes = reader_example.unpack(fields["codes"])
    keys = reader_example.decode(codec.config(), of, codes, fields["scale"][:, 0])
    got = reader_example.turn(read, 1, of, keys, np.arange(len(keys)))
    np.testing.assert_allclose(got, fields["rotated"], atol=TOL["rope_rotate"])
    assert np.max(np.abs(got - keys)) > 0.5
