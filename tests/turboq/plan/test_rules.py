"""Rules that combine, and the published table of mixed K and V under both ways to count."""

from __future__ import annotations

import dataclasses

import plan_cases
import pytest

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, Exact, PerHead, TurboQuantMSE, TurboQuantProd
from turboq.codecs.ggml import Ggml, mainline
from turboq.plan import LayerGeometry, ModelGeometry, load, save
from turboq.plan.rules import (
    boundary,
    by_layer,
    nominal_bits,
    resolve,
    rule_plan,
    sides,
    skip_layers,
)

Q8, Q4 = Ggml(dim=128, type="q8_0"), Ggml(dim=128, type="q4_0")
F16 = Exact(dim=128, dtype="float16")


def dense(layers: int, kv_heads: int = 4, dim: int = 128) -> ModelGeometry:
    return plan_cases.geometry(layers=layers, kv_heads=kv_heads, k_dim=dim, v_dim=dim)


def chosen(geometry: ModelGeometry, rule, side="k", head=0) -> list[Codec]:
    choose = resolve(geometry, rule)
    return [choose(layer.index, side, head) for layer in geometry.cache_layers]


THREE = TurboQuantMSE(dim=128, bits=3)
TABLE = [  # K, V, the table's bytes per token, ours: 60 layers, 4 heads, 128 channels
    (F16, F16, 122_880, 122_880),
    (F16, Q8, 92_160, 61_440 + 60 * 4 * 136),  # 34 bytes per 32 values
    (Q8, Q8, 61_440, 2 * 60 * 4 * 136),
    (Q4, Q8, 46_080, 60 * 4 * (72 + 136)),  # 18 bytes per 32 values
    (THREE, THREE, 23_040, 2 * 60 * 4 * (48 + 2)),  # one float16 per vector
]


@pytest.mark.parametrize(("k", "v", "nominal", "stored"), TABLE)
def test_published_mixed_table(k, v, nominal, stored):
    """122,880 / 92,160 / 61,440 / 46,080 / 23,040 bytes: the table leaves the scales out."""
    plan = rule_plan(dense(60), sides(k=k, v=v))
    codecs = [c for layer in plan.layers for s in ("k", "v") for c in plan.codecs(layer.index, s)]
    assert sum(map(nominal_bits, codecs)) / 8 == nominal
    assert plan.bytes_per_token == stored


def test_nominal_bits_count_codes_alone():
    """Whatever channels share is left out, whatever each has of its own is counted."""
    for codec, bits in (
        (Exact(dim=64, dtype="float32"), 64 * 32),
        (TurboQuantProd(dim=64, bits=3), 64 * 3),
        (PerHead(dim=64, bits=2, scale="head"), 64 * 2),
        (Ggml(dim=64, type="f16"), 64 * 16),
        (Ggml(dim=64, type="q5_1"), 64 * 5),
        (Ggml(dim=64, type="iq4_nl"), 64 * 4),
    ):
        assert nominal_bits(codec) == bits
        assert codec.bits_per_vector >= bits


def test_hybrid_by_layer_range():
    """Q8_0 for layers 0-10, Q4_0 from 11: 11 and 17 layers of a model of 28."""
    geometry = dense(28, kv_heads=2)
    rule = by_layer({11: Q4, 0: Q8})
    assert chosen(geometry, rule) == chosen(geometry, rule, "v") == [Q8] * 11 + [Q4] * 17
    plan = rule_plan(geometry, rule, policy=TokenPolicy(sinks=4))
    assert plan.tokens.sinks == 4
    assert plan.bytes_per_token == 2 * 2 * (11 * 136 + 17 * 72)
    assert plan.bytes.layer_bits_per_token[10:12] == (2 * 2 * 136 * 8, 2 * 2 * 72 * 8)


def test_rules_nest_by_layer_side_and_head():
    def every_other_head(layer, side, head):
        return Q8 if head % 2 else F16

    rule = by_layer({0: sides(k=every_other_head, v=Q4), 2: F16, 3: every_other_head})
    geometry = dense(5)
    assert chosen(geometry, rule) == chosen(geometry, rule, head=2) == [F16] * 5
    assert chosen(geometry, rule, head=1) == [Q8, Q8, F16, Q8, Q8]
    assert chosen(geometry, rule, "v", 1) == [Q4, Q4, F16, Q8, Q8]
    side = rule_plan(geometry, rule).layers[0].k
    assert (side.codec, side.heads) == (F16, {1: Q8, 3: Q8})


