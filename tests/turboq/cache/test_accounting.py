"""Bytes by formula equal the bytes of live buffers, and the closed forms of every codec."""

import math

import jax
import numpy as np
import plan_cases
import pytest
from tolerances import TOL

from turboq.cache import accounting
from turboq.cache import contiguous as cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.codecs import TCQ, Exact, KiviKey, KVarN, PerHead, TurboQuantMSE, TurboQuantProd
from turboq.plan import uniform_plan

DIMS = (64, 80, 96, 128, 256)


def codecs(dim: int) -> list:
    return [
        Exact(dim=dim),
        Exact(dim=dim, dtype="float32"),
        *(TurboQuantMSE(dim=dim, bits=b) for b in (1, 3, 8)),
        TurboQuantMSE(dim=dim, bits=3, scale_dtype="float32"),
        *(TurboQuantProd(dim=dim, bits=b) for b in (1, 2, 4)),
        PerHead(dim=dim, bits=2),
        PerHead(dim=dim, bits=5, scale="head"),
        KiviKey(dim=dim, bits=2, group=64),  # blocks of tokens: they wait in the exact ring
        KVarN(dim=dim, bits=2, axis="token"),
        TCQ(dim=dim, bits=3),
    ]


@pytest.mark.parametrize(
    ("codec", "bits"),  # what is stored per channel, by hand: codes + 16/D per stored scalar
    [
        (Exact(dim=128), 16),
        (Exact(dim=128, dtype="float32"), 32),
        (TurboQuantMSE(dim=128, bits=3), 3 + 16 / 128),
        (TurboQuantMSE(dim=64, bits=4), 4.25),
        (TurboQuantMSE(dim=64, bits=4, scale_dtype="float32"), 4.5),
        (TurboQuantProd(dim=64, bits=3), 3 + 32 / 64),
        (TurboQuantProd(dim=64, bits=1), 1 + 16 / 64),
        (PerHead(dim=80, bits=2), 2.2),
        (PerHead(dim=96, bits=7, scale="head"), 7),
        (KiviKey(dim=96, bits=2, group=32), 3),
        (TCQ(dim=64, bits=3), 3 + (3 + 16) / 64),
    ],
)
def test_closed_forms(codec, bits):
    layer = uniform_layer(kv_heads=3, k=codec, v=codec, policy=TokenPolicy())
    assert accounting.bits_per_channel([layer, layer]) == bits
    assert accounting.bits_per_token([layer, layer]) == bits * codec.dim * 12
    assert accounting.channels([layer, layer]) == codec.dim * 12
    assert accounting.compression([layer]) == pytest.approx(16 / bits, rel=TOL["accounting_ratio"])


def test_three_bit_codes_of_128_channels_are_48_bytes():
    layer = uniform_layer(
        kv_heads=1,
        k=PerHead(dim=128, bits=3, scale="head"),
        v=Exact(dim=128, dtype="float16"),
        policy=TokenPolicy(),
    )
    assert accounting.bits_per_token([layer]) == 8 * (48 + 256)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("context", [1, 256, 1000])
def test_buffers_are_those_that_the_cache_allocates(dim, context):
    """Every leaf of the cache, by shape and type (traced only: nothing of this size is made)."""
    kinds = codecs(dim)
    policy = TokenPolicy(sinks=4, recent=33, exact_dtype="float32")
    groups = tuple(
        HeadGroup(heads=(2 * i, 2 * i + 1), k=k, v=v, k_arrays={}, v_arrays={})
        for i, (k, v) in enumerate(zip(kinds, reversed(kinds), strict=True))
    )
    layer = KVLayer(groups=groups, policy=policy)
    made = jax.eval_shape(lambda: cache.init(layer, batch=2, capacity=context))
    leaves = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(made.groups))
    ours = accounting.buffers(layer, batch=2, context=context).values()
    assert sorted((b.shape, b.dtype) for b in ours) == leaves
    total = sum(math.prod(shape) * jax.numpy.dtype(dtype).itemsize for shape, dtype in leaves)
    assert accounting.residency([layer], context=context, batch=2).cache == total


