"""One softmax over stored tokens, exact sinks, exact recent tokens and logit sinks.

Stored tokens are read by a decode implementation (`turboq_kernels.decode`); what is exact joins
afterwards by one safe merge, and the inverse transform of V is applied once at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache.contiguous import LayerCache, Tail
from turboq.cache.exact_attention import HIGHEST
from turboq.cache.layer import HeadGroup, KVLayer, in_head_order
from turboq.cache.paged import PagedView
from turboq.cache.simulate import take_heads
from turboq_kernels import decode as kernels
from turboq_kernels import merge, sides, spans, views
from turboq_kernels.attention import maps, step
from turboq_kernels.decode import codec as codec_decode
from turboq_kernels.decode.types import Partial
from turboq_kernels.prefill import kernels as prefill

KERNEL_ROWS = 64  # query rows of a KV head up to which decode kernels read; prefill kernels above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is the same for all heads: the softmax, and how stored tokens are read."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    implementation: str | None = None
    interpret: bool = False
    splits: int | None = None
    block_tokens: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A group's attention before the inverse transform of V: [B, N, M, ...], normalised.

    `stored` is in the space of V's codes, `exact` in that of V; `mass` is the probability that
    stored tokens have (what a removed mean of V is multiplied by).
    """

    stored: Float[Array, "B N M C"]
    mass: Float[Array, "B N M"]
    exact: Float[Array, "B N M E"] | None  # None: no token is exact


def cache_attention(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache | PagedView,
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    options: Options,
    sink_logits: Float[Array, "H"] | None = None,
    own: bool = False,
) -> Float[Array, "B T H E"]:
    """See `turboq_kernels.attention.cache_attention` and `turboq_kernels.prefill`."""
    outs = []
    for group, buffers in zip(layer.groups, cache.groups, strict=True):
        found = None if own else _by_steps(
            q, layer, cache, group, buffers, tail, q_positions, options, sink_logits
        )  # fmt: skip
        if found is not None:
            shape = (*q.shape[:2], len(group.heads), -1, found.shape[-1])
            outs.append(found.reshape(shape))
            continue
        parts = group_parts(
            q, layer, cache, group, buffers, tail,
            q_positions=q_positions, options=options, sink_logits=sink_logits, own=own,
        )  # fmt: skip
        out = _unfolded(group, parts, options)
        out = out if parts.exact is None else out + parts.exact
        outs.append(from_rows(out, q.shape[1]))
    return join_groups(layer, outs)


def _by_steps(
    q, layer: KVLayer, cache, group: HeadGroup, buffers, tail: Tail, q_positions,
    options: Options, sink_logits,
) -> Float[Array, "B T H E"] | None:  # fmt: skip
    """By `turboq_kernels.attention.step`; None if that is not for these rows."""
    per_kv = q.shape[2] // layer.kv_heads
    rows = to_rows(q, group.heads, layer.kv_heads)
    if _many(rows) or unsupported(layer, group) is not None:
        return None
    view = views.of_group(cache, group, buffers)
    way = step.way(group, view, rows.shape, tail.positions.shape[1], options)
    if way is None:
        return None
    recent = None
    if tail.positions.shape[1]:
        k, v = (take_heads(x, group.heads) for x in (tail.k, tail.v))
        recent = step.Recent(k, v, tail.positions)
    sink = None if sink_logits is None else _of_rows(sink_logits, group, per_kv, q.shape[1])
    where = step.Where(q_positions, cache.lengths, cache.first)
    rules = spans.rules(layer, options.window)
    return way(rows, group, view, where, recent, sink, rules, options)


def _held_sinks(layer: KVLayer, cache) -> Int[Array, "B S"]:
    """Positions of sinks, -1 of those not there yet."""
    slots = jnp.arange(layer.policy.sinks, dtype=jnp.int32)[None, :]
    return jnp.where(slots < cache.lengths[:, None], slots, -1)


def _of_rows(sink_logits, group: HeadGroup, per_kv: int, tokens: int) -> Float[Array, "N M"]:
    """A group's logit sinks by query row."""
    per_head = take_heads(sink_logits[None, None, :, None], _query_heads(group.heads, per_kv))
    return jnp.tile(per_head.reshape(-1, per_kv), (1, tokens))


