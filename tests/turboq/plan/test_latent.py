"""Plans of multi-head latent attention: V is the latent vector, K the rotated part beside it."""

import dataclasses
import json

import jsonschema
import pytest

from turboq.codecs import Exact, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, export
from turboq.plan import (
    LayerGeometry,
    ModelGeometry,
    PlanConflict,
    load,
    save,
    schema,
    uniform_plan,
)
from turboq.what_fits.geometries import geometry as named_geometry
from turboq.what_fits.sizes import plan_geometry
from turboq.what_fits.storage import check_plan, of_plan


def layer(index=0, **fields):
    sizes = {"kv_heads": 1, "q_heads": 128, "k_dim": 64, "v_dim": 512, "latent": True}
    return LayerGeometry(index=index, path=f"layers.{index}", **sizes | fields)


def model(*layers):
    return ModelGeometry(fingerprint="f", family="deepseek_v3", name="x", layers=layers)


def deepseek_v3(bits=None, layers=61):
    """576 numbers of a layer, in bfloat16 or in bits and a scale of 16 for each part."""
    codec = Exact(dim=64) if bits is None else TurboQuantMSE(dim=64, bits=bits)
    return uniform_plan(model(*(layer(i) for i in range(layers))), k=codec, v=codec)


def test_bytes_of_a_token_are_those_of_one_vector_of_a_layer():
    assert deepseek_v3().bytes_per_token == 61 * 576 * 2
    plan = deepseek_v3(bits=3)
    assert plan.bytes_per_token == 61 * (576 * 3 + 2 * 16) / 8
    published = named_geometry("deepseek-v3")
    assert [x.k_dim for x in published.layers] == [576] * 61
    assert plan_geometry(plan.model).layers == published.layers
    check_plan(plan, published)
    stored = of_plan(plan, "x")
    assert stored.engine.kv_bytes(1000) == 1000 * plan.bytes_per_token
    assert plan.residency(1024).baseline == 1024 * 61 * 576 * 2
    assert plan.kv_layers({})[0].latent


def test_documents_say_it_where_it_is_so(tmp_path):
    plan = deepseek_v3(bits=3, layers=2)
    save(plan, {}, tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    jsonschema.validate(document, schema())
    assert document["model"]["layers"][0]["latent"] is True
    assert load(tmp_path)[0].model == plan.model
    whole = model(*(dataclasses.replace(x, latent=False) for x in plan.model.layers))
    plain = dataclasses.replace(plan, model=whole)
    save(plain, {}, tmp_path / "plain")
    document = json.loads((tmp_path / "plain" / "plan.json").read_text())
    assert "latent" not in document["model"]["layers"][0]


def test_what_contradicts_it_is_refused():
    with pytest.raises(PlanConflict, match="latent: one vector of all heads, but kv_heads is 2"):
        layer(kv_heads=2)
    borrower = layer(1, borrows_cache_of=0, latent=False)
    with pytest.raises(PlanConflict, match="latent is False here, True there"):
        model(layer(), borrower)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_refuse_it_by_name(name, tmp_path):
    plan = deepseek_v3(bits=3, layers=1)
    out = tmp_path / "out"
    if name == "reader":
        assert export(plan, {}, ENGINES[name], out, Options()).engine == name
        return
    with pytest.raises(TurboqError, match=f"^{name}: x caches latent vectors .*--engine=reader"):
        export(plan, {}, ENGINES[name], out, Options())
    assert not out.exists()
