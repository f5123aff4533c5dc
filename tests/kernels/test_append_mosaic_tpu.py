"""One token of every sequence written whole by the TPU kernel, in interpret mode, as XLA does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_cases import ROOM, full, layer_of_many, located, same
from jax.experimental.pallas import tpu as pltpu

from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import TurboQuantMSE
from turboq_kernels.encode import encode, mosaic_tpu_append, store
from turboq_kernels.encode import mosaic_tpu_codes as codes

# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def plain(recent, bits=2, scale_dtype="bfloat16"):
    """Numbers that the kernel puts into pages of 256 tokens."""
    codec = TurboQuantMSE(dim=32, bits=bits, scale_dtype=scale_dtype)
    policy = TokenPolicy(sinks=2, recent=recent, exact_dtype="float32")
    return uniform_layer(kv_heads=2, k=codec, v=codec, policy=policy)


def tokens(rng, layer, heads):
    dims = (layer.groups[0].k.dim, layer.groups[0].v.dim)
    return [jnp.asarray(rng.standard_normal((4, 1, heads, d)), jnp.bfloat16) for d in dims]


def both(layer, k, v):
    def run(cache, where):
        return tuple(
            encode(layer, cache, k, v, where=where, implementation=name, interpret=name != "xla")
            for name in ("mosaic_tpu", "xla")
        )

    return jax.jit(run, compiler_options=FAST)


def test_a_layer_of_many_kinds(rng, monkeypatch):
    """The first token, one past the sinks, on the second page, behind all room; one that waits."""
    monkeypatch.setattr(mosaic_tpu_append, "SEQUENCES", 3)  # two groups, the second not full
    layer = layer_of_many(simple=False)
    run = both(layer, *tokens(rng, layer, 3))
    where = located([0, 3, 126, ROOM], [1, 1, 1, 1])
    got, want = run(full(rng, layer, where), where)
    same(got, want)
    # A sequence begins anew, another one lost a token; row 2 is nobody's.
    assert got[0].overflow.tolist() == [3, 5, 5, 6, 0]
    where = located([1, 70, ROOM, 2], [1, 0, 1, 1])
    same(*run(full(rng, layer, where), where))


@pytest.mark.parametrize(("recent", "scale_dtype"), [(5, "float16"), (32, "bfloat16")])
def test_numbers_and_rings_in_place(recent, scale_dtype, rng, monkeypatch):
    monkeypatch.delattr(mosaic_tpu_append, "paged_cache")  # nothing is left to XLA
    layer = plain(recent, scale_dtype=scale_dtype)
    k, v = tokens(rng, layer, 2)
    # A scale of 0, of a subnormal float16, of none: infinite in both.
    factors = jnp.asarray([0.0, 1e-6, 1e6], k.dtype)[:, None]
    run = both(layer, k.at[:3, 0, 1].multiply(factors), v)
    where = located([17, 0, 300, 511], [1, 1, 1, 1], room=512)
    same(*run(full(rng, layer, where, page=256, float16_bits=True), where))


def test_float16_by_integers():
    """What NumPy rounds to: all that float16 holds, what lies halfway between, and around that."""
    with np.errstate(invalid="ignore"):  # NaN of both kinds
        held = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(held[np.isfinite(held)])
    halfway = np.append((finite[1:] + finite[:-1]) / 2, [65519.0, 65520.0, 65521.0, 1e30, -1e30])
    halfway = halfway.astype(np.float32)
    around = [np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf)]
    x = np.concatenate([held, halfway, *around])
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(np.float16)
    got = np.asarray(codes.half_bits(jnp.asarray(x))).astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(got, want)
    signed = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[signed], np.signbit(want)[signed])


def test_no_races_and_nothing_out_of_bounds(rng, capfd):
    """Copies as late as their waits allow, memory that starts as NaN, pages of -1 never touched."""
    layer = plain(16, bits=1)
    k, v = tokens(rng, layer, 2)
    where = located([1, 256, 7, 512], [1, 1, 0, 1], room=512)
    table = where.table.at[0, 1].set(-1).at[2].set(-1)
    cache = full(rng, layer, where, page=256)
    xla = jax.jit(functools.partial(encode, layer, implementation="xla"))
    want, _ = xla(cache, k, v, where=where)
    where = dataclasses.replace(where, tables=(table,))
    watched = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    got = mosaic_tpu_append.append(layer, cache, where, k, v, interpret=watched)
    same(got, want)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_what_goes_the_other_way():
    layer = plain(3)
    assert store.appending("mosaic_tpu", layer, 1, True) is not None
    assert store.appending("mosaic_tpu", layer, 2, True) is None
    assert "float16" in str(
        mosaic_tpu_append.unsupported(
            uniform_layer(
                kv_heads=1, k=TurboQuantMSE(dim=32, bits=2), v=TurboQuantMSE(dim=32, bits=2),
                policy=TokenPolicy(exact_dtype="float16"),
            ),
            1,
        )
    )  # fmt: skip
    assert "bytes of VMEM" in str(mosaic_tpu_append.unsupported(plain(100_001), 1))
