"""Whole steps of one layer, for the compilers: what a model does with a layer's cache.

Eight sequences of up to 32,768 tokens get one more: it is encoded and stored, and its queries read
the packed tokens, four sinks and 64 recent ones. 8 KV heads of 4 query heads, 128 channels. Or one
sequence gets a chunk of a prompt, `CHUNK` tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turboq.cache import composed, joint, model_cache, paged
from turboq.cache.layer import KVLayer, TokenPolicy, uniform_layer
from turboq.codecs import PerHead, Transform, TurboQuantMSE
from turboq.numbers.rope import Rope
from turboq_kernels import columns
from turboq_kernels.aot import launches
from turboq_kernels.aot.compilers import Program
from turboq_kernels.attention import cache_attention
from turboq_kernels.encode import encode

BATCH, HEADS, PAGES, PAGE = 8, 8, 128, 256
POLICY = TokenPolicy(sinks=4, recent=64)
CODECS = {
    "turboquant_mse": TurboQuantMSE,
    "bfloat16_scales": functools.partial(TurboQuantMSE, scale_dtype="bfloat16"),
    "per_head": PerHead,
}
# Codes of a learned plan, in the one pool of a model: heads by themselves and keys after RoPE, keys
# in blocks of positions, pairs of heads joined besides; and joined with keys before RoPE, as plans
# are by default.
DEFAULT = "joined_before"
COLUMNS = ("window", "blocks", "joined", DEFAULT)
LEVELS = (*CODECS, *COLUMNS)
BLOCK, JOINED = 256, 2
CHUNK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: `levels` names the codec of K and V, or how window codes stand (`COLUMNS`).

    "bfloat16_scales" is turboquant_mse with such scales instead of float16, which lie in a pool as
    bits for TPU kernels.
    """

    target: str
    levels: str
    bits: int = 3
    dim: int = 128
    group: int = 4
    tokens: int = 1
    cache: str = "paged"

    def __post_init__(self):
        if self.levels not in LEVELS:
            raise ValueError(f"{self.levels=} must be one of {LEVELS}")
        if self.tokens > 1 and self.levels in CODECS:
            raise ValueError(f"{self.tokens=} of {self.levels=}: chunks are of {COLUMNS}")

    @property
    def batch(self) -> int:
        return BATCH if self.tokens == 1 else 1


def configurations(target: str, levels: tuple[str, ...]) -> tuple[Configuration, ...]:
    """Those of one chip; joined heads at 2 bits, as they are used. A chunk of the default's."""
    return tuple(
        Configuration(
            target=target, levels=x, bits=2 if x in ("joined", DEFAULT) else 3, tokens=tokens,
            cache="paged" if x in CODECS else "one pool",
        )
        for x in levels for tokens in ((1, CHUNK) if x == DEFAULT else (1,))
    )  # fmt: skip


def program(c: Configuration, implementation: str) -> Program:
    """The step, whose pool is donated."""
    k = v = jax.ShapeDtypeStruct((c.batch, c.tokens, HEADS, c.dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((c.batch, c.tokens, HEADS * c.group, c.dim), jnp.bfloat16)
    options: dict[str, Any] = {"scale": c.dim**-0.5, "implementation": implementation}

    def pages(cache, layer, where, q, k, v):
        cache, tail = encode(layer, cache, k, v, where=where, implementation=implementation)
        assert isinstance(cache, paged.PagedCache)
        view, at = paged.view(cache, where), where.starts[:, None]
        return cache, cache_attention(q, layer, view, tail, q_positions=at, **options)

    def one_pool(held, matrices, q, k, v):
        state, words = held
        state, words, tail = columns.write(state, words, k, v, implementation=implementation)
        at = state.lengths[:, None] + jnp.arange(-c.tokens, 0, dtype=jnp.int32)[None]
        out = columns.attend(q, state, words, tail, matrices, q_positions=at, **options)
        return (state, words), out

    if c.levels not in CODECS:
        held, matrices = column_arguments(c, implementation)
        return Program(one_pool, (held, matrices, q, k, v), donated=(0,))
    layer, cache, where = arguments(c, float16_bits=implementation == "mosaic_tpu")
    return Program(pages, (cache, layer, where, q, k, v), donated=(0,))


def column_arguments(c: Configuration, implementation: str, states: int = 64) -> tuple[Any, Any]:
    """Shapes of a layer's state and the pool, and of the matrices of its plan."""
    segments = ((c.dim, c.bits),)
    codec = Transform(dim=c.dim, segments=segments, quantizer="window", states=states, gain="code")
    arrays = {name: jnp.zeros((HEADS, *shape)) for name, shape in codec.array_shapes.items()}
    rope = None if c.levels == "window" else Rope(dim=c.dim, theta=1e6)
    layer = uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, policy=POLICY, k_arrays=arrays, v_arrays=arrays,
        rope=rope, rope_block=1 if rope is None or c.levels == DEFAULT else BLOCK,
    )  # fmt: skip
    if c.levels in ("joined", DEFAULT):
        shapes = joint.shapes(HEADS, JOINED, c.dim, c.dim)
        turns = np.broadcast_to(np.eye(shapes["mean"][1]), shapes["synthesis"])
        layer = composed.join(layer, JOINED, {"mean": np.zeros(shapes["mean"]), "synthesis": turns})
    form = model_cache.forms([layer])
    assert form is not None
    lanes = model_cache.TPU_LANES if implementation == "mosaic_tpu" else 1

    def made():
        (state,), (words,) = model_cache.init(
            form, batch=c.batch, capacity=PAGES * PAGE, lanes=lanes
        )
        return (state, words), columns.prepare(state, words, implementation)

    return jax.eval_shape(made)


def arguments(
    c: Configuration, *, float16_bits: bool
) -> tuple[KVLayer, paged.PagedCache, paged.Where]:
    """Shapes of a layer, of its pool and of a step."""
    codec = CODECS[c.levels](dim=c.dim, bits=c.bits)

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays: dict[str, Any] = {
        name: struct(HEADS, *shape) for name, shape in codec.array_shapes.items()
    }
    layer = uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, policy=POLICY, k_arrays=arrays, v_arrays=arrays
    )
    pages, rows = BATCH * PAGES, BATCH
    init = functools.partial(paged.init, layer, pages=pages, rows=rows, page=PAGE)
    cache = jax.eval_shape(functools.partial(init, float16_bits=float16_bits))
    table, each = struct(BATCH, PAGES, dtype=jnp.int32), struct(BATCH, dtype=jnp.int32)
    where = paged.Where(tables=(table,), rows=each, starts=each, counts=each, room=each)
    return layer, cache, where


def row(c: Configuration, executable: Any) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`.

    `temporary_bytes` below those of the smallest buffer of stored tokens (`buffer_bytes`) means
    that none is copied or unpacked. Of a chunk `launches` are those of one turn over its history.
    """
    turns = 1 if c.tokens > 1 else None
    found, analysis = launches.read(executable.as_text(), turns), executable.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler reports no memory analysis")
    given = program(c, "xla").arguments[0]
    paged_pool = c.levels in CODECS
    stored = [(g.k, g.v) for g in given.groups] if paged_pool else given[1]
    kept = given if paged_pool else (given[0].exact, given[1])
    stored, kept = (
        [x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)] for tree in (stored, kept)
    )
    return {"op": "step"} | dataclasses.asdict(c) | {
        "launches": found.count,
        "names": found.names,
        "ahead": found.ahead,
        "copied_bytes": found.copied_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "buffer_bytes": min(stored),
        "in_place": analysis.alias_size_in_bytes >= sum(kept),
    }  # fmt: skip
