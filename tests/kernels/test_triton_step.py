"""Attention of a step by its GPU launches, in interpret mode, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_oracle
import kv_cases as cases
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.cache.pool import Pool
from turboq.codecs import IntAffine, PerHead, Transform, TurboQuantMSE
from turboq_kernels.attention import api, maps
from turboq_kernels.decode import triton_kernel, triton_parts, triton_step
from turboq_kernels.spans import Rules

SCALE, LONG, SHORT = 0.3, 75, 2
# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_layer(rng):
    """Head 1 stored otherwise than heads 0 and 2: a mean, coded gains, scales with offsets."""

    def group(heads, k, v):
        count = len(heads)
        learned = cases.learned(rng, count, 3)
        # All that the kernel rounds are levels.
        levels = learned["codebook"].astype(jnp.bfloat16).astype(jnp.float32)
        turn, _ = np.linalg.qr(rng.standard_normal((count, cases.DIM, cases.DIM)))
        coded = {
            "mean": rng.standard_normal((count, cases.DIM)),
            "analysis": turn, "synthesis": turn.swapaxes(1, 2),
            "gains": np.sort(rng.uniform(0.3, 2.0, (count, 8)), axis=-1),
            "codebook0": levels[:, 2:6],
        }  # fmt: skip
        arrays = {
            "per_head": learned | {"codebook": levels},
            "transform": {name: jnp.asarray(x, jnp.float32) for name, x in coded.items()},
            "int_affine": {},
        }
        k_arrays, v_arrays = arrays[k.name], arrays[v.name]
        return HeadGroup(heads=heads, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    learned, affine = PerHead(dim=cases.DIM, bits=3), IntAffine(dim=cases.DIM, bits=4)
    coded = Transform(
        dim=cases.DIM, segments=((cases.DIM, 2),), codebook="fitted", gain="code", gain_bits=3
    )
    groups = (group((0, 2), learned, coded), group((1,), affine, learned))
    return KVLayer(groups=groups, policy=TokenPolicy(sinks=3, recent=5))


def filled(rng, layer, queries):
    """A sequence of two pages and one shorter than the sinks; what nobody wrote is NaN."""
    pool = Pool([layer], pages=9, rows=4, per_sequence=2, page=64)
    pool.caches[0] = jax.tree.map(
        lambda x: x if x.dtype in (jnp.uint32, jnp.int32) else jnp.full_like(x, jnp.nan),
        pool.caches[0],
    )
    pool.step([pool.pager.create()], [1])
    names = [pool.pager.create() for _ in range(2)]
    k, v = (jnp.asarray(rng.standard_normal((2, LONG, 3, cases.DIM)), jnp.float32) for _ in "kv")
    first = LONG - queries
    pool.write(0, pool.step(names[:1], [first]), k[:1, :first], v[:1, :first])
    new = [jnp.concatenate([x[:1, first:], x[1:, :queries]]) for x in (k, v)]
    where = pool.step(names, [queries] * 2)
    tail = pool.write(0, where, *new)  # the pool is donated
    return pool.view(0, where), tail, where.starts, k, v


@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (1, {"sink_logits": jnp.linspace(-1.0, 1.0, 6)}),
        (SHORT, {"window": 40, "softcap": 2.0, "splits": 3}),
    ],
)
def test_matches_float64(queries, options, rng):
    layer = make_layer(rng)
    view, tail, starts, k, v = filled(rng, layer, queries)
    q = jnp.asarray(rng.standard_normal((2, queries, 6, cases.DIM)), jnp.float32)
    at = starts[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]

    def run(q, layer, view, tail, at):
        return api.cache_attention(
            q, layer, view, tail, q_positions=at, scale=SCALE, implementation="triton",
            interpret=True, **options,
        )  # fmt: skip

    text = str(jax.make_jaxpr(run)(q, layer, view, tail, at))
    assert text.count("name=turboq_finish") == 2, "the general way was taken"
    got = jax.jit(run, compiler_options=FAST)(q, layer, view, tail, at)
    due = {name: x for name, x in options.items() if name != "splits"}
    for b, length in enumerate((LONG, queries)):
        every = jnp.zeros((1, length, *q.shape[2:])).at[:, length - queries :].set(q[b])
        own = (x[b : b + 1, :length] for x in (k, v))
        want = kernel_oracle.policy_attention(layer, every, *own, scale=SCALE, **due)
        np.testing.assert_allclose(got[b], want[0, length - queries :], atol=TOL["decode_triton"])


@pytest.mark.parametrize(("count", "splits"), [(9, None), (11, None), (130, None), (27, 3)])
def test_parts_are_those_of_xla(count, splits):
    """Every integer equal: sequences of none to many pages, a batch that is no power of two."""
    rng = np.random.default_rng(count)
    lengths = jnp.asarray([0, 1, 9000, 70, 2000, 2000, 5, 640, 64], jnp.int32)
    at = lengths[:, None] - jnp.asarray([[3, 1]], jnp.int32)
    first = jnp.maximum(lengths - 600, 0) // 64 * 64  # pages before were given up
    plan = triton_kernel.Plan(
        k=(), v=(), strides=(1, 1), rows=2, m=8, tiles=1, tile_rows=1, whole=count == 9,
        steps=2 * 130, scale=1.0, softcap=None, interpret=True, asm=False,
    )  # fmt: skip
    q = jnp.asarray(rng.standard_normal((9, 1, 6, 16)), jnp.float32)
    ready = triton_step.prepare(
        q, jnp.eye(16)[None, :, ::-1], jnp.ones((1, 16)), triton_step.Seen(at, lengths, first),
        Rules(TokenPolicy(sinks=3, recent=1), 1, 500), plan=plan, count=count, splits=splits,
    )  # fmt: skip
    np.testing.assert_allclose(ready.folded[:, :, :6], q[..., ::-1], rtol=TOL["split_product"])
    np.testing.assert_allclose(ready.bias[:, :, :6], q.sum(-1), atol=TOL["attention_f32"])
    # By hand: rows of 3 heads; the window and the sinks below, the recent token above.
    own = np.repeat(np.asarray(at), 3, axis=1)
    starts = np.maximum(own - 499, 3) - np.asarray(first)[:, None]
    ends = np.minimum(np.maximum(own, 0), np.asarray(lengths)[:, None])
    ends = ends - np.asarray(first)[:, None]
    np.testing.assert_array_equal(ready.starts[:9, :6], starts)
    np.testing.assert_array_equal(ready.ends[:9, :6], ends)
    low, high = triton_kernel.bounds(jnp.asarray(starts), jnp.asarray(ends), plan)
    if plan.whole:
        due = [low, high, np.arange(10)]
    elif splits is None:
        due = triton_parts.spread(low, high, count)
    else:
        due = triton_parts.split(low, high, splits)
    used = int(due[-1][-1])  # those left over read nothing of any item
    for i, (got, want) in enumerate(zip((*ready.parts, ready.start), due, strict=True)):
        length = used if i == 0 and not plan.whole else len(want)
        np.testing.assert_array_equal(got[:length], want[:length])


def test_a_broken_token_breaks_who_sees_it(rng):
    """Inf in the newest value: NaN for all rows of its head, and for no other."""
    layer = dataclasses.replace(
        make_layer(rng),
        groups=(
            HeadGroup(
                heads=(0, 1, 2), k=TurboQuantMSE(dim=cases.DIM, bits=2),
                v=TurboQuantMSE(dim=cases.DIM, bits=2), k_arrays={}, v_arrays={},
            ),
        ),
    )  # fmt: skip
    view, tail, starts, *_ = filled(rng, layer, 1)
    newest = np.argmax(np.asarray(tail.positions[0]))
    tail = dataclasses.replace(tail, v=tail.v.at[0, newest, 1, 4].set(jnp.inf))
    q = jnp.asarray(rng.standard_normal((2, 1, 6, cases.DIM)), jnp.float32)
    got = jax.jit(
        lambda q, view, tail: api.cache_attention(
            q, layer, view, tail, q_positions=starts[:, None], scale=SCALE,
            implementation="triton", interpret=True,
        ),
        compiler_options=FAST,
    )(q, view, tail)  # fmt: skip
    broken = np.isnan(np.asarray(got))
    assert broken[0, 0, 2:4].all()
    assert broken.sum() == 2 * cases.DIM


@pytest.mark.parametrize(
    ("codec", "count"),
    [
        (PerHead(dim=cases.DIM, bits=3), 1),
        (TurboQuantMSE(dim=cases.DIM, bits=3), 1),
        (Transform(dim=cases.DIM, segments=((8, 2),)), 3),
    ],
)
def test_maps_are_the_codecs_own(codec, count, rng):
    """One matrix where heads are turned alike, else one a head."""
    shapes = codec.array_shapes
    arrays = {n: jnp.asarray(rng.standard_normal((3, *s)), jnp.float32) for n, s in shapes.items()}
    into, out = maps.of_queries(codec, arrays, 3), maps.of_outputs(codec, arrays, 3)
    assert len(into.matrix) == len(out.matrix) == count
    x = jnp.asarray(rng.standard_normal((5, cases.DIM)), jnp.float32)
    mass = jnp.arange(5, dtype=jnp.float32)
    for n in range(3 if arrays else 1):
        own = {name: a[n] for name, a in arrays.items()}
        acc, near = x[:, : out.matrix.shape[1]], {"atol": TOL["linear_maps"]}
        folded, offset = codec.reading_query(own, x)
        got = acc @ out.matrix[n % count]
        np.testing.assert_allclose(x @ into.matrix[n % count], folded, **near)
        if arrays:
            np.testing.assert_allclose(x @ into.constant[n], offset, **near)
            got = got + mass[:, None] * out.constant[n][None]
        else:
            assert (offset, into.constant, out.constant) == (None, None, None)
        np.testing.assert_allclose(got, codec.unfold_output(own, acc, mass), **near)
