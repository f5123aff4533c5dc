"""Plans that join heads, handed over: by the reader and what it writes to test a port with."""

import io
import itertools

import jax.numpy as jnp
import numpy as np
import plan_cases
import pytest
from tolerances import TOL

from turboq.cache import joint
from turboq.cache.simulate import simulate
from turboq.errors import TurboqError
from turboq.export import ENGINES, Options, export, reader_example
from turboq.plan import load, save
from turboq.plan.violations import violations


@pytest.fixture(scope="module")
def planned():
    return plan_cases.joined("block:16")


def test_the_reader_parts_what_is_joined(planned, tmp_path):
    """NumPy alone gives the keys and values of the export's own units."""
    plan, arrays = planned
    report = export(plan, arrays, ENGINES["reader"], tmp_path / "out")
    assert report.status == "exact"
    held, _ = load(tmp_path / "out" / "engine_plan")
    assert [layer.joint for layer in held.layers] == [3, 2]
    read, tensors = reader_example.read_plan(tmp_path / "out" / "engine_plan")
    with np.load(tmp_path / "out" / "joined.npz") as golden:
        units = golden["k_units"], golden["v_units"]
        before = [x.copy() for x in units]
        keys, values = reader_example.part(read, tensors, int(golden["layer"]), *units)
        # Sums of 72 products of order 1 in another order.
        np.testing.assert_allclose(keys, golden["k"], atol=1e-5)
        np.testing.assert_allclose(values, golden["v"], atol=1e-5)
        layer, at = int(golden["layer"]), golden["positions"]
        for h in range(keys.shape[1]):
            mean = reader_example.joint_mean(read, tensors, layer, h, keys.shape[2])
            turned = reader_example.turn(read, layer, mean, keys[:, h], at)
            np.testing.assert_allclose(turned, golden["rotated"][:, h], atol=TOL["rope_rotate"])
            assert not np.allclose(turned[1:], keys[1:, h], atol=0.1)
    for now, then in zip(units, before, strict=True):
        np.testing.assert_array_equal(now, then)
    with np.load(tmp_path / "out" / "page.npz") as page:
        assert "rotated" not in page.files  # a unit is no key


def test_groups_part_by_themselves(planned, tmp_path):
    """Two groups of two heads: units of the second leave the first's keys alone."""
    plan, arrays = planned
    save(plan, arrays, tmp_path)
    read, tensors = reader_example.read_plan(tmp_path)
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(5, 4, 24)), rng.normal(size=(5, 4, 8))
    other_k, other_v = k.copy(), v.copy()
    other_k[:, 2:], other_v[:, 2:] = 0, 0
    first, second = (
        reader_example.part(read, tensors, 2, *x) for x in ((k, v), (other_k, other_v))
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[:, :2], other[:, :2])
        assert np.all(np.any(one[:, 2:] != other[:, 2:], axis=(0, 2)))


@pytest.mark.parametrize("form", ["before", "block:16"])
def test_the_cache_reads_what_the_files_say(form, rng, tmp_path):
    """Its codes, decoded in NumPy by the file's own matrices, are what the cache gives."""
    plan, arrays = plan_cases.joined(form)
    save(plan, arrays, tmp_path)
    read, tensors = reader_example.read_plan(tmp_path)
    layer, at = plan.kv_layer(2, arrays), np.arange(40, dtype=np.int32)
    k, v = (jnp.asarray(rng.normal(size=(1, 40, 4, n)), jnp.float32) for n in (24, 8))
    coded = joint.to_units(layer, k, v, jnp.asarray(at)[None])
    units = np.zeros(k.shape[1:]), np.zeros(v.shape[1:])
    for group, side in itertools.product(layer.groups, (0, 1)):
        codec, own = ((group.k, group.k_arrays), (group.v, group.v_arrays))[side]
        for i, h in enumerate(group.heads):
            stored = codec.encode({n: a[i] for n, a in own.items()}, coded[side][0, :, h])
            codes, gain = (np.asarray(stored[n]) for n in ("codes0", "gain"))
            of = reader_example.arrays_of(read, tensors, 2, "kv"[side], h)
            values = of["gains"][gain] * of["codebook0"][codes]
            units[side][:, h, : values.shape[1]] = values
    keys, values = reader_example.part(read, tensors, 2, *units)
    for h in range(4):
        mean = reader_example.joint_mean(read, tensors, 2, h, 24)
        keys[:, h] = reader_example.turn(read, 2, mean, keys[:, h], at)
    for got, want in zip(simulate(layer, k, v), (keys, values), strict=True):
        # Of values up to 14, sums of 64 products.
        np.testing.assert_allclose(got[0], want, atol=TOL["packed_attention"])


@pytest.mark.parametrize("name", ENGINES)
def test_who_reads_heads_alone_refuses(planned, name):
    plan, _ = planned
    exporter = ENGINES[name]
    joins = name in ("reader", "transformers")
    usual = plan_cases.geometry(k_dim=64, v_dim=64)
    for rules in exporter.constraints(usual, Options()):
        assert rules.joins == joins
        assert any("joined heads" in why for why in violations(rules, plan)) != joins
    if joins:
        exporter.check_plan(plan)
        return
    with pytest.raises(TurboqError, match=rf"{name} reads each head by itself.*joint=none"):
        exporter.check_plan(plan)


def test_plans_without_have_no_such_file(tmp_path):
    plan, arrays = plan_cases.plain()
    found = ENGINES["reader"].project(plan, arrays, Options())
    assert "joined.npz" not in found.files
    assert np.load(io.BytesIO(found.files["page.npz"])).files
