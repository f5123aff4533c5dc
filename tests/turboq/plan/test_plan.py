"""Making plans, resolving them to layers, saving and loading them, and what a bad field says."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import plan_cases
import pytest

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq.plan import (
    LayerGeometry,
    LayerPlan,
    Measurement,
    Plan,
    PlanConflict,
    PlanError,
    Provenance,
    Quality,
    SidePlan,
    TextSource,
    array_shapes,
    check_arrays,
    check_model,
    collect_arrays,
    diff,
    document,
    fingerprint,
    head_plan,
    load,
    save,
    summary,
    uniform_plan,
)
from turboq.plan.document import parse, plan_hash
from turboq.plan.rules import rule_plan, sides

CASES = pytest.mark.parametrize("make", [plan_cases.plain, plan_cases.rich, plan_cases.joined])


@CASES
def test_save_and_load_are_inverse(make, tmp_path):
    plan, arrays = make()
    saved = save(plan, arrays, tmp_path / "new" / "folder")
    loaded, found = load(tmp_path / "new" / "folder")
    assert loaded == saved
    assert dataclasses.replace(loaded, arrays=None) == plan
    assert loaded.extra == plan.extra
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    assert load(tmp_path / "new" / "folder" / "plan.json")[0] == saved
    assert (
        fingerprint(loaded) == json.loads((tmp_path / "new/folder/plan.json").read_text())["hash"]
    )


@CASES
def test_two_saves_write_equal_bytes(make, tmp_path):
    for name in ("a", "b"):
        save(*make(), tmp_path / name)
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["plan.json", "plan.safetensors"]


def test_a_layer_gets_its_codecs_and_arrays():
    plan, arrays = plan_cases.rich()
    layer = plan.kv_layer(2, arrays)
    assert layer.policy == TokenPolicy(sinks=4, recent=16, exact_dtype="float16")
    assert [g.heads for g in layer.groups] == [(0, 2), (1,), (3,)]
    for group in layer.groups:
        for side, codec, found in (("k", group.k, group.k_arrays), ("v", group.v, group.v_arrays)):
            assert codec == plan.codecs(2, side)[group.heads[0]]
            assert found.keys() == codec.array_shapes.keys()
            for array, values in found.items():
                due = [arrays[f"layers.2.{side}.heads.{h}.{array}"] for h in group.heads]
                assert isinstance(values, jnp.ndarray)
                np.testing.assert_array_equal(values, np.stack(due))
    stacked = plan_cases.plain()
    (group,) = stacked[0].kv_layer(1, stacked[1]).groups
    assert group.heads == (0, 1, 2)
    np.testing.assert_array_equal(group.k_arrays["mean"], stacked[1]["layers.1.k.mean"])
    assert len(plan.kv_layers(arrays)) == 2


def test_heads_that_differ_in_one_side_only_are_gathered_by_row():
    """The K side is stacked, yet groups (split by V) take their own rows of it."""
    geometry = plan_cases.geometry(layers=1, k_dim=16, v_dim=16)
    k = PerHead(dim=16, bits=2)

    def choose(index, side, head):
        return k if side == "k" else TurboQuantMSE(dim=16, bits=2 + head % 2)

    plan = head_plan(geometry, choose)
    arrays = collect_arrays(plan, plan_cases.random_fit(geometry))
    first, second = plan.kv_layer(0, arrays).groups
    assert (first.heads, second.heads) == ((0, 2), (1,))
    np.testing.assert_array_equal(first.k_arrays["mean"], arrays["layers.0.k.mean"][[0, 2]])
    np.testing.assert_array_equal(second.k_arrays["mean"], arrays["layers.0.k.mean"][[1]])


def test_collect_takes_each_head_from_the_fit_of_its_codec():
    geometry = plan_cases.geometry(layers=1)
    asked = []

    def choose(index, side, head):
        return Exact(dim=8) if side == "v" else PerHead(dim=16, bits=(2, 2, 5)[head])

    def fit(index, side, codec):
        asked.append((index, side, codec.bits))
        value = np.arange(3, dtype=np.float32) + 10 * codec.bits
        return {
            n: np.broadcast_to(value.reshape(3, 1), (3, *s)) for n, s in codec.array_shapes.items()
        }

    arrays = collect_arrays(head_plan(geometry, choose), fit)
    assert asked == [(0, "k", 2), (0, "k", 5)]
    means = [arrays[f"layers.0.k.heads.{h}.mean"][0] for h in range(3)]
    assert means == [20, 21, 52]
    with pytest.raises(PlanConflict, match=r"layers\.0\.k\.mean: the fit of per_head gave no"):
        collect_arrays(head_plan(geometry, choose), lambda *_: {})
    with pytest.raises(PlanConflict, match=r"layers\.0\.k\.mean: shape \[16\] must be \[3, 16\]"):
        collect_arrays(head_plan(geometry, choose), lambda *_: {"mean": np.zeros(16, np.float32)})


def test_head_plan_has_the_commonest_codec_as_default():
    plan, _ = plan_cases.rich()
    side = plan.layers[1].v
    assert (side.codec.name, sorted(side.heads)) == ("turboquant_prod", [1])
    same = head_plan(plan_cases.geometry(), lambda i, s, h: Exact(dim=16 if s == "k" else 8))
    uniform = uniform_plan(plan_cases.geometry(), k=Exact(dim=16), v=Exact(dim=8))
    assert same == uniform


def test_uniform_plan_takes_each_layer_at_its_own_dim():
    plan = uniform_plan(
        plan_cases.hybrid(), k=TurboQuantMSE(dim=64, bits=3, seed=5), v=Exact(dim=64)
    )
    assert [layer.index for layer in plan.layers] == [0, 2]
    assert [layer.k.codec.dim for layer in plan.layers] == [16, 24]
    assert {(layer.k.codec.bits, layer.k.codec.seed) for layer in plan.layers} == {(3, 5)}
    with pytest.raises(PlanError, match="layer 3 of all kinds owns no cache"):
        plan.kv_layer(3, {})
    with pytest.raises(PlanConflict, match=r"'?layers\.0\.k\.codebook\"? is missing"):
        uniform_plan(plan_cases.geometry(), k=PerHead(dim=16, bits=2), v=Exact(dim=8), arrays={})


def spoiled(arrays, name, change):
    out = dict(arrays)
    out[name] = change(out[name].copy()) if name in out else change(None)
    return out


def with_value(value):
    def change(x):
        x[..., 0] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "layers.9.k.mean",
            lambda _: np.zeros(1, np.float32),
            r'"layers\.9\.k\.mean" is not needed',
        ),
        ("layers.0.k.mean", lambda x: x.astype(np.float64), "float64 array must be float32"),
        ("layers.0.k.mean", lambda x: x[:2], r"shape \[2, 16\] must be \[3, 16\]"),
        ("layers.0.k.mean", with_value(np.nan), "3 of 48 values are NaN or infinite"),
        ("layers.1.v.mean", with_value(np.inf), r"^layers\.1\.v\.mean: 3 of 24 values are NaN"),
        ("layers.0.k.codebook", lambda x: x[:, ::-1], r"layers\.0\.k\.codebook: .* must ascend"),
        ("layers.0.v.scale", with_value(-1), r"layers\.0\.v\.scale: a scale must not be negative"),
    ],
)
def test_arrays_are_checked_before_anything_is_written(name, change, message, tmp_path):
    plan, arrays = plan_cases.plain()
    with pytest.raises(PlanConflict, match=message):
        save(plan, spoiled(arrays, name, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanConflict, match="is missing"):
        check_arrays(plan, {k: v for k, v in arrays.items() if k != "layers.0.k.mean"})
    with pytest.raises(PlanError, match=r"layers\.0\.k\.mean: fitted array is missing"):
        plan.kv_layer(0, {})


def test_array_names_and_shapes():
    plan, _ = plan_cases.rich()
    shapes = array_shapes(plan)
    assert shapes["layers.0.k.heads.0.mean"] == (16,)
    assert "layers.0.k.heads.1.mean" not in shapes  # data-free
    assert shapes["layers.2.v.heads.1.codebook"] == (8,)
    plain = array_shapes(plan_cases.plain()[0])
    assert plain["layers.1.v.scale"] == (3,)
    assert plain["layers.1.k.codebook"] == (3, 16)


def put(path, value):
    """A change of a document: sets (or, without a value, deletes) what is at a path of keys."""

    def change(doc):
        at = doc
        for key in path[:-1]:
            at = at[key]
        if value is put:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return change


K = ("layers", 1, "k")
G = ("model", "layers", 3)
R = ("model", "layers", 2, "rope")
FIELD_ERRORS = [
    (put(("schema_version",), 2), "schema_version: 2 is not supported: this turboq reads 1"),
    (put(("schema_version",), "1"), 'schema_version: "1" must be an integer'),
    (put(("schema_version",), True), "schema_version: true must be an integer"),
    (put(("schema_version",), put), "schema_version: missing"),
    (put(("layres",), []), "layres: unknown field; did you mean 'layers'?"),
    (put(("tokens", "stride"), 2), "tokens.stride: unknown field; known: sinks, recent"),
    (put(("tokens", "sinks"), -1), "tokens"),
    (put(("tokens", "sinks"), 4.0), "tokens.sinks: 4.0 must be an integer"),
    (put(("tokens", "exact_dtype"), "int8"), "tokens.exact_dtype: exact_dtype='int8' must be one"),
    (put(K, []), "layers[1].k: [] must be an object"),
    (put((*K, "codec"), "magic"), "layers[1].k.codec: unknown codec 'magic': known codecs are"),
    (put((*K, "codec"), put), "layers[1].k.codec: missing"),
    (put((*K, "bits"), 9), "layers[1].k.bits: bits=9 must be 1..8"),
    (put((*K, "bits"), True), "layers[1].k.bits: true must be an integer"),
    (put((*K, "bits"), put), "layers[1].k.bits: missing"),
    (put((*K, "bitts"), 3), "layers[1].k.bitts: unknown field; did you mean 'bits'?"),
    (put((*K, "dim"), 12), "layers[1].k.dim: dim=12 must be a multiple of 8"),
    (put((*K, "dim"), 16), "layers[1].k.dim: 16, but the model's k_dim is 24"),
    (put((*K, "rotation"), "fft"), "layers[1].k.rotation: rotation='fft' must be one of"),
    (put((*K, "heads"), {}), "layers[1].k.heads: no head is overridden"),
    (put((*K, "heads", "1", "bits"), 0), "layers[1].k.heads.1.bits: bits=0 must be 1..8"),
    (put((*K, "heads", "1", "dim"), 16), "layers[1].k.heads.1.dim: 16, but the model's k_dim"),
    (put((*K, "heads", "01"), {}), "layers[1].k.heads.01: must be a head number"),
    (put((*K, "heads", "-1"), {}), "layers[1].k.heads.-1: must be a head number"),
    (put(("layers", 1, "index"), 1), "layers[1].index: 1, but layer 2 is due"),
    (put(("layers", 1, "index"), 0), "layers[1].index: 0, but layer 2 is due"),
    (put(("layers", 1), put), "layers: layer 2 owns a cache and is not listed"),
    (put(("layers", 1, "path"), "x"), "layers[1].path: the model has 'blocks.2.attn' there"),
    (put(("model", "layers", 2, "index"), 5), "model.layers[2].index: 5 where 2 is due"),
    (put(("model", "layers", 2, "path"), "blocks.0.attn"), "is also the path of layer 0"),
    (put(("model", "layers", 2, "q_heads"), 6), "model.layers[2].q_heads: 6 is not a multiple of"),
    (put(("model", "layers", 2, "kv_heads"), -4), "model.layers[2].kv_heads: kv_heads=-4 must be"),
    (
        put(("model", "layers", 2, "owns_cache"), False),
        "owns_cache: false, but the fields give true",
    ),
    (put(("model", "layers", 0, "window"), 0), "model.layers[0].window: window=0 must be at least"),
    (put(("model", "layers", 0, "rope_dim"), 17), "layers[0].rope_dim: 17 exceeds k_dim 16"),
    (put((*K, "rope"), "after"), 'layers[1].k.rope: "after" must be before, block:16, '),
    (put((*K, "rope"), "block:48"), 'layers[1].k.rope: "block:48" must be before, block:16, '),
    (put((*K, "rope"), None), "layers[1].k.rope: null must be before, block:16"),
    (put(("layers", 1, "v", "rope"), "before"), "layers[1].v.rope: values have no rotary"),
    (put((*R,), put), "layers[1].k.rope: needs model.layers[2].rope"),
    (put((*R,), None), "model.layers[2].rope: null: leave the field out"),
    (put((*R, "dim"), 22), "model.layers[2].rope.dim: 22, but 24 channels of keys are rotated"),
    (put((*R, "dim"), 23), "model.layers[2].rope.dim: rotary dim=23 must be even"),
    (put((*R, "layout"), "interleaved"), "rope.layout: 'interleaved', but rope_layout is 'half'"),
    (put((*R, "theta"), 0), "model.layers[2].rope.theta: theta=0.0 must be a positive"),
    (put((*R, "thetas"), 0), "rope.thetas: unknown field; did you mean 'theta'?"),
    (put((*R, "inv_freq"), [1.0]), "model.layers[2].rope: inv_freq= of 1 frequencies does not fit"),
    (put((*R, "scaling", "type"), "yarn"), 'rope.scaling.type: "yarn" must be one of linear'),
    (put((*R, "scaling", "type"), "linear"), "scaling.low_freq_factor: low_freq_factor=1.0 is for"),
    (put((*R, "scaling", "low_freq_factor"), 9.0), "model.layers[2].rope.scaling: low_freq_factor"),
    (put((*G, "borrows_cache_of"), 3), "model.layers[3].borrows_cache_of: 3 is not an earlier"),
    (put((*G, "borrows_cache_of"), 1), "borrows_cache_of: layer 1 has no cache of its own"),
    (put((*G, "borrows_cache_of"), 2), "(3, 16, 8) differ from (4, 24, 8) there"),
    (put(("model", "fingerprint"), ""), "model.fingerprint: fingerprint='' must not be empty"),
    (put(("model", "layers"), []), "model.layers: layers=0 must be 1..1024"),
    (
        put(("arrays", "file"), "../plan.safetensors"),
        "arrays.file: file='../plan.safetensors' must",
    ),
    (put(("arrays", "file"), "/etc/plan.safetensors"), "must be a plain name"),
    (put(("arrays", "file"), "a\\..\\b.safetensors"), "must be a plain name"),
    (put(("arrays", "file"), "plan.safetensors\n"), "must be a plain name"),
    (put(("arrays", "file"), ".safetensors"), "must be a plain name"),
    (put(("arrays", "sha256"), "AB" * 32), "must be 64 lower-case hex digits"),
    (put(("arrays", "size"), -1), "arrays.size: size=-1 must be zero or more"),
    (
        put(("bytes", "bits_per_token"), 1055),
        "bytes.bits_per_token: 1055, but the codecs give 1056",
    ),
    (put(("bytes", "bytes_per_token"), 131.5), "bytes.bytes_per_token: 131.5, but the codecs"),
    (put(("bytes", "bits_per_channel"), 5.0), "bytes.bits_per_channel: 5.0, but the codecs give"),
    (put(("bytes", "layer_bits_per_token", 0), 1), "bytes.layer_bits_per_token: [1, 512], but"),
    (put(("quality", "measured", 0, "top1"), 1.5), "quality.measured[0].top1: top1=1.5 must be a"),
    (put(("quality", "measured", 0, "kl_ci"), [1.0]), "kl_ci: 1 items must be 2"),
    (put(("quality", "measured", 0, "kl_mean"), "0"), 'kl_mean: "0" must be a number'),
    (put(("quality", "predicted"), 1), "quality.predicted: 1 must be an object"),
    (put(("provenance", "texts", 0, "sha256"), "x"), "provenance.texts[0].sha256: sha256='x' must"),
    (put(("provenance", "tokens"), -1), "provenance.tokens: tokens=-1 must be zero or more"),
    (put(("provenance", "versions", "jax"), 11), "provenance.versions.jax: 11 must be a string"),
    (put(("provenance", "recipe"), []), "provenance.recipe: [] must be an object"),
    (put(("provenance",), None), "provenance: null must be an object"),
    (put(("producer", "version"), "9"), "hash: "),
]


@pytest.fixture(scope="module")
def rich_document(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("rich")
    save(*plan_cases.rich(), folder)
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize(("change", "message"), FIELD_ERRORS)
def test_every_bad_field_is_named_by_its_path(rich_document, change, message):
    doc = copy.deepcopy(rich_document)
    change(doc)
    with pytest.raises(PlanError) as info:
        parse(doc)
    assert message in str(info.value)
    assert "\n" not in str(info.value)
    assert isinstance(info.value, TurboqError)


def test_overrides_are_neither_redundant_nor_out_of_range(rich_document):
    for change, message in [
        (
            lambda k: k["heads"].update({"4": k["heads"]["1"]}),
            "heads.4: the layer has KV heads 0..3",
        ),
        (lambda k: k["heads"].update({"2000": k["heads"]["1"]}), "heads=2000 must be 0..1023"),
        (
            lambda k: k["heads"].update(
                {"0": {n: v for n, v in k.items() if n not in ("rope", "heads")}}
            ),
            "layers[1].k.heads.0: repeats the codec of the side",
        ),
        (
            lambda k: k["heads"].update(dict.fromkeys("0123", k["heads"]["1"])),
            "layers[1].k.heads: every head is overridden",
        ),
    ]:
        doc = copy.deepcopy(rich_document)
        change(doc["layers"][1]["k"])
        with pytest.raises(PlanError) as info:
            parse(doc)
        assert message in str(info.value)


def test_own_fields_are_kept_and_hashed(rich_document, tmp_path):
    assert rich_document["layers"][1]["k"]["heads"]["1"]["x-a"] == 1.5
    doc = copy.deepcopy(rich_document)
    doc["layers"][0]["v"]["x-new"] = {"any": ["thing", None]}
    with pytest.raises(PlanConflict, match=r"^hash: .* edited or damaged"):
        parse(doc)
    doc["hash"] = plan_hash(doc)
    plan, _ = parse(doc)
    assert plan.extra["layers[0].v"] == {"x-new": {"any": ["thing", None]}}
    assert document(plan) == doc
    lost = dataclasses.replace(plan, extra={"layers[7]": {"x-a": 1}})
    with pytest.raises(PlanError, match=r"layers\[7\]: plan\.extra has fields for an object"):
        document(lost)


def test_numbers_hash_alike_however_they_are_written(rich_document):
    doc = copy.deepcopy(rich_document)
    assert doc["bytes"]["bytes_per_token"] == 132
    doc["bytes"]["bytes_per_token"] = 132  # was 132.0
    assert document(parse(doc)[0]) == rich_document


def test_other_models_are_refused_field_by_field():
    plan, _ = plan_cases.plain()
    same = plan_cases.geometry()
    check_model(plan, same)
    check_model(plan, dataclasses.replace(same, name="another copy"))
    with pytest.raises(PlanConflict) as info:
        check_model(plan, dataclasses.replace(same, fingerprint="sha256:ffff"))
    assert str(info.value) == (
        "the plan is for another model (tiny): "
        'model.fingerprint: plan "sha256:0123", model "sha256:ffff"'
    )
    with pytest.raises(PlanConflict, match=r"model\.layers\.length: plan 2, model 3"):
        check_model(plan, plan_cases.geometry(layers=3))
    with pytest.raises(PlanConflict, match=r"layers\[0\]\.k_dim: plan 16, model 32.*and 4 more"):
        check_model(plan, plan_cases.geometry(k_dim=32, v_dim=16, kv_heads=1))


def test_diff_names_what_changed():
    plan, _ = plan_cases.plain()
    assert diff(plan, plan) == ""
    other = dataclasses.replace(plan, tokens=TokenPolicy(sinks=1))
    assert diff(plan, other) == "tokens.sinks: 4 -> 1"
    more = uniform_plan(plan.model, k=PerHead(dim=16, bits=3), v=plan.layers[0].v.codec)
    assert "layers[1].k.bits: 4 -> 3" in diff(plan, more)


def test_summary_shows_the_plan_on_one_screen():
    plan, _ = plan_cases.rich()
    text = summary(plan, context=512, layers=True)
    assert "per_head 2b; heads 1,3: turboquant_mse 3b rotation=haar" in text
    assert "one token: 132 bytes, 5.280 bits per channel" in text
    assert "calibrated on 4096 tokens of topics" in text
    assert "measured on held out: KL 0.125" in text
    plain = summary(plan_cases.plain()[0])
    assert "\n0-1 " in plain  # equal neighbours share a line
    assert max(len(line) for line in text.splitlines()) < 200


def test_a_plan_of_many_layers_is_counted():
    """Layer i has i % 4 + 1 bits in K: 20 different neighbours, 5 layers of 2 heads of each."""
    model = plan_cases.geometry(layers=20, kv_heads=2, k_dim=16, v_dim=16)
    plan = head_plan(
        model, lambda i, side, h: TurboQuantMSE(dim=16, bits=i % 4 + 1 if side == "k" else 2)
    )
    text = summary(plan).splitlines()
    assert len(text) < 15
    assert max(map(len, text[:-1])) <= 160
    for bits in (1, 2, 3, 4):
        assert f"    10 x turboquant_mse {bits}b" in text
    assert "    40 x turboquant_mse 2b" in text
    # 1 + 1 and 2 + 1 bits of K and V with scales of 16 bits in 16 channels.
    assert "bits per channel of a layer: 2.500 (layer 0) to 4.000 (layer 3)" in "\n".join(text)
    assert len(summary(plan, layers=True).splitlines()) > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LayerGeometry(index=0, path="", kv_heads=1, q_heads=1, k_dim=8, v_dim=8),
            "path=''",
        ),
        (lambda: TextSource(name="x", sha256="12"), "64 lower-case hex"),
        (lambda: Provenance(max_position=-2), "max_position=-2"),
        (lambda: Measurement(text="", kl_mean=0.0), "text=''"),
        (
            lambda: Plan(model=plan_cases.geometry(), tokens=TokenPolicy(), layers=()),
            "layer 0 owns",
        ),
        (lambda: SidePlan(codec=Exact(dim=8), heads={1: Exact(dim=8)}), "heads.1: repeats"),
        (lambda: plan_cases.geometry(kv_heads=0), "no layer keeps a KV cache"),
    ],
)
def test_plans_made_in_code_are_checked_too(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_calibrated_plan_keeps_its_arrays_when_quality_is_added(tmp_path):
    saved = save(*plan_cases.plain(), tmp_path)
    plan, arrays = load(tmp_path)
    quality = Quality(predicted=Measurement(text="calibration", kl_mean=0.5))
    again = save(dataclasses.replace(plan, quality=quality), arrays, tmp_path)
    assert again.arrays == saved.arrays
    assert load(tmp_path)[0].quality == quality
    assert fingerprint(again) != fingerprint(saved)


def test_layer_plan_sides():
    plan, _ = plan_cases.plain()
    layer: LayerPlan = plan.layers[0]
    assert (layer.side("k"), layer.side("v")) == (layer.k, layer.v)


def test_keys_before_rope_are_a_choice_per_layer(tmp_path):
    model = plan_cases.hybrid()
    k, v = TurboQuantMSE(dim=16, bits=3), Exact(dim=8)
    plan = uniform_plan(model, k=k, v=v, k_rope="before")
    assert [layer.k.rope for layer in plan.layers] == ["before", "before"]
    assert [layer.rope for layer in plan.kv_layers({})] == [model.layers[i].rope for i in (0, 2)]
    mixed = uniform_plan(model, k=k, v=v, k_rope=lambda i: "before" if i == 2 else "after")
    assert [layer.rope for layer in mixed.kv_layers({})] == [None, model.layers[2].rope]
    assert "rope" not in document(mixed)["layers"][0]["k"]
    assert document(mixed)["layers"][1]["k"]["rope"] == "before"
    saved = save(mixed, {}, tmp_path)
    assert load(tmp_path)[0] == saved
    assert load(tmp_path)[0].layers == mixed.layers
    assert mixed.bytes == plan.bytes == uniform_plan(model, k=k, v=v).bytes
    rule = sides(k=k, v=v)
    assert rule_plan(model, rule, k_rope="before") == plan
    shown = summary(mixed, layers=True).splitlines()
    assert [line for line in shown if "before RoPE" in line] == [shown[5]]


def test_before_needs_a_rotary_embedding_that_is_known():
    k, v = Exact(dim=16), Exact(dim=8)
    plain = plan_cases.geometry()
    with pytest.raises(PlanConflict, match=r"layers\[0\].k.rope: needs model.layers\[0\].rope"):
        uniform_plan(plain, k=k, v=v, k_rope="before")
    layers = tuple(dataclasses.replace(x, rope_layout="none") for x in plain.layers)
    unrotated = dataclasses.replace(plain, layers=layers)
    with pytest.raises(PlanConflict, match=r"k_rope: before, but keys of .* carry no rotary"):
        uniform_plan(unrotated, k=k, v=v, k_rope="before")
    # Of a choice for all layers, those without a rotary embedding keep their keys as they are.
    some = plan_cases.hybrid()
    own = dataclasses.replace(some.layers[2], rope=None, rope_dim=0)
    some = dataclasses.replace(some, layers=(*some.layers[:2], own, some.layers[3]))
    assert (some.key_form(), unrotated.key_form()) == ("before", "after")
    plan = uniform_plan(some, k=k, v=v, k_rope="before")
    assert [layer.k.rope for layer in plan.layers] == ["before", "after"]
    with pytest.raises(PlanConflict, match=r"layers\[0\].k.rope: layer 0 has no rotary"):
        uniform_plan(unrotated, k=k, v=v, k_rope=lambda index: "before")
    with pytest.raises(PlanConflict, match=r"rope.layout: .half., but rope_layout"):
        dataclasses.replace(unrotated.layers[0], rope=Rope(dim=16, theta=1e4))


def test_a_rope_may_be_known_on_one_side_only():
    """Plans from before geometries had one stay good for their model."""
    known = plan_cases.hybrid()
    layers = tuple(dataclasses.replace(layer, rope=None) for layer in known.layers)
    old = dataclasses.replace(known, layers=layers)
    k, v = Exact(dim=16), Exact(dim=8)
    check_model(uniform_plan(old, k=k, v=v), known)
    check_model(uniform_plan(known, k=k, v=v), old)
    other = dataclasses.replace(known.layers[2], rope=Rope(dim=24, theta=2e4))
    changed = dataclasses.replace(known, layers=(*known.layers[:2], other, known.layers[3]))
    with pytest.raises(PlanConflict, match=r"rope.theta: plan 10000.0, model 20000.0"):
        check_model(uniform_plan(known, k=k, v=v), changed)
