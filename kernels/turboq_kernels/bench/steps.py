"""What is timed of learned plans and of whole steps: bit columns alone, and one token written and
read.

"columns" rows are attention to a layer of the one pool by the column kernel: queries folded, bits
read, parts joined. "step" rows are what a model does with a layer's cache for one token of every
sequence: it is encoded, stored and attended to, caches being written in place; the exact ones are
bfloat16 arrays. T bits are stored of a head's key and of its value: T = 384 is 3 of each of 128
channels. "mixed": heads of 2 to 4 bits; "joined": pairs of heads, keys in blocks of 256 positions;
"default": the same before RoPE, as plans are by default. Calls are dependent and go through
copies, as those of `methods`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from turboq.cache import composed, joint, model_cache, paged
from turboq.cache.contiguous import Tail
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.codecs import Codec, PerHead, Transform, TurboQuantMSE
from turboq.numbers.rope import Rope
from turboq_kernels import columns
from turboq_kernels.attention import cache_attention
from turboq_kernels.bench import timing
from turboq_kernels.bench.methods import PAGE, TRACE, Job, Method, Shape, jax_attention
from turboq_kernels.encode import encode

POLICY = TokenPolicy()  # every token is read as it is stored
MIXED = (2, 3, 4, 3)  # bits of heads, over and over
COPIES = 16


def column_methods(*, interpret: bool = False) -> list[Method]:
    """Attention by the column kernel."""
    return [
        Method(name=f"columns {name}", job=functools.partial(_columns, layer, interpret))
        for name, layer in _column_layers().items()
    ]


def step_methods(*, interpret: bool = False) -> list[Method]:
    """Whole steps, exact ones first."""
    exact = [
        Method(name=f"step bf16 {name}", job=functools.partial(_exact, name), exact=True)
        for name in ("cudnn", "xla")
    ]
    pages = {"3 bits": TurboQuantMSE, "per_head 3b": PerHead}
    packed = [
        Method(name=f"step {name}", job=functools.partial(_pages, codec, interpret))
        for name, codec in pages.items()
    ]
    learned = [
        Method(name=f"step columns {name}", job=functools.partial(_column_steps, layer, interpret))
        for name, layer in _column_layers().items()
    ]
    return exact + packed + learned


LayerOf = Callable[[Shape], KVLayer]


def _column_layers() -> dict[str, LayerOf]:
    return {
        **{f"T={128 * b}": functools.partial(_layer, bits=(b,), joined=1) for b in (2, 3, 4)},
        "mixed": functools.partial(_layer, bits=MIXED, joined=1),
        "joined": functools.partial(_layer, bits=(3, 2), joined=2),
        "default": functools.partial(_layer, bits=(3, 2), joined=2, block=1),
    }


def _layer(shape: Shape, bits: tuple[int, ...], joined: int, block: int = PAGE) -> KVLayer:
    """A learned plan's layer whose transforms leave coordinates as they come."""
    kinds = [
        Transform(
            dim=shape.dim, segments=((shape.dim, b),), quantizer="window", states=64, gain="code"
        )
        for b in (bits[h % len(bits)] for h in range(shape.heads))
    ]
    groups = []
    for codec in dict.fromkeys(kinds):
        heads = tuple(h for h, own in enumerate(kinds) if own == codec)
        arrays = _arrays(codec, len(heads))
        groups.append(HeadGroup(heads=heads, k=codec, v=codec, k_arrays=arrays, v_arrays=arrays))
    alone = KVLayer(groups=tuple(groups), policy=POLICY)
    if joined == 1:
        return alone
    turned = dataclasses.replace(
        alone, rope=Rope(dim=shape.dim, theta=5e5), rope_block=block
    )  # fmt: skip
    (groups_of, width), _ = joint.shapes(shape.heads, joined, shape.dim, shape.dim).values()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    fitted = {"mean": np.zeros((groups_of, width)), "synthesis": np.stack([turn] * groups_of)}
    return composed.join(turned, joined, fitted)


