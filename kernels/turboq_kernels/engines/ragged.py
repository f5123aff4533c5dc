"""A ragged batch over a pool of pages, as serving engines call attention.

The tokens of all sequences lie behind each other on one axis, N in all; sequence b has those from
query_starts[b] to query_starts[b + 1], the last of the lengths[b] tokens that it then has, and its
pages are row b of a table. One loop over chunks writes a chunk of every sequence, then answers its
queries by `cache_attention`: a decode step is one round.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import paged
from turboq.cache.contiguous import Tail
from turboq.cache.layer import KVLayer
from turboq.cache.paged import PagedCache
from turboq_kernels.attention import cache_attention
from turboq_kernels.encode import encode

CHUNK = 32  # tokens of one sequence that are written and answered at a time


@functools.partial(
    jax.jit,
    static_argnames=("scale", "window", "softcap", "store", "chunk", "implementation", "interpret"),
)
def attend(
    q: Float[Array, "N H D"],
    k: Float[Array, "N K D"],
    v: Float[Array, "N K E"],
    layer: KVLayer,
    cache: PagedCache,
    *,
    lengths: Int[Array, "B"],
    table: Int[Array, "B P"],
    query_starts: Int[Array, "B1"],
    sequences: Int[Array, ""],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    store: bool = True,
    chunk: int = CHUNK,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "N H E"], PagedCache]:
    """Writes the step's keys and values, and attends to what is stored.

    As `cache_attention`: a query sees its own token, and those before it, as they are stored.
    Rows of tokens that belong to no sequence are zero.

    Args:
      lengths: tokens of every sequence, those of this step included.
      query_starts: B + 1 of them; `sequences`: how many of the B rows are real.
      store: False reads what another layer wrote (layers that share a cache).
      implementation, interpret: as in `cache_attention`.

    Raises:
      ValueError: a layer that keeps exact tokens or waits for blocks of them: those are a
        sequence's own, and a row of the batch is another sequence in every step.
    """
    check(layer)
    n, batch = q.shape[0], lengths.shape[0]
    counts = query_starts[1:] - query_starts[:-1]
    counts = jnp.where(jnp.arange(batch) < sequences, counts, 0).astype(jnp.int32)
    room = jnp.full((batch,), table.shape[1] * cache.page, jnp.int32)
    steps = jnp.arange(chunk, dtype=jnp.int32)[None]

    def round_of(i, state):
        cache, out = state
        done = jnp.minimum(i * chunk, counts)
        here = jnp.clip(counts - done, 0, chunk)
        token = jnp.where(steps < here[:, None], query_starts[:-1, None] + done[:, None] + steps, n)
        taken = jnp.minimum(token, n - 1)
        where = paged.Where(
            tables=(table,), rows=jnp.arange(batch, dtype=jnp.int32),
            starts=lengths - counts + done, counts=here, room=room,
        )  # fmt: skip
        if store:
            cache, tail = encode(layer, cache, k[taken], v[taken], where=where)
            assert isinstance(cache, PagedCache)
        else:
            tail = _nothing(k[taken], v[taken])
        found = cache_attention(
            q[taken], layer, paged.view(cache, where), tail,
            q_positions=where.starts[:, None] + steps, scale=scale, window=window,
            softcap=softcap, sink_logits=sink_logits, implementation=implementation,
            interpret=interpret,
        )  # fmt: skip
        return cache, out.at[token].set(found, mode="drop")

    empty = jnp.zeros((n, q.shape[1], v.shape[2]), jnp.float32)
    rounds = -(-jnp.max(counts) // chunk)
    cache, out = jax.lax.fori_loop(0, rounds, round_of, (cache, empty))
    return out.astype(q.dtype), cache


def check(layer: KVLayer) -> None:
    """Refuses what a row of an engine's batch cannot keep."""
    if layer.policy.sinks or layer.ring:
        raise ValueError(
            f"{layer.policy.sinks=} and {layer.ring} tokens of exact recent window: these engines "
            "name no place of a sequence's own for them; make the plan with --sinks=0 --recent=0"
        )


def pages(layer: KVLayer, *, count: int, sequences: int, page: int) -> PagedCache:
    """An empty pool of one layer for `count` pages of `page` tokens.

    Raises:
      ValueError: as `attend`, or a page that is not of 64 or 256 tokens.
    """
    check(layer)
    return paged.init(layer, pages=count, rows=sequences, page=page)


def _nothing(k, v) -> Tail:
    """No exact tokens."""
    positions = jnp.zeros((k.shape[0], 0), jnp.int32)
    return Tail(k=k[:, :0], v=v[:, :0], positions=positions)