def group_parts(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache | PagedView,
    group: HeadGroup,
    buffers: Any,
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    options: Options,
    sink_logits: Float[Array, "H"] | None = None,
    own: bool = False,
) -> Parts:
    """The attention of one head group, its query rows token by token: row t * G + g."""
    policy, per_kv = layer.policy, q.shape[2] // layer.kv_heads
    view = views.of_group(cache, group, buffers)
    rows = to_rows(q, group.heads, layer.kv_heads).astype(jnp.float32)
    at = jnp.repeat(q_positions, per_kv, axis=1)  # [B, M]
    seen = spans.spans(
        spans.rules(layer, options.window), at, cache.lengths[:, None],
        jnp.reshape(cache.first, (-1, 1)), own=own,
    )  # fmt: skip
    parts = [_stored(rows, layer, group, view, seen.starts, seen.ends, options, cache.first)]

    exact = []  # k, v, positions, the least position that each row sees, by which implementation
    if policy.sinks:
        held = _held_sinks(layer, cache)
        exact.append((*view.sinks(), held, seen.low, "xla"))  # few: worth no kernel
    if tail.positions.shape[1]:
        k, v = (take_heads(x, group.heads).swapaxes(1, 2) for x in (tail.k, tail.v))
        # The first tokens are among the sinks, unless they are being written now.
        least = jnp.minimum(cache.lengths, policy.sinks) if own else jnp.int32(policy.sinks)
        lower = seen.lower(least.reshape(-1, 1))
        exact.append((k, v, tail.positions, lower, options.implementation))
    parts += _exact(rows, layer, exact, at, options)
    if sink_logits is not None:
        per_row = _of_rows(sink_logits, group, per_kv, q.shape[1])
        parts.append(merge.sink(per_row, q.shape[0], group.v.dim))
    return _normalise(parts)


def _exact(
    rows, layer: KVLayer, exact: list[tuple[Any, ...]], at: Int[Array, "B M"], options: Options
) -> list[Partial]:  # fmt: skip
    """The softmaxes over exact tokens: of a few rows one over all of them."""
    read = {"scale": options.scale, "softcap": options.softcap}
    if not exact:
        return []
    if not _many(rows):
        k, v = (jnp.concatenate([x[i].astype(jnp.float32) for x in exact], axis=2) for i in (0, 1))
        seen = [
            (positions >= 0)[:, None] & (positions[:, None] >= lower[..., None])
            & (positions[:, None] <= at[..., None])
            for _, _, positions, lower, _ in exact
        ]  # fmt: skip
        return [merge.exact(rows, layer.keys(k, v), v, jnp.concatenate(seen, axis=2), **read)]
    parts = []
    for k, v, positions, lower, name in exact:
        # Kernels multiply what was rounded to bfloat16 in one piece, float32 in two.
        k, v = (x.astype(layer.policy.exact_dtype) for x in (k, v))
        parts.append(
            prefill.own(
                rows, layer.keys(k, v), v, positions, lower, at, implementation=name,
                interpret=options.interpret and name not in (None, "xla"), **read,
            )
        )  # fmt: skip
    return parts


def _stored(
    rows, layer: KVLayer, group: HeadGroup, view: views.GroupView, starts, ends, options, first
) -> Partial:
    count = len(group.heads)
    read = {"scale": options.scale, "softcap": options.softcap, "splits": options.splits}
    reason = unsupported(layer, group)
    if reason is not None:
        if options.implementation not in (None, "xla"):
            raise ValueError(
                f"implementation={options.implementation!r} cannot run this case: {reason};"
                " use 'xla' or None"
            )
        return codec_decode.decode(
            rows, (group.k, group.k_arrays, view.k), (group.v, group.v_arrays, view.v),
            view.pages, starts, ends, page=view.page, layer=layer, first=first,
            block_tokens=options.block_tokens, **read,
        )  # fmt: skip
    folded, bias = _folded(group, rows, options)
    k_side = sides.side(group.k, group.k_arrays, view.k, view.heads, count)
    v_side = sides.side(group.v, group.v_arrays, view.v, view.heads, count)

    run = prefill.history if _many(rows) else kernels.decode
    partial = run(
        folded, k_side, v_side, view.pages, starts, ends, bias=bias,
        implementation=options.implementation, interpret=options.interpret,
        block_tokens=options.block_tokens, **read,
    )  # fmt: skip
    gain = sides.gains(group.v, group.v_arrays, count)
    if gain is None:
        return partial
    return dataclasses.replace(partial, acc=partial.acc * gain[None, :, None])


