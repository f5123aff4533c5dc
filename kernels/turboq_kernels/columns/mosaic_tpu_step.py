"""One query token's attention by keys that are decoded, on a TPU in three launches.

    prepare   what `columns.mosaic_tpu_decoded` takes: queries as pairs of bfloat16, the slots that
              rows see, the pages of every sequence
    finish    of every head one softmax over what that kernel found, the exact tokens and a logit
              sink (`decode.mosaic_tpu_step.merged`), and out of the bits: V-matrix acc + mass mean

Several query tokens of a sequence take the general way of `columns.api`, which leaves this to XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerState
from turboq.numbers.packing import PAGE
from turboq_kernels.columns import mosaic_tpu_decoded as decoded
from turboq_kernels.columns.linear import LANES, LinearLayer
from turboq_kernels.columns.mosaic_tpu_decoded import Operands, Ready
from turboq_kernels.columns.mosaic_tpu_decoded_kernel import Spec, pair
from turboq_kernels.columns.mosaic_tpu_kernel import LOG2_E
from turboq_kernels.decode import mosaic_tpu_step as steps
from turboq_kernels.decode.mosaic_tpu_step import Exact, Merge, Seen
from turboq_kernels.spans import Rules, rules

MAX_VMEM = 12 * 2**20  # of the 16 MiB that one kernel may use by default


def supported(spec: Spec, q: Float[Array, "B T H D"], state: LayerState, tail: Tail) -> bool:
    """Whether a step is read so: one token, whose tail is the ring, and operands that fit."""
    layer = state.form.layer
    if q.shape[1] != 1 or tail.positions.shape[1] != layer.ring:
        return False
    dims, tokens = (q.shape[3], state.exact.v_sinks.shape[3]), layer.policy.sinks + layer.ring
    used = spec.rows * (spec.width(1) + 2 * LANES) + spec.heads * dims[1] * spec.width(1)
    used += (spec.heads * tokens + 2 * spec.rows) * sum(dims)
    return 8 * used <= MAX_VMEM


def attend(
    q: Float[Array, "B 1 H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    made: LinearLayer,
    operands: Operands,
    *,
    q_positions: Any,
    window: int | None,
    sink_logits: Float[Array, "H"] | None,
    spec: Spec,
    scale: float,
    interpret: bool,
) -> Float[Array, "B 1 H E"]:
    """Outputs of all query heads."""
    layer, batch = state.form.layer, len(q)
    seen = Seen(q_positions, state.lengths, state.first, None)
    by_head = q.reshape(batch, made.v.mean.shape[0], -1, q.shape[3])
    own = rules(layer, window)
    ready = prepare(
        decoded.ordered(by_head, layer.rope), seen, own, spec=spec, groups=made.groups,
        pages=state.pages(words), scale=scale, interpret=interpret,
    )  # fmt: skip
    found = decoded.launch(
        spec, ready, words, operands, rope=layer.rope, block=layer.rope_block,
        first=jnp.reshape(state.first, (-1, 1)), table=state.table, interpret=interpret,
    )  # fmt: skip
    kept, exact = state.exact, []
    kind = kept.k_sinks.dtype if kept.k_sinks.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    if layer.policy.sinks:
        exact.append(Exact(kept.k_sinks.astype(kind), kept.v_sinks.astype(kind), None))
    if layer.ring:  # the tail of one token, as the ring has it
        ring = kept.k_recent.astype(kind), kept.v_recent.astype(kind)
        exact.append(Exact(*ring, tail.positions[:, None]))
    how = Merge(own, spec.each, by_head.shape[2], scale, spec.softcap)
    sink = None if sink_logits is None else sink_logits.reshape(by_head.shape[1:3])
    out = finish(by_head, *found, exact, seen, sink, made, operands, how=how, interpret=interpret)
    return out.reshape(batch, 1, -1, out.shape[-1])


def prepare(
    q: Float[Array, "B K M D"], seen: Seen, own: Rules, *, spec: Spec, groups: int, pages: int,
    scale: float, interpret: bool,
) -> Ready:  # fmt: skip
    """A grid step takes all heads of one sequence."""
    batch, _, _, dim = q.shape
    scalars = steps.scalars_of(seen)
    first, tree = jax.tree.flatten(scalars)
    wide = jax.ShapeDtypeStruct((batch, groups, spec.rows, LANES), jnp.int32)
    out = Ready(
        plan=jax.ShapeDtypeStruct((2 * batch,), jnp.int32),
        query=jax.ShapeDtypeStruct((batch, groups, spec.heads, 2 * spec.each, dim), jnp.bfloat16),
        starts=wide, ends=wide,
    )  # fmt: skip
    factor = scale / spec.softcap if spec.softcap else scale * LOG2_E

    def by_sequence(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, *(0,) * (x.ndim - 1)))

    specs = jax.tree.map(by_sequence, out)._replace(plan=pl.BlockSpec(memory_space=pltpu.SMEM))
    found = pl.pallas_call(
        functools.partial(_prepare, tree=tree, own=own, spec=spec, pages=pages, factor=factor),
        out_shape=list(out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first), grid=(batch,), in_specs=[by_sequence(q)],
            out_specs=list(specs),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="turboq_prepare",
    )(*first, q)  # fmt: skip
    return Ready(*found)


def _prepare(*refs, tree, own: Rules, spec: Spec, pages: int, factor: float) -> None:
    seen = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    q, out = refs[tree.num_leaves], Ready(*refs[tree.num_leaves + 1 :])
    b, m, each = pl.program_id(0), q.shape[1], spec.each
    shape = (each, LANES)
    found = steps.of_rows(seen, own, b, m, shape)[1]
    real = jax.lax.broadcasted_iota(jnp.int32, shape, 0) < m
    starts = jnp.where(real, found.starts, 0)
    ends = jnp.where(real, jnp.minimum(found.ends, pages * PAGE), 0)
    for n in range(q.shape[0]):
        group, head = divmod(n, spec.heads)
        rows = slice(head * each, (head + 1) * each)
        out.starts[group, rows], out.ends[group, rows] = starts, ends
        both = pair(steps.filled_rows(q[n], each) * factor)
        out.query[group, head] = jnp.concatenate(both, axis=0)
    # All rows of the one token see the same.
    first = jnp.int32(0) if seen.first is None else seen.first[b]
    low, high = (x for x in steps.spans(own, seen.at[b], seen.lengths[b], first)[:2])
    high = jnp.minimum(high, pages * PAGE)
    some, size = high > low, PAGE.bit_length() - 1
    page = jnp.where(some, jnp.minimum(jnp.maximum(low, 0) >> size, pages - 1), pages - 1)
    last = jnp.where(some, (high + PAGE - 1) >> size, 0)
    out.plan[2 * b], out.plan[2 * b + 1] = page, jnp.maximum(last - page, 0)


def finish(
    q: Float[Array, "B K M D"], acc: Float[Array, "J B R W"], stats: Float[Array, "J B 2 R 128"],
    exact: list[Exact], seen: Seen, sink: Float[Array, "K M"] | None, made: LinearLayer,
    operands: Operands, *, how: Merge, interpret: bool,
) -> Float[Array, "B 1 K M E"]:  # fmt: skip
    """A grid step takes the heads of one group of a sequence."""
    (batch, heads, m, _), groups = q.shape, len(acc)
    each, out_dim = heads // groups, operands.values.shape[2]

    def of_both(x):  # [B, K, ..]
        rest = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, each, *x.shape[2:]), lambda j, b, *_: (b, j, *rest))

    def found(x):  # [J, B, ..]
        rest = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda j, b, *_: (j, b, *rest))

    def of_group(x, size: int | None):  # [J, ..] or [K, ..]
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec((size, *x.shape[1:]), lambda j, b, *_: (j, *rest))

    if sink is not None:
        sink = jnp.pad(sink.astype(jnp.float32), ((0, 0), (0, how.rows - m)))[..., None]
    inputs = {
        "q": q, "acc": acc, "stats": stats, "values": operands.values,
        "mean": made.v.mean[:, None], "exact": exact, "sink": sink,
    }  # fmt: skip
    specs = {
        "q": of_both(q), "acc": found(acc), "stats": found(stats),
        "values": of_group(operands.values, None), "mean": of_group(inputs["mean"], each),
        "exact": [
            Exact(
                of_both(x.k), of_both(x.v),
                None if x.positions is None
                else pl.BlockSpec((None, *x.positions.shape[1:]), lambda j, b, *_: (b, 0, 0)),
            )
            for x in exact
        ],
        "sink": None if sink is None else of_group(sink, each),
    }  # fmt: skip
    first, scalars_tree = jax.tree.flatten(steps.scalars_of(seen))
    given, tree = jax.tree.flatten(inputs)

    def kernel(*refs):
        held = jax.tree.unflatten(scalars_tree, refs[: len(first)])
        x, out = jax.tree.unflatten(tree, refs[len(first) : -1]), refs[-1]
        b = pl.program_id(1)
        for n in range(each):
            rows = slice(n * how.rows, (n + 1) * how.rows)
            total = jnp.sum(x["stats"][1, rows], axis=1, keepdims=True)
            y = steps.product(x["acc"][rows], x["values"][n], True) + total * x["mean"][n]
            stored, own = (x["stats"][0, rows], total, y), None
            if x["sink"] is not None:
                own = x["sink"][n]
            steps.put(out, n, steps.merged(how, held, x["q"][n], x["exact"], stored, own, b, n))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, 1, heads, m, out_dim), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first),
            grid=(groups, batch),
            in_specs=jax.tree.leaves(specs),
            out_specs=pl.BlockSpec(
                (None, 1, each, m, out_dim), lambda j, b, *_: (b, 0, j, 0, 0)
            ),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="turboq_finish",
    )(*first, *given)  # fmt: skip
