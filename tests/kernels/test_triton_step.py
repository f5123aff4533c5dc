"""Attention of a step by its GPU launches, in interpret mode, against float64."""

import jax.numpy as jnp
import kv_cases as cases
import numpy as np
import pytest
from step_cases import SIZES, alike, check, check_broken
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import IntAffine, PerHead, Transform, TurboQuantMSE
from turboq_kernels.attention import maps
from turboq_kernels.decode import triton_kernel, triton_parts, triton_step
from turboq_kernels.spans import Rules

SHORT = 2


def test_matches_float64(rng):
    check(rng, 1, {"sink_logits": jnp.linspace(-1.0, 1.0, 6)}, "triton")


def test_several_queries_and_splits(rng):
    dim, _ = SIZES["triton"]
    layer = alike(IntAffine(dim=dim, bits=3), IntAffine(dim=dim, bits=2))
    check(rng, SHORT, {"window": 40, "softcap": 2.0, "splits": 3}, "triton", layer)


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
    check_broken(rng, "triton")


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