def _folded(group: HeadGroup, rows, options: Options) -> tuple[Array, Array | None]:
    """`sides.fold`; for kernels one product, where its matrix is a constant."""
    if not (_by_kernel(options) and maps.turns(group.k, group.k_arrays)):
        return sides.fold(group.k, group.k_arrays, rows)
    matrix, mean = maps.of_queries(group.k, group.k_arrays, len(group.heads))
    folded = jnp.einsum("bnmd,dc->bnmc", rows, matrix[0], precision=HIGHEST)
    return folded, None if mean is None else jnp.sum(rows * mean[None, :, None], axis=-1)


def _unfolded(group: HeadGroup, parts: Parts, options: Options) -> Float[Array, "B N M E"]:
    """`Codec.unfold_output`, likewise."""
    if not (_by_kernel(options) and maps.turns(group.v, group.v_arrays)):
        return sides.of_heads(group.v.unfold_output)(group.v_arrays, parts.stored, parts.mass)
    matrix, mean = maps.of_outputs(group.v, group.v_arrays, len(group.heads))
    out = jnp.einsum("bnmc,ce->bnme", parts.stored, matrix[0], precision=HIGHEST)
    return out if mean is None else out + parts.mass[..., None] * mean[None, :, None]


def _by_kernel(options: Options) -> bool:
    if options.implementation is None:
        return jax.default_backend() in ("tpu", "gpu")
    return options.implementation != "xla"


def unsupported(layer: KVLayer, group: HeadGroup) -> str | None:
    """Why no kernel reads a group's stored tokens at all, or None."""
    if layer.latent:
        return "latent attention, whose queries meet values too: XLA reads it"
    if layer.rope is not None:
        return "keys before RoPE, or relative to a block: XLA reads them"
    for codec in (group.k, group.v):
        if codec.reading is None:
            return f"codec {codec.name!r} as configured has no reading for kernels"
    return None


def _many(rows: Float[Array, "B N M D"]) -> bool:
    """Whether these query rows are a chunk of a prompt rather than a few tokens."""
    return rows.shape[2] > KERNEL_ROWS


def _normalise(parts: list[Partial]) -> Parts:
    """Joins the stored tokens (first) and exact parts; rows that saw nothing become zero."""
    tops, totals = (jnp.stack(x) for x in ([p.top for p in parts], [p.total for p in parts]))
    factors, _ = merge.factors(tops, totals)
    total = jnp.sum(totals * factors, axis=0)
    factors = factors / jnp.where(total > 0, total, 1.0)[None]
    stored = parts[0].acc * factors[0][..., None]
    exact = None
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        acc = part.acc * factor[..., None]
        exact = acc if exact is None else exact + acc
    return Parts(stored=stored, mass=parts[0].total * factors[0], exact=exact)


def _query_heads(kv_heads: tuple[int, ...], per_kv: int) -> tuple[int, ...]:
    return tuple(h * per_kv + g for h in kv_heads for g in range(per_kv))


def to_rows(
    q: Float[Array, "B T H D"], heads: tuple[int, ...], kv_heads: int
) -> Float[Array, "B N M D"]:
    """Queries of the given KV heads, row t * G + g of head n being query head heads[n] * G + g."""
    batch, t, all_heads, dim = q.shape
    per_kv = all_heads // kv_heads
    q = take_heads(q, _query_heads(heads, per_kv))
    q = q.reshape(batch, t, len(heads), per_kv, dim).transpose(0, 2, 1, 3, 4)
    return q.reshape(batch, len(heads), t * per_kv, dim)


def from_rows(out: Float[Array, "B N M E"], tokens: int) -> Float[Array, "B T N G E"]:
    """The inverse of `to_rows` for outputs."""
    batch, n, m, dim = out.shape
    return out.reshape(batch, n, tokens, m // tokens, dim).transpose(0, 2, 1, 3, 4)


def join_groups(layer: KVLayer, outs: list[Array]) -> Float[Array, "B T H E"]:
    """Outputs [B, T, N, G, E] of all groups in the order of the model's heads."""
    joined = in_head_order(layer, jnp.concatenate(outs, axis=2), 2)
    batch, t, n, per_kv, dim = joined.shape
    return joined.reshape(batch, t, n * per_kv, dim)