@pytest.mark.parametrize(("first", "last"), [(2, 2), (0, 3), (1, 0), (0, 0), (3, 4)])
def test_boundary_layers(first, last):
    geometry = dense(7)
    due = [Q8] * first + [Q4] * (7 - first - last) + [Q8] * last
    assert chosen(geometry, boundary(geometry, Q4, Q8, first=first, last=last)) == due
    only_values = sides(k=Q4, v=boundary(geometry, Q4, Q8, first=first, last=last))
    assert chosen(geometry, only_values) == [Q4] * 7
    assert chosen(geometry, only_values, "v") == due


def test_boundary_counts_layers_that_own_a_cache():
    """All kinds of layers: 0 and 2 own a cache, 1 has none, 3 borrows."""
    geometry = plan_cases.hybrid()
    low, high = TurboQuantMSE(dim=8, bits=2), TurboQuantMSE(dim=8, bits=8)
    rule = boundary(geometry, low, high, first=0, last=1)
    plan = rule_plan(geometry, rule)
    assert [layer.index for layer in plan.layers] == [0, 2]
    assert [layer.k.codec for layer in plan.layers] == [
        dataclasses.replace(low, dim=16),
        dataclasses.replace(high, dim=24),
    ]
    assert [layer.v.codec for layer in plan.layers] == [low, high]


def windowed() -> ModelGeometry:
    """Layer 2 of 0..3 is full, the others slide."""
    model = dense(4)
    layers = tuple(
        dataclasses.replace(x, window=None if x.index == 2 else 64) for x in model.layers
    )
    return dataclasses.replace(model, layers=layers)


@pytest.mark.parametrize(
    ("skipped", "exact"),
    [
        ((), ()),
        ((1, "3"), (1, 3)),
        (("sliding_window",), (0, 1, 3)),
        (["sliding_window", 2], range(4)),
    ],
)
def test_skipped_layers_stay_exact(skipped, exact):
    geometry = windowed()
    due = [Exact(dim=128) if i in exact else Q4 for i in range(4)]
    for side in ("k", "v"):
        assert chosen(geometry, skip_layers(geometry, Q4, skipped), side) == due
    half = skip_layers(geometry, Q4, [0], dtype="float16")
    assert chosen(geometry, half) == [F16, Q4, Q4, Q4]


def test_codecs_follow_the_head_dim_of_their_layer():
    layers = tuple(
        LayerGeometry(index=i, path=str(i), kv_heads=1, q_heads=2, k_dim=k, v_dim=v)
        for i, (k, v) in enumerate([(64, 128), (192, 128), (80, 64)])
    )
    geometry = ModelGeometry(fingerprint="f", family="f", name="dims", layers=layers)
    choose = resolve(geometry, by_layer({0: Q8, 2: F16}))
    assert [choose(i, "k", 0).dim for i in range(3)] == [64, 192, 80]
    assert [choose(i, "v", 0).dim for i in range(3)] == [128, 128, 64]
    with pytest.raises(ValueError, match="dim=80 must be a multiple of 32, a block of q8_0"):
        rule_plan(geometry, Q8)


def test_a_plan_of_rules_is_saved_and_loaded(tmp_path):
    geometry = dense(6)
    rule = skip_layers(
        geometry, sides(k=mainline(128, "k", "q8_0"), v=mainline(128, "v", "q4_0")), [0]
    )
    plan = save(rule_plan(geometry, rule), {}, tmp_path)
    assert load(tmp_path)[0] == plan
    assert plan.layers[5].v.codec == Ggml(dim=128, type="q4_0", rotation="walsh", rotation_block=64)


def test_bad_rules_are_refused():
    geometry = windowed()
    for starts in ({}, {1: Q4}, {-1: Q4, 0: Q8}):
        with pytest.raises(ValueError, match=r"starts=.* must begin with layer 0"):
            by_layer(starts)
    for first, last in ((3, 2), (-1, 0), (0, 5)):
        with pytest.raises(ValueError, match="together at most 4"):
            boundary(geometry, Q4, Q8, first=first, last=last)
    for name in (4, "-1", "layer3", "", "03"):
        with pytest.raises(ValueError, match=r"is not in tiny: name one .* 0\.\.3"):
            skip_layers(geometry, Q4, [name])
    with pytest.raises(ValueError, match="'sliding_window' is not in tiny"):
        skip_layers(dense(2), Q4, ["sliding_window"])
