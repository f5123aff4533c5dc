"""Candidates of every unit: sizes, plans made of choices, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import BlockMax
from plan_cases import geometry, hybrid
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulate
from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import Provenance, array_shapes, collect_arrays, uniform_plan
from turboq_calibrate.candidates import table as c
from turboq_calibrate.observe.samples import LayerSamples, fit_samples

POLICY = TokenPolicy(sinks=2)


def made_up(layout, rng):
    """Samples with a mean and a spread of their own in every head."""

    def values(layer, dim):
        shape = (layer.kv_heads, 96, dim)
        return (rng.normal(size=shape) * rng.uniform(0.5, 2, shape[2]) + 1).astype(np.float32)

    out = []
    for layer in layout.layers:
        k, v = values(layer, layer.k_dim or 1), values(layer, layer.v_dim or 1)
        q = np.eye(layer.k_dim or 1)[None].repeat(layer.kv_heads, 0)
        out.append(LayerSamples(k=k, v=v, q_moment=q) if layer.kv_heads else None)
    return out


def small_table(layout, samples):
    makers = [
        c.data_free("tq 2", TurboQuantMSE(dim=16, bits=2)),
        c.fitted("learned 3", PerHead(dim=16, bits=3)),
        c.learned("transform 2.5", 2.5),
        c.data_free("exact", Exact(dim=16, dtype="float32")),
    ]
    return c.build_table(layout, makers, samples)


@pytest.fixture
def table(rng):
    return small_table(geometry(), made_up(geometry(), rng))


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


def test_one_label_everywhere_is_the_uniform_plan(rng):
    layout = geometry()
    samples = made_up(layout, rng)
    table = small_table(layout, samples)
    plan, arrays = table.to_plan(layout, table.uniform(1, 0))
    codec = PerHead(dim=16, bits=3)
    want = uniform_plan(layout, k=codec, v=TurboQuantMSE(dim=8, bits=2))
    assert plan.layers == want.layers
    fits = collect_arrays(want, lambda i, side, codec: fit_samples(codec, samples[i], side))
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


def test_hash_is_of_labels_codecs_and_arrays(rng):
    layout, state = geometry(), rng.bit_generator.state
    samples = made_up(layout, rng)
    table = small_table(layout, samples)
    rng.bit_generator.state = state
    assert small_table(layout, made_up(layout, rng)).sha256 == table.sha256
    samples[1].k[2, 0, 3] += 1
    assert small_table(layout, samples).sha256 != table.sha256
    renamed = c.Table(("a", *table.labels[1:]), table.options)
    assert renamed.sha256 != table.sha256


def test_what_cannot_be_a_candidate(rng):
    layout = geometry()
    with pytest.raises(ValueError, match="fitted arrays"):
        c.data_free("learned", PerHead(dim=16, bits=2))
    with pytest.raises(TurboqError, match=r"'learned' is fitted to data"):
        c.build_table(layout, [c.fitted("learned", PerHead(dim=16, bits=2))])
    with pytest.raises(TurboqError, match="blocks of 8 tokens"):
        c.build_table(layout, [c.data_free("blocks", BlockMax(dim=16))])
    maker = c.data_free("twice", TurboQuantMSE(dim=16, bits=2))
    with pytest.raises(ValueError, match="different names"):
        c.build_table(layout, [maker, maker])
    with pytest.raises(ValueError, match="arrays"):
        c.Option((PerHead(dim=16, bits=2),), ({"mean": np.zeros(15, np.float32)},))
