"""Geometry of loaded models and plans made from them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from stat_cases import random_windows

from turboq import codecs as c
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import PlanConflict, PlanError, check_arrays, check_model
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry, spec_geometry
from turboq_calibrate.models.spec import LayerSpec, Rope
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_geometry_of_a_windowed_model_is_read_from_its_files():
    model = load_model(GOLDEN / "qwen2_window", resident=False)
    geometry = model_geometry(model)
    assert geometry.fingerprint == model.fingerprint
    assert geometry.family == "qwen2"
    assert [layer.window for layer in geometry.layers] == [s.window for s in model.spec.layers]
    assert {layer.window is None for layer in geometry.layers} == {True, False}
    assert [layer.path for layer in geometry.layers[:2]] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert all(layer.rope_dim is None for layer in geometry.layers)


def test_layers_that_own_no_cache_get_no_plan():
    spec = load_model(GOLDEN / "llama3", resident=False).spec
    owner = spec.layers[0]
    partial = dataclasses.replace(owner, rope=Rope(theta=1e4, dim=owner.head_dim // 2))
    borrower = dataclasses.replace(owner, borrows_cache_of=0)
    linear = dataclasses.replace(owner, kv_heads=0, rope=None)
    layers: tuple[LayerSpec, ...] = (owner, borrower, linear, partial)
    geometry = spec_geometry(dataclasses.replace(spec, layers=layers), "f" * 64)
    assert [layer.index for layer in geometry.cache_layers] == [0, 3]
    assert geometry.layers[1].borrows_cache_of == 0
    assert geometry.layers[2].rope_layout == "none"
    assert geometry.layers[3].rope_dim == owner.head_dim // 2
    assert [layer.rope for layer in geometry.layers] == [x.rope for x in layers]
    codec = TurboQuantMSE(dim=owner.head_dim, bits=2)
    plan, arrays = make_plan(geometry, k=codec, v=codec)
    assert [layer.index for layer in plan.layers] == [0, 3]
    assert arrays == {}


def test_copies_of_a_model_share_a_geometry_only_with_equal_weights():
    folder = load_model(GOLDEN / "llama3", resident=False)
    codec = TurboQuantMSE(dim=16, bits=2)
    plan, _ = make_plan(model_geometry(folder), k=codec, v=codec)
    check_model(plan, model_geometry(load_model(GOLDEN / "llama3", resident=False)))
    other = dataclasses.replace(model_geometry(folder), fingerprint="0" * 64)
    with pytest.raises(PlanConflict, match="fingerprint"):
        check_model(plan, other)


def test_a_calibrated_codec_needs_statistics():
    geometry = model_geometry(load_model(GOLDEN / "llama3", resident=False))
    with pytest.raises(TurboqError, match="give --statistics"):
        make_plan(geometry, k=TurboQuantMSE(dim=16, bits=3), v=PerHead(dim=16, bits=3))


def observed(folder, **recipe):
    """The geometry and statistics of a tiny model over random windows."""
    model = load_model(GOLDEN / "llama3")
    statistics = observe(
        model, random_windows(model.spec.vocab), folder, ObserveRecipe(**recipe), progress=False
    )
    return model_geometry(model), statistics


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return observed(tmp_path_factory.mktemp("statistics"), skip=2)


@pytest.mark.parametrize(
    "codec",
    [
        c.PerHead(dim=16, bits=2),
        c.Transform(dim=16, segments=((8, 3), (8, 1)), gain="code"),
        c.RopeBlock(dim=16, segments=((16, 2),)),
        c.FP8(dim=16, scale="tensor"),
        c.Oscar(dim=16),
        c.TurboQuantOutliers(dim=16, bits=2, outlier_bits=3),
    ],
    ids=lambda codec: codec.name,
)
@pytest.mark.parametrize("k_rope", ["after", "before", "block:16"])
def test_any_calibrated_codec_is_fitted_from_a_folder(known, codec, k_rope):
    """Every layer and side gets what the codec makes of the keys as they are stored."""
    geometry, statistics = known
    if k_rope == "block:16" and "mean" not in codec.array_shapes:
        with pytest.raises(PlanError, match=f"block:16 turns each .*{codec.name} has none: take"):
            make_plan(geometry, k=codec, v=codec, statistics=statistics, k_rope=k_rope)
        return
    plan, arrays = make_plan(geometry, k=codec, v=codec, statistics=statistics, k_rope=k_rope)
    check_arrays(plan, arrays)
    for layer in plan.layers:
        assert layer.k.rope == k_rope
        for side, rope in (("k", k_rope), ("v", "after")):
            due = codec.fit(statistics.layers[layer.index].observed(side, rope=rope))
            for name, values in due.items():
                np.testing.assert_array_equal(arrays[f"layers.{layer.index}.{side}.{name}"], values)


def test_an_error_names_the_layer_the_side_and_the_command(known, tmp_path):
    geometry, statistics = known
    eight = PerHead(dim=16, bits=8)
    with pytest.raises(TurboqError, match=r"layer 0, k: .*per_head.* 256 tokens or more, \d+ tok"):
        make_plan(geometry, k=eight, v=eight, statistics=statistics)
    two = TurboQuantMSE(dim=16, bits=2)
    with pytest.raises(TurboqError, match=r"layer 0, v: "):
        make_plan(geometry, k=two, v=eight, statistics=statistics)
    geometry, none = observed(tmp_path, reservoir=0)
    with pytest.raises(TurboqError, match=r"layer 0, k: .*turboq calibrate"):
        make_plan(geometry, k=PerHead(dim=16, bits=2), v=two, statistics=none)
