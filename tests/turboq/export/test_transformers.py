"""The executed export for transformers: what it computed there (scripts/export_oracles), here."""

import ast
import hashlib
import importlib.resources
import json
import math
from pathlib import Path

import numpy as np
import pytest
import transformers_cases as cases
from plan_cases import geometry, random_fit
from tolerances import TOL

from turboq.codecs import KiviKey, KiviValue, Transform, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, export
from turboq.export.hf_transformers import FILES
from turboq.plan import collect_arrays, load, uniform_plan

GOLDEN = json.loads((cases.GOLDEN / "export" / "transformers.json").read_text())


def test_the_modules_are_those_that_ran():
    for name, digest in GOLDEN["modules"].items():
        source = Path(str(importlib.resources.files("turboq.export") / FILES[name]))
        found = hashlib.sha256(source.read_bytes()).hexdigest()
        assert found == digest, f"{source.name} was changed: run ./scripts/export_oracles"


def test_the_modules_need_nothing_but_torch_and_transformers():
    for source in FILES.values():
        text = (importlib.resources.files("turboq.export") / source).read_text()
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
        own = {name.removesuffix(".py") for name in FILES}
        allowed = {"torch", "transformers", "numpy", "math", "json", "pathlib", "struct"}
        assert names <= own | allowed


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_tokens_and_bytes_are_ours(name):
    model, plan, arrays = cases.planned(name)
    prompt = cases.prompts(model)
    found = GOLDEN["cases"][name]
    tolerance = TOL["transformers_gain" if name == "gemma3" else "transformers_cache"]
    first = np.asarray(found["eager"]["generated"], np.int32)
    # The second sequence is not padded: one pass over prompt and continuation is all of it.
    whole = np.concatenate([prompt, np.stack([first[1], first[1]])], axis=1)
    ours = cases.logits(model, plan, arrays, whole)
    for row in found.values():
        got = np.asarray(row["logits"])
        due = ours[:, : cases.LENGTH : 5, ::4]
        np.testing.assert_allclose(got, due, rtol=0, atol=tolerance)
        assert row["pieces_apart"] < tolerance
        assert row["generated"] == row["alone"] == first.tolist()
    steps = ours[1, cases.LENGTH - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(steps, first[1])

    policy, tokens = plan.tokens, cases.BATCH * cases.LENGTH
    rows = sum(math.ceil(bits / 8) for bits in plan.bytes.layer_bits_per_token)
    exact = sum(la.kv_heads * (la.k_dim + la.v_dim) for la in plan.model.layers)
    exact *= np.dtype("f4" if policy.exact_dtype == "float32" else "f2").itemsize
    kept = cases.BATCH * (policy.sinks + policy.recent)
    assert found["sdpa"]["nbytes"] == tokens * rows + kept * exact


def test_the_cache_costs_something():
    """Otherwise equal logits would say nothing: the model's own are far from the plan's."""
    model = cases.load_model(str(cases.GOLDEN / "llama3"))
    prompt = cases.prompts(model)
    own = np.asarray(cases.forward(model, prompt)[0])[:, ::5, ::4]
    got = np.asarray(GOLDEN["cases"]["llama3"]["sdpa"]["logits"])
    assert np.abs(own - got).max() > 1000 * TOL["transformers_cache"]


MODEL = geometry(layers=2, kv_heads=2, k_dim=64, v_dim=64)


def planned(k, v=None):
    plan = uniform_plan(MODEL, k=k, v=v or k)
    return plan, collect_arrays(plan, random_fit(MODEL))


def test_the_export_holds_every_head_exactly(tmp_path):
    codec = Transform(
        dim=64, segments=((32, 3), (16, 1)), quantizer="window", states=16, gain="code", gain_bits=3
    )
    pair = planned(codec, TurboQuantMSE(dim=64, bits=3))
    report = export(*pair, ENGINES["transformers"], tmp_path / "out")
    assert report.status == "exact"
    bits = 2 * (112 + 3 + 3 * 64 + 16)
    assert report.layers[0].engine_bytes == math.ceil(bits / 8) == bits / 8 + 0.25
    assert {*FILES} <= {path.name for path in (tmp_path / "out").iterdir()}
    loaded, _ = load(tmp_path / "out" / "engine_plan")
    assert loaded.layers == pair[0].layers


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (KiviKey(dim=64, bits=4), r"layer 0, K of head 0 \(kivi_key\)"),
        (Transform(dim=64, segments=((8, 3),), quantizer="trellis"), "quantizer='trellis'"),
    ],
)
def test_codecs_that_it_cannot_read_are_refused_by_name(codec, says):
    pair = planned(codec, KiviValue(dim=64, bits=4) if isinstance(codec, KiviKey) else codec)
    with pytest.raises(TurboqError, match=says) as error:
        ENGINES["transformers"].project(*pair, Options())
    assert "--candidates=window" in str(error.value)
