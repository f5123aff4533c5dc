"""Candidates of every unit: sizes, plans made of choices, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from fit_cases import transform_at
from kv_cases import BlockMax
from plan_cases import geometry, hybrid
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulate
from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.codecs.fit_transform import TransformOptions, fit_heads
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.plan import Provenance, array_shapes, collect_arrays, uniform_plan
from turboq_calibrate.candidates import table as c
from turboq_calibrate.candidates.makers import learned, named

POLICY = TokenPolicy(sinks=2)


def made_up(layout, rng):
    """What was seen of every side: a mean and a spread of their own in every head, two texts."""
    seen = {}
    for layer in layout.cache_layers:
        for side, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
            shape = (layer.kv_heads, 96, dim)
            x = rng.normal(size=shape) * rng.uniform(0.5, 2, (layer.kv_heads, 1, dim)) + 1
            g = rng.normal(size=shape) * rng.uniform(0.1, 1, (layer.kv_heads, 1, dim))
            text = np.arange(96, dtype=np.int32) % 2
            seen[layer.index, side] = Observed.of(
                x.astype(np.float32), g.astype(np.float32), text=text
            )
    return seen


def small_table(layout, seen, source=""):
    makers = [
        named("tq 2", TurboQuantMSE(dim=16, bits=2)),
        named("learned 3", PerHead(dim=16, bits=3)),
        *learned({"transform 2.5": 2.5}),
        named("exact", Exact(dim=16, dtype="float32")),
    ]
    return c.build_table(layout, makers, lambda layer, side: seen[layer, side], source=source)


@pytest.fixture
def seen(rng):
    return made_up(geometry(), rng)


@pytest.fixture
def table(seen):
    return small_table(geometry(), seen)


def test_units_and_sizes(table):
    assert len(table.units) == 2 * 3 * 2
    assert table.units[3:7] == tuple(
        c.Unit(layer=layer, side=side, head=head)
        for layer, side, head in ((0, "v", 0), (0, "v", 1), (0, "v", 2), (1, "k", 0))
    )
    assert table.channels == 2 * 3 * (16 + 8)
    for unit, sizes in zip(table.units, table.sizes, strict=True):
        dim = 16 if unit.side == "k" else 8
        # bits and a float16 scale; within 2.5 bits in whole blocks of 8 coordinates; float32
        assert sizes[[0, 1, 3]].tolist() == [2 * dim + 16, 3 * dim + 16, 32 * dim]
        assert 2.5 * dim - 8 < sizes[2] <= 2.5 * dim
        assert table.index[unit] == table.units.index(unit)
        assert table.units[table.rows(unit.layer, unit.side)][unit.head] == unit


def test_plan_stores_every_unit_as_chosen(table, rng):
    """Each head of the plan's layers gives what its own candidate's codec gives."""
    chosen = rng.integers(0, 4, len(table.units))
    chosen[table.rows(1, "k")] = 1  # a side whose heads agree keeps its arrays together
    plan, arrays = table.to_plan(geometry(), chosen, policy=POLICY, provenance=Provenance(seed=5))
    assert plan.tokens == POLICY
    assert plan.provenance.seed == 5
    assert plan.bytes.bits_per_token == table.total(chosen)
    assert plan.bits_per_channel() == pytest.approx(table.bits_per_channel(chosen), rel=1e-12)
    assert {n: x.shape for n, x in arrays.items()} == array_shapes(plan)
    assert arrays["layers.1.k.mean"].shape == (3, 16)
    layer = 1
    x = {s: rng.normal(size=(1, 5, 3, d)).astype(np.float32) for s, d in (("k", 16), ("v", 8))}
    got = dict(zip("kv", simulate(plan.kv_layer(layer, arrays), x["k"], x["v"]), strict=True))
    for side in ("k", "v"):
        for head in range(3):
            at = chosen[table.index[c.Unit(layer=layer, side=side, head=head)]]
            option = table.options[layer, side][at]
            codec, own = option.codecs[head], option.arrays[head]
            own = {n: jnp.asarray(v) for n, v in own.items()}
            one = x[side][0, :, head]
            want = codec.decode(own, codec.encode(own, jnp.asarray(one)))
            np.testing.assert_allclose(got[side][0, :, head], want, rtol=0, atol=TOL["rotate_f32"])


def test_one_label_everywhere_is_the_uniform_plan(table, seen):
    layout = geometry()
    plan, arrays = table.to_plan(layout, table.uniform(1, 0))
    codec = PerHead(dim=16, bits=3)
    want = uniform_plan(layout, k=codec, v=TurboQuantMSE(dim=8, bits=2))
    assert plan.layers == want.layers
    fits = collect_arrays(want, lambda i, side, codec: codec.fit(seen[i, side]))
    assert arrays.keys() == fits.keys()
    for name, values in fits.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_choices_may_be_named_by_unit(table):
    chosen = dict.fromkeys(table.units, 0) | {table.units[4]: 3}
    assert table.check(chosen).tolist() == [3 if i == 4 else 0 for i in range(12)]
    with pytest.raises(ValueError, match="every unit once"):
        table.check(dict.fromkeys(table.units[1:], 0))


@pytest.mark.parametrize("wrong", [np.zeros(11, int), np.full(12, 4), np.full(12, -1)])
def test_wrong_choices_are_refused(table, wrong):
    with pytest.raises(ValueError, match="choice"):
        table.to_plan(geometry(), wrong)


def test_layers_without_a_cache_have_no_units(rng):
    layout = hybrid()
    table = small_table(layout, made_up(layout, rng))
    owners = tuple(layer.index for layer in layout.cache_layers)
    assert table.layers == owners
    assert len(owners) < len(layout.layers)
    plan, _ = table.to_plan(layout, np.zeros(len(table.units), int))
    assert tuple(layer.index for layer in plan.layers) == owners


def test_hash_is_of_labels_codecs_source_and_rope(seen):
    """Arrays follow from the codecs and from what was observed, which `source` identifies."""
    layout = geometry()
    table = small_table(layout, seen, "a")
    assert small_table(layout, seen, "a").sha256 == table.sha256
    others = [
        small_table(layout, seen, "b"),
        c.Table(("other", *table.labels[1:]), table.options, "a"),
        c.Table(table.labels, table.options, "a", "before"),
        c.build_table(layout, [named(n, TurboQuantMSE(dim=16, bits=2)) for n in table.labels]),
    ]
    assert len({table.sha256, *(other.sha256 for other in others)}) == 1 + len(others)


def test_arrays_are_made_when_used_and_once():
    calls = []

    def option(name):
        def fit():
            calls.append(name)
            return [{"mean": np.zeros(8), "codebook": np.arange(2.0)}] * 2

        return c.Option((PerHead(dim=8, bits=1),) * 2, fit)

    layout = geometry(layers=1, kv_heads=2, k_dim=8, v_dim=8)
    makers = [c.Maker(n, lambda layer, side, seen, n=n: option((side, n))) for n in ("a", "b")]
    table = c.build_table(layout, makers)
    assert table.sizes.shape == (4, 2)
    assert table.sha256
    assert not calls
    for _ in range(2):
        table.to_plan(layout, table.uniform(0, 1))
        assert table.options[0, "k"][0].groups[0][1] == (0, 1)
        assert sorted(calls) == [("k", "a"), ("v", "b")]


def test_learned_candidates_are_the_fit_of_their_size(seen):
    """One basis for all sizes; costs, codecs and arrays are those of a fit of one size alone."""
    layout = geometry()
    makers = learned({"2": 2, "3.5": 3.5}, TransformOptions(shrink=0.2, gain="code"))
    table = c.build_table(layout, makers, lambda layer, side: seen[layer, side])
    own = TransformOptions(shrink=0.2, gain="code")
    for (layer, side), options in table.options.items():
        fits = fit_heads(seen[layer, side], own)
        for option, bits in zip(options, (2, 3.5), strict=True):
            most = int(bits * seen[layer, side].dim)
            for h, (codec, arrays) in enumerate(transform_at(seen[layer, side], most, own)):
                assert option.codecs[h] == codec
                assert option.arrays[h].keys() == arrays.keys()
                for name, values in arrays.items():
                    np.testing.assert_array_equal(option.arrays[h][name], values)
                want = fits[h].cost(codec.segments)
                np.testing.assert_array_equal(option.costs[h], want)
                assert want.shape == (2,)


def test_what_cannot_be_a_candidate():
    layout = geometry()
    for makers in ([named("learned", PerHead(dim=16, bits=2))], learned({"learned": 2})):
        with pytest.raises(TurboqError, match=r"'learned' is fitted to data"):
            c.build_table(layout, makers)
    with pytest.raises(TurboqError, match="blocks of 8 tokens"):
        c.build_table(layout, [named("blocks", BlockMax(dim=16))])
    maker = named("twice", TurboQuantMSE(dim=16, bits=2))
    with pytest.raises(ValueError, match="different names"):
        c.build_table(layout, [maker, maker])
    codecs = (PerHead(dim=16, bits=2),)
    with pytest.raises(ValueError, match="arrays"):
        _ = c.Option(codecs, lambda: [{"mean": np.zeros(15, np.float32)}]).arrays
    with pytest.raises(ValueError, match="2 heads for 1"):
        _ = c.Option(codecs, lambda: [{}, {}]).arrays
    with pytest.raises(ValueError, match="every KV head"):
        c.Option((), list)
