"""The published JSON Schema and the parser say the same, as far as a schema can say it."""

import dataclasses
import json
import typing

import jsonschema
import numpy as np
import plan_cases
import plan_mutations
import pytest

from turboq.codecs import CODECS
from turboq.numbers.rope import Rope, Scaling
from turboq.plan import PlanConflict, PlanError, document, save, schema, types
from turboq.plan.document import TableUse, parse, plan_hash
from turboq.plan.geometry import LayerGeometry, ModelGeometry
from turboq.plan.provenance import Measurement, Provenance, Quality, TextSource
from turboq.plan.read import fields_of, optional_fields
from turboq.plan.strict import parse_json


@pytest.fixture(scope="module")
def validator():
    """JSON Schema takes 4.0 for an integer; plans, more strictly, do not."""
    base = jsonschema.Draft202012Validator
    strict = base.TYPE_CHECKER.redefine("integer", lambda _, x: type(x) is int)
    return jsonschema.validators.extend(base, type_checker=strict)(schema())


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("plans")
    return [document(save(*make(), folder)) for make in (plan_cases.plain, plan_cases.rich)]


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema_version"]["const"] == types.SCHEMA_VERSION


def test_saved_plans_satisfy_it(validator, documents, tmp_path):
    for doc in documents:
        validator.validate(doc)
    save(*plan_cases.rich(), tmp_path)
    validator.validate(json.loads((tmp_path / "plan.json").read_text()))


def test_every_codec_is_published_with_its_fields():
    defs = schema()["$defs"]
    assert [d["$ref"].split("/")[-1] for d in defs["codecs"]["oneOf"]] == list(CODECS)
    for name, cls in CODECS.items():
        assert list(defs[name]["properties"]) == ["codec", *fields_of(cls)], name
        required = [field for field in fields_of(cls) if field not in optional_fields(cls)]
        assert defs[name]["required"] == ["codec", *required], name


def test_a_field_that_came_later_is_left_out_at_its_default(validator, documents):
    doc = json.loads(json.dumps(documents[1]))
    assert doc["layers"][1]["k"]["heads"]["1"]["mean"] is True
    assert "mean" not in doc["layers"][0]["k"]["heads"]["1"]
    doc["layers"][0]["k"]["heads"]["1"]["mean"] = False
    assert not validator.is_valid(doc)
    with pytest.raises(PlanError, match=r"layers\[0\]\.k\.heads\.1\.mean: .*leave the field out"):
        parse(doc | {"hash": plan_hash(doc)})


@pytest.mark.parametrize(
    ("cls", "where"),
    [
        (ModelGeometry, "model"),
        (LayerGeometry, "geometry"),
        (Rope, "rope"),
        (Scaling, "rope_scaling"),
        (types.LayerPlan, "layer"),
        (types.ArrayFile, "arrays"),
        (Provenance, "provenance"),
        (Quality, "quality"),
        (Measurement, "measurement"),
    ],
)
def test_every_record_is_published_with_its_fields(cls, where):
    found = schema()["$defs"][where]
    due = [*fields_of(cls), *getattr(cls, "derived", ())]
    assert list(found["properties"]) == due
    assert found["required"] == [name for name in due if name not in optional_fields(cls)]


def test_inline_records_are_published_with_their_fields():
    top, defs = schema()["properties"], schema()["$defs"]
    for cls, found in [
        (types.Producer, top["producer"]),
        (types.TokenPolicy, top["tokens"]),
        (types.Bytes, top["bytes"]),
        (TableUse, top["tables"]["items"]),
        (TextSource, defs["provenance"]["properties"]["texts"]["items"]),
        (types.TensorSpec, defs["arrays"]["properties"]["tensors"]["additionalProperties"]),
    ]:
        assert list(found["properties"]) == [f.name for f in dataclasses.fields(cls)]
        assert found["required"] == list(found["properties"])
    assert typing.get_type_hints(types.Plan).keys() - {"extra"} <= top.keys()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("unchecked")
def test_schema_and_parser_agree_on_mutated_plans(validator, documents, seed):
    """Schema accepts <=> the parser accepts, or refuses for a conflict between fields."""
    rng = np.random.default_rng(seed)
    count = dict.fromkeys(("accepted", "refused", "conflict"), 0)
    for trial in range(300):
        doc = plan_mutations.mutate(documents[trial % 2], rng)
        if isinstance(doc.get("hash"), str):
            doc["hash"] = plan_hash(doc)
        message = ""
        try:
            parse(parse_json(json.dumps(doc).encode()))
            outcome = "accepted"
        except PlanConflict:
            outcome = "conflict"
        except PlanError as error:
            outcome, message = "refused", str(error)
        count[outcome] += 1
        # A first conflict may hide a later malformed field; free values have no schema.
        if outcome == "accepted" or (outcome == "refused" and "text of 4097" not in message):
            assert validator.is_valid(doc) == (outcome == "accepted"), (message, doc)
    assert count["accepted"] > 30
    assert count["refused"] > 100
    assert count["conflict"] > 4
