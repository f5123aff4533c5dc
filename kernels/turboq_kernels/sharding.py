"""Attention over several devices: KV heads over one mesh axis, or the sequence over another.

heads     every device holds whole sequences of some KV heads and needs nobody else's
sequence  every device holds some pages of every sequence; each computes the softmax over its
          own, and the parts are joined by one small collective (`join`), as splits are
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.layer import HeadGroup, KVLayer, in_head_order
from turboq.cache.simulate import take_heads
from turboq_kernels.attention import cache_attention
from turboq_kernels.decode import Partial, Side, contiguous_pages, decode
from turboq_kernels.merge import factors

P = PartitionSpec


def split_layer(layer: KVLayer, shards: int) -> KVLayer:
    """The layer that one of `shards` devices has: an equal share of every head group.

    Arrays keep their full head axis (they are what is sharded); heads are numbered on the device.

    Raises:
      ValueError: a group's heads do not divide evenly.
    """
    groups, first = [], 0
    for group in layer.groups:
        n = len(group.heads)
        if n % shards:
            raise ValueError(f"a group of {n} KV heads does not divide over {shards=} devices")
        local = range(first, first + n // shards)
        first += n // shards
        groups.append(
            HeadGroup(
                heads=tuple(local), k=group.k, v=group.v,
                k_arrays=group.k_arrays, v_arrays=group.v_arrays,
            )
        )  # fmt: skip
    return dataclasses.replace(layer, groups=tuple(groups))


def device_order(layer: KVLayer, shards: int) -> tuple[int, ...]:
    """KV heads in the order of devices: device i has the i-th share of every group."""
    order = []
    for i in range(shards):
        for group in layer.groups:
            share = len(group.heads) // shards
            order += group.heads[i * share : (i + 1) * share]
    return tuple(order)


def attention_by_heads(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache,
    tail: Tail,
    *,
    mesh: Mesh,
    axis: str,
    q_positions: Int[Array, "B T"],
    sink_logits: Float[Array, "H"] | None = None,
    **options: Any,
) -> Float[Array, "B T H E"]:
    """`cache_attention` with the KV heads of every group sharded over the mesh axis `axis`.

    Buffers are expected sharded on their head axis (`heads_sharding`); nothing is communicated
    but what brings queries and outputs of groups that interleave into device order.

    Raises:
      ValueError: as `split_layer` and `cache_attention`.
    """
    shards = mesh.shape[axis]
    local, order = split_layer(layer, shards), device_order(layer, shards)
    per_kv = q.shape[2] // layer.kv_heads
    query_order = tuple(h * per_kv + g for h in order for g in range(per_kv))
    q = take_heads(q, query_order)
    tail = Tail(k=take_heads(tail.k, order), v=take_heads(tail.v, order), positions=tail.positions)
    if sink_logits is not None:
        sink_logits = take_heads(sink_logits[None, None, :, None], query_order)[0, 0, :, 0]
    heads2, heads1, heads0 = P(None, None, axis), P(None, axis), P(axis)
    specs = (
        heads2,
        jax.tree.map(lambda _: heads0, local),
        dataclasses.replace(
            jax.tree.map(lambda _: P(), cache),
            groups=jax.tree.map(lambda _: heads1, cache.groups),
        ),
        Tail(k=heads2, v=heads2, positions=P()),
        P(),
        heads0,
    )  # fmt: skip

    def run(q, layer, cache, tail, q_positions, sink_logits):
        return cache_attention(
            q, layer, cache, tail, q_positions=q_positions, sink_logits=sink_logits, **options
        )

    # Pallas calls do not say over which axes their results vary.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads2, check_vma=False)
    out = sharded(q, local, cache, tail, q_positions, sink_logits)
    batch, t, _, dim = out.shape
    by_kv = out.reshape(batch, t, layer.kv_heads, per_kv, dim)
    reordered = dataclasses.replace(local, groups=(_named(local.groups[0], order),))
    return in_head_order(reordered, by_kv, 2).reshape(out.shape)


def _named(group: HeadGroup, heads: tuple[int, ...]) -> HeadGroup:
    return dataclasses.replace(group, heads=heads)


def heads_sharding(cache: LayerCache, mesh: Mesh, axis: str) -> LayerCache:
    """The cache with every buffer's head axis over `axis`."""
    over_heads = jax.NamedSharding(mesh, P(None, axis))
    whole = jax.NamedSharding(mesh, P())
    return dataclasses.replace(
        jax.tree.map(lambda x: jax.device_put(x, whole), cache),
        groups=jax.tree.map(lambda x: jax.device_put(x, over_heads), cache.groups),
    )


def join(part: Partial, axis: str) -> Partial:
    """Inside `shard_map`: the parts of all devices along `axis` as one softmax, on all of them."""
    tops = jax.lax.all_gather(part.top, axis)
    totals = jax.lax.all_gather(part.total, axis)
    f, top = factors(tops, totals)
    mine = f[jax.lax.axis_index(axis)]
    return Partial(
        acc=jax.lax.psum(part.acc * mine[..., None], axis),
        top=top,
        total=jnp.sum(totals * f, axis=0),
    )


def decode_by_sequence(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    mesh: Mesh,
    axis: str,
    bias: Float[Array, "B N M"] | None = None,
    **options: Any,
) -> Partial:
    """`turboq_kernels.decode.decode` with the pages of a contiguous buffer sharded over `axis`.

    Words are [B, N, P, bits, rows, width], scales and offsets [B, N, P, page], sharded on P: device
    i holds the slots i * P/n * page onwards. Each reads its own; `join` is the only communication
    (B * N * M * (C + 2) numbers per device).

    Raises:
      ValueError: the pages do not divide evenly over the axis.
    """
    shards = mesh.shape[axis]
    batch, heads, count = k.words[0].shape[:3]
    if count % shards:
        raise ValueError(f"{count} pages do not divide over the {shards} devices of {axis!r}")
    pages = contiguous_pages(batch, heads, count // shards)

    def run(q, k, v, starts, ends, bias):
        first = jax.lax.axis_index(axis) * (count // shards * k.page)
        part = decode(
            q, _flat(k), _flat(v), pages,
            jnp.maximum(starts - first, 0), jnp.minimum(ends - first, count // shards * k.page),
            bias=bias, **options,
        )  # fmt: skip
        return join(part, axis)

    specs = (P(), _side_specs(k, axis), _side_specs(v, axis), P(), P(), P())
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return sharded(q, k, v, starts, ends, bias)


def _flat(side: Side) -> Side:
    """Buffers [B, N, P, ...] as head-pages."""

    def each(arrays):
        return tuple(None if x is None else x.reshape(-1, *x.shape[3:]) for x in arrays)

    return dataclasses.replace(
        side, words=each(side.words), scales=each(side.scales), offsets=each(side.offsets)
    )


def _side_specs(side: Side, axis: str) -> Side:
    pages = functools.partial(jax.tree.map, lambda _: P(None, None, axis))
    return dataclasses.replace(
        side,
        words=pages(side.words),
        scales=pages(side.scales),
        offsets=pages(side.offsets),
        tables=jax.tree.map(lambda _: P(), side.tables),
    )