def _arrays(codec: Codec, heads: int) -> dict[str, Array]:
    """No mean, no turn, levels and gains evenly spaced."""
    made = {}
    for name, shape in codec.array_shapes.items():
        if name in ("analysis", "synthesis"):
            own = np.eye(shape[0], shape[1])
        elif name in ("codebook", "gains"):
            own = np.linspace(*((-2, 2) if name == "codebook" else (0.5, 2)), shape[0])
        else:
            own = np.zeros(shape) if name == "mean" else np.ones(shape)
        made[name] = jnp.asarray(np.stack([own] * heads), jnp.float32)
    return made


def _random(seed: int, tree: Any, batch: int) -> Any:
    """The same arrays full of random bits, or of numbers about 1: one sequence's, repeated."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def drawn(key: Array, x: Array) -> Array:
        one = (x.shape[0] // batch, *x.shape[1:])
        if x.dtype == jnp.uint32:
            made = jax.random.bits(key, one, x.dtype)
        else:
            made = jax.random.uniform(key, one, x.dtype, 0.5, 1.5)
        return jnp.tile(made, (batch, *[1] * (x.ndim - 1)))

    return jax.tree.unflatten(form, [drawn(k, x) for k, x in zip(keys, leaves, strict=True)])


def _pool(layer: KVLayer, shape: Shape) -> tuple[model_cache.ModelForm, int]:
    """The form of a model of one layer, and bytes of its tokens."""
    form = model_cache.forms([layer])
    assert form is not None  # window codes
    return form, form.bits_per_token * shape.batch * shape.tokens // 8


def _columns(layer_of: LayerOf, interpret: bool, shape: Shape) -> Job:
    form, nbytes = _pool(layer_of(shape), shape)
    copies = min(-(-timing.COLD_BYTES // nbytes), COPIES) if not interpret else 1
    rounds = -(-timing.count(nbytes) // copies) if not interpret else 1
    options = {"implementation": "triton", "interpret": interpret}

    def run(q, arrays):
        state, matrices, pools = arrays
        empty = jnp.zeros((shape.batch, 0, shape.heads, shape.dim))
        tail = Tail(k=empty, v=empty, positions=jnp.zeros((shape.batch, 0), jnp.int32))
        at = jnp.full((shape.batch, 1), shape.tokens - 1, jnp.int32)

        def step(_, q):
            for words in pools:
                out = columns.attend(
                    q, state, words, tail, matrices, q_positions=at, scale=shape.dim**-0.5,
                    **options,
                )  # fmt: skip
                q = q + out * TRACE
            return q

        return jax.lax.fori_loop(0, rounds, step, q)

    def make():
        (state,), (words,) = model_cache.init(form, batch=shape.batch, capacity=shape.tokens)
        state = dataclasses.replace(state, lengths=jnp.full_like(state.lengths, shape.tokens))
        pools = [_random(i, words, shape.batch) for i in range(copies)]
        return state, columns.prepare(state, words), pools

    return _job(shape, run, make, nbytes, rounds, copies, jnp.float32)


def _job(shape: Shape, run, make, nbytes: int, rounds: int, copies: int, dtype, **more) -> Job:
    query = jax.ShapeDtypeStruct((shape.batch, 1, shape.heads * shape.group, shape.dim), dtype)
    return Job(
        run=run, query=query, make=make, nbytes=nbytes, calls=rounds * copies,
        resident=copies * nbytes, **more,
    )  # fmt: skip


def _written(
    shape: Shape, one: Callable, make: Callable, nbytes: int, dtype, interpret=False
) -> Job:
    """Steps through copies of a cache, each one token longer after each.

    `one(held, fixed, at, q, k, v)` gives (held, out); `make()` one cache and what is fixed.
    """
    copies = min(-(-timing.COLD_BYTES // nbytes), COPIES) if not interpret else 1
    rounds = -(-timing.count(nbytes) // copies) if not interpret else 1

    def run(q, arrays):
        fixed, caches = arrays

        def step(i, carry):
            q, caches = carry
            at, after = jnp.int32(shape.tokens - rounds) + i, []
            for held in caches:
                k, v = q[:, :, :: shape.group], q[:, :, shape.group - 1 :: shape.group]
                held, out = one(held, fixed, at, q, k, v)
                q = q + (out * TRACE).astype(q.dtype)
                after.append(held)
            return q, after

        q, caches = jax.lax.fori_loop(0, rounds, step, (q, caches))
        return q, (fixed, caches)

    def everything():
        held, fixed = make()
        return fixed, [_random(i, held, shape.batch) for i in range(copies)]

    return _job(shape, run, everything, nbytes, rounds, copies, dtype, donated=True)


def _exact(implementation: str, shape: Shape) -> Job:
    attend, size = (
        jax_attention(implementation),
        (shape.batch, shape.tokens, shape.heads, shape.dim),
    )

    def one(held, fixed, at, q, k, v):
        del fixed
        held = [
            jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
            for old, new in zip(held, (k, v), strict=True)
        ]
        return held, attend(q, *held)

    def make():
        return [jnp.zeros(size, jnp.bfloat16)] * 2, None

    return _written(shape, one, make, 4 * math.prod(size), jnp.bfloat16)


def _pages(codec_of: Callable[..., Codec], interpret: bool, shape: Shape) -> Job:
    codec, pages = codec_of(dim=shape.dim, bits=3), shape.tokens // PAGE
    heads = tuple(range(shape.heads))
    arrays = _arrays(codec, shape.heads)
    group = HeadGroup(heads=heads, k=codec, v=codec, k_arrays=arrays, v_arrays=arrays)
    layer = KVLayer(groups=(group,), policy=POLICY)
    options = {"implementation": "triton", "interpret": interpret}
    rows = jnp.arange(shape.batch, dtype=jnp.int32)
    table = rows[:, None] * pages + jnp.arange(pages, dtype=jnp.int32)[None]
    empty = functools.partial(paged.init, layer, pages=shape.batch * pages, rows=shape.batch)

    def one(held, fixed, at, q, k, v):
        starts, ones = jnp.full_like(rows, at), jnp.ones_like(rows)
        room = jnp.full_like(rows, shape.tokens)
        where = paged.Where(tables=(table,), rows=rows, starts=starts, counts=ones, room=room)
        cache = dataclasses.replace(empty_overflow, groups=held)
        cache, tail = encode(fixed, cache, k, v, where=where, **options)
        assert isinstance(cache, paged.PagedCache)  # as it came
        out = cache_attention(
            q, fixed, paged.view(cache, where), tail, q_positions=starts[:, None],
            scale=shape.dim**-0.5, **options,
        )  # fmt: skip
        return cache.groups, out

    empty_overflow = paged.PagedCache(groups=(), overflow=jnp.zeros_like(rows), page=PAGE)
    nbytes = layer.bits_per_token * shape.batch * shape.tokens // 8
    return _written(
        shape, one, lambda: (empty().groups, layer), nbytes, jnp.float32, interpret
    )  # fmt: skip


def _column_steps(layer_of: LayerOf, interpret: bool, shape: Shape) -> Job:
    form, nbytes = _pool(layer_of(shape), shape)
    options = {"implementation": "triton", "interpret": interpret}

    def one(words, fixed, at, q, k, v):
        state, matrices = fixed
        state = dataclasses.replace(state, lengths=jnp.full_like(state.lengths, at))
        state, words, tail = columns.write(state, words, k, v, **options)
        out = columns.attend(
            q, state, words, tail, matrices, q_positions=state.lengths[:, None] - 1,
            scale=shape.dim**-0.5, **options,
        )  # fmt: skip
        return words, out

    def make():
        (state,), (words,) = model_cache.init(form, batch=shape.batch, capacity=shape.tokens)
        return words, (state, columns.prepare(state, words))

    return _written(shape, one, make, nbytes, jnp.float32, interpret)
