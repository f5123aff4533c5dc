"""Attention of a step by launches of its own around a decode kernel, against float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import kernel_oracle
import kv_cases as cases
import numpy as np
from tolerances import TOL

from turboq.cache import paged
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import IntAffine, PerHead, Transform, TurboQuantMSE
from turboq.numbers import half
from turboq_kernels.attention import api

SCALE = 0.3
TOLERANCE = {"triton": "decode_triton", "mosaic_tpu": "decode_mosaic"}
# Coordinates, tokens of a page: what makes the smallest program.
SIZES = {"triton": (16, 64), "mosaic_tpu": (64, 256)}
# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_layer(rng, dim):
    """Head 1 stored otherwise than heads 0 and 2: a mean, coded gains, scales with offsets."""

    def group(heads, k, v):
        count = len(heads)
        learned = cases.learned(rng, count, 2, dim)
        # All that the kernel rounds are levels.
        levels = learned["codebook"].astype(jnp.bfloat16).astype(jnp.float32)
        turn, _ = np.linalg.qr(rng.standard_normal((count, dim, dim)))
        coded = {
            "mean": rng.standard_normal((count, dim)),
            "analysis": turn, "synthesis": turn.swapaxes(1, 2),
            "gains": np.sort(rng.uniform(0.3, 2.0, (count, 8)), axis=-1),
            "codebook0": levels,
        }  # fmt: skip
        arrays = {
            "per_head": learned | {"codebook": levels},
            "transform": {name: jnp.asarray(x, jnp.float32) for name, x in coded.items()},
            "int_affine": {},
        }
        k_arrays, v_arrays = arrays[k.name], arrays[v.name]
        return HeadGroup(heads=heads, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    learned, affine = PerHead(dim=dim, bits=2), IntAffine(dim=dim, bits=3)
    coded = Transform(dim=dim, segments=((dim, 2),), codebook="fitted", gain="code", gain_bits=3)
    groups = (group((0, 2), learned, coded), group((1,), affine, learned))
    return KVLayer(groups=groups, policy=TokenPolicy(sinks=3, recent=5))


def filled(rng, layer, queries, page, *, float16_bits=False):
    """A sequence of two pages and one shorter than the sinks; what nobody wrote is NaN."""
    pool = Pool([layer], pages=9, rows=4, per_sequence=2, page=page)
    empty = paged.init(layer, pages=9, rows=4, page=page, float16_bits=float16_bits)
    pool.caches[0] = jax.tree.map(
        lambda x: (
            x
            if x.dtype in (jnp.uint32, jnp.int32)
            else half.like(jnp.full_like(half.values(x), jnp.nan), x)
        ),
        empty,
    )
    pool.step([pool.pager.create()], [1])
    names = [pool.pager.create() for _ in range(2)]
    dim, long = layer.groups[0].k.dim, page + 11
    shape = (2, long, layer.kv_heads, dim)
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "kv")
    first = long - queries
    pool.write(0, pool.step(names[:1], [first]), k[:1, :first], v[:1, :first])
    new = [jnp.concatenate([x[:1, first:], x[1:, :queries]]) for x in (k, v)]
    where = pool.step(names, [queries] * 2)
    tail = pool.write(0, where, *new)  # the pool is donated
    return pool.view(0, where), tail, where.starts, k, v


def alike(k, v, heads=3):
    """Heads stored alike, by codecs without arrays."""
    return uniform_layer(kv_heads=heads, k=k, v=v, policy=TokenPolicy(sinks=3, recent=5))


def check(rng, queries, options, name, layer=None, **made):
    """Sequences of two pages and of fewer tokens than sinks."""
    dim, page = SIZES[name]
    layer = layer or make_layer(rng, dim)
    view, tail, starts, k, v = filled(rng, layer, queries, page, **made)
    q = jnp.asarray(rng.standard_normal((2, queries, 2 * layer.kv_heads, dim)), jnp.float32)
    at = starts[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]

    def run(q, layer, view, tail, at):
        return api.cache_attention(
            q, layer, view, tail, q_positions=at, scale=SCALE, implementation=name,
            interpret=True, **options,
        )  # fmt: skip

    traced = jax.jit(run, compiler_options=FAST).trace(q, layer, view, tail, at)
    found = str(traced.jaxpr).count("name=turboq_finish")
    assert found == len(layer.groups), "the general way was taken"
    got = traced.lower().compile()(q, layer, view, tail, at)
    due = {name: x for name, x in options.items() if name != "splits"}
    for b, length in enumerate((k.shape[1], queries)):
        every = jnp.zeros((1, length, *q.shape[2:])).at[:, length - queries :].set(q[b])
        own = (x[b : b + 1, :length] for x in (k, v))
        want = kernel_oracle.policy_attention(layer, every, *own, scale=SCALE, **due)
        np.testing.assert_allclose(got[b], want[0, length - queries :], atol=TOL[TOLERANCE[name]])


def check_broken(rng, name):
    """Inf in the newest value: NaN for all rows of its head, and for no other."""
    dim, page = SIZES[name]
    codec = TurboQuantMSE(dim=dim, bits=2)
    layer = alike(codec, codec)
    view, tail, starts, *_ = filled(rng, layer, 1, page)
    newest = np.argmax(np.asarray(tail.positions[0]))
    tail = dataclasses.replace(tail, v=tail.v.at[0, newest, 1, 4].set(jnp.inf))
    q = jnp.asarray(rng.standard_normal((2, 1, 6, dim)), jnp.float32)
    got = jax.jit(
        lambda q, view, tail: api.cache_attention(
            q, layer, view, tail, q_positions=starts[:, None], scale=SCALE,
            implementation=name, interpret=True,
        ),
        compiler_options=FAST,
    )(q, view, tail)  # fmt: skip
    broken = np.isnan(np.asarray(got))
    assert broken[0, 0, 2:4].all()
    assert broken.sum() == 2 * dim