@pytest.mark.parametrize("make", [plan_cases.plain, plan_cases.rich])
@pytest.mark.parametrize("context", [255, 257])
def test_plan_bytes_are_nbytes_of_live_caches(make, context):
    plan, arrays = make()
    live = sum(
        cache.init(layer, batch=3, capacity=context).nbytes for layer in plan.kv_layers(arrays)
    )
    assert plan.cache_bytes(context, batch=3) == live


def test_one_more_page_costs_256_tokens():
    """Bytes per token are the slope of live bytes over capacity: the two numbers are one."""
    for make in (plan_cases.plain, plan_cases.rich):
        plan, _ = make()
        assert plan.cache_bytes(768) - plan.cache_bytes(512) == 256 * plan.bytes_per_token


def test_residency_by_hand():
    # 2 layers, 3 KV heads, D = 16 and 8; K per_head 4 bits with a float16 scale, V 2 bits without.
    plan, arrays = plan_cases.plain()
    token = 2 * 3 * (16 * 4 + 16 + 8 * 2) / 8
    r = plan.residency(300, batch=2)
    assert (plan.bytes_per_token, r.numbers) == (token, 2 * 300 * 2 * 3 * (16 + 8))
    assert r.quantized == 2 * 300 * token
    assert r.padding == 2 * (512 - 300) * token
    assert r.sinks == 2 * 2 * 3 * 4 * (16 + 8) * 2  # batch, layers, heads, sinks, K and V, bfloat16
    assert r.recent == 0
    assert r.arrays == sum(a.nbytes for a in arrays.values())
    assert r.tables == 4 * (16 * 16 + 8 * 8)  # two rotations; fitted codebooks are arrays
    assert r.total == r.quantized + r.padding + r.sinks + r.arrays + r.tables
    assert r.baseline == r.numbers * 2
    assert plan.bits_per_channel(300, batch=2) == r.total * 8 / r.numbers
    assert r.compression == r.baseline / r.total


def test_equal_tables_count_once():
    geometry = plan_cases.geometry(layers=5, k_dim=16, v_dim=16)
    k, v = TurboQuantMSE(dim=16, bits=2), TurboQuantMSE(dim=16, bits=3)
    plan = uniform_plan(geometry, k=k, v=v)
    assert plan.residency(1).tables == 4 * (16 * 16 + 4 + 8)
    other = TurboQuantMSE(dim=16, bits=3, seed=1)
    assert uniform_plan(geometry, k=k, v=other).residency(1).tables == 4 * (2 * 256 + 4 + 8)


def test_all_in_cost_falls_to_the_price_of_a_token():
    plan, _ = plan_cases.rich()
    limit = plan.bits_per_channel()
    contexts = [256 * 4**i for i in range(12)]
    costs = [plan.bits_per_channel(n) for n in contexts]
    assert np.all(np.diff(costs) < 0)
    assert costs[-1] > limit
    # Everything but the tokens is constant at whole pages, so the excess is exactly proportional
    # to 1/context (up to float64 rounding of numbers near 6).
    excess = (np.array(costs) - limit) * np.array(contexts)
    np.testing.assert_allclose(excess, excess[0], rtol=TOL["accounting_excess"])


def test_exact_bytes_from_geometry():
    # SmolLM2-135M: 30 layers, 3 KV heads, D = 64, bfloat16, 8192 tokens: 2*2*3*64*30*8192 bytes.
    assert accounting.exact_bytes([(3, 64, 64)] * 30, context=8192) == 188_743_680
    assert accounting.exact_bytes([(3, 64, 32)], context=10, batch=2, bits=32) == 10 * 2 * 288 * 4
    plan = uniform_plan(
        plan_cases.geometry(), k=Exact(dim=16), v=Exact(dim=8), policy=TokenPolicy()
    )
    assert plan.residency(512).total == accounting.exact_bytes([(3, 16, 8)] * 2, context=512)
    assert plan.residency(512).compression == 1


@pytest.mark.parametrize("wrong", [{"context": 0}, {"context": -5}, {"context": 1, "batch": 0}])
def test_nothing_is_not_a_size(wrong):
    plan, _ = plan_cases.plain()
    with pytest.raises(ValueError, match=r"=(0|-5) must be at least 1"):
        plan.residency(**wrong)


def test_readable():
    assert [accounting.readable(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
