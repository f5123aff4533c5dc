"""Attention to a layer of the one pool, by a kernel that reads its bits or by decoding it (XLA).

matrices = prepare(state, words)                        once per plan, or None
out = attend(q, state, words, tail, matrices, q_positions=at, scale=scale)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import model_cache
from turboq.cache.contiguous import Tail
from turboq.cache.layer import KVLayer
from turboq.cache.model_cache import LayerState
from turboq.numbers.packing import PAGE
from turboq.numbers.rope import unrotate
from turboq_kernels import merge
from turboq_kernels.columns import (
    base,
    linear,
    mosaic_tpu,
    mosaic_tpu_decoded,
    mosaic_tpu_step,
    prompt,
    queries,
    triton,
    triton_decoded,
    triton_decoded_step,
    triton_step,
    unit_values,
)
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.decode.types import Partial
from turboq_kernels.target import too_old

_KERNELS = ("mosaic_tpu", "triton")
IMPLEMENTATIONS = ("xla", "linear", *_KERNELS)
_PREFERENCE = {"tpu": ("mosaic_tpu", "linear"), "gpu": ("triton", "linear"), "cpu": ("linear",)}


def prepare(
    state: LayerState, words: UInt32[Array, "N P R C"], implementation: str | None = None
) -> LinearLayer | None:
    """What the kernel named needs to know of a layer; None: what this platform's does, or None if
    no kernel of it reads the layer."""
    name = implementation or _reader(state.form.layer)
    if name is None or linear.unsupported(state.form) is not None:
        return None
    return _made(state, words, name)


def _reader(layer: KVLayer) -> str | None:
    """What reads a layer's keys on this chip if the query rows are few; None: decoding by XLA."""
    platform, block = jax.default_backend(), layer.rope_block if layer.rope is not None else None
    if platform == "gpu" and too_old() is None:
        return "triton"
    reads = block is None or mosaic_tpu_decoded.reads_blocks(block)
    if platform == "tpu" and reads and mosaic_tpu.unsupported_chip() is None:
        return "mosaic_tpu"
    return "linear" if block is None or base.reads_blocks(block) else None


def _made(state: LayerState, words: UInt32[Array, "N P R C"], name: str) -> LinearLayer:
    """The layer as matrices, with what the kernel named decodes keys by."""
    layer, lanes = state.form.layer, words.shape[-1]
    made = linear.linear_layer(state.form, pool_lanes=lanes)
    if name == "triton":
        made = triton_decoded.added(made, layer, words)
    elif (
        name == "mosaic_tpu"
        and layer.rope is not None
        and layer.rope_block not in mosaic_tpu.BLOCKS
    ):
        return made.as_decoded(mosaic_tpu_decoded.prepare(made, lanes, layer.rope))
    return dataclasses.replace(made, own=None)


def unsupported(
    q: Float[Array, "B T H D"], state: LayerState, words: UInt32[Array, "N P R C"], name: str
) -> str | None:
    """Why an implementation cannot run a case, or None."""
    if _decodes(q, state, words, name):
        return None
    return _cannot_read(q, state, words, name)


def _decodes(
    q: Float[Array, "B T H D"], state: LayerState, words: UInt32[Array, "N P R C"], name: str
) -> bool:
    """Whether a kernel decodes pages for a chunk: of more rows than it reads bits for or than a
    key has channels, from which on every bit costs more as a product than decoded once."""
    if name not in _KERNELS or q.shape[1] == 1 or prompt.unsupported(state.form, name) is not None:
        return False
    rows = q.shape[1] * q.shape[2] // len(state.form.group.heads)
    return rows > q.shape[3] or _cannot_read(q, state, words, name) is not None


def _cannot_read(
    q: Float[Array, "B T H D"], state: LayerState, words: UInt32[Array, "N P R C"], name: str
) -> str | None:
    """Why an implementation cannot read a case's bits as they lie, or None."""
    if name == "xla":
        return None
    layer = state.form.layer
    cut = state.dropped is not None and PAGE % layer.rope_block
    if cut and not (name == "triton" and triton_decoded.reads(layer)):
        return f"key blocks of {layer.rope_block} tokens that pages given up would cut"
    block = layer.rope_block if layer.rope is not None else None
    reason = linear.unsupported(state.form)
    if reason is not None:
        return reason
    rows, groups = q.shape[1] * q.shape[2], linear.unit_groups(state.form)
    if name == "linear":
        return base.unsupported(rows, block)
    if name == "triton":
        return triton.unsupported(rows // linear.group_count(groups))
    reason = mosaic_tpu.unsupported_chip()
    folds = _cannot_fold(q, state, words)
    return reason or (folds and _cannot_decode(q, state, words))


def _cannot_fold(q, state: LayerState, words) -> str | None:
    """Why the TPU kernel of folded queries cannot run a case, or None."""
    form, layer = state.form, state.form.layer
    widths = linear.run_lanes(form, words.shape[-1])
    block = layer.rope_block if layer.rope is not None else None
    rows = q.shape[1] * q.shape[2]
    return mosaic_tpu.unsupported(rows, linear.unit_groups(form), form.fewest, widths, block)


def _cannot_decode(q, state: LayerState, words) -> str | None:
    """Why the TPU kernel that decodes keys cannot run a case, or None."""
    form, layer, lanes = state.form, state.form.layer, words.shape[-1]
    gained = any(codec.gain == "code" for codec in form.codecs)
    gains = linear.gain_lanes(len(form.group.heads), linear.run_lanes(form, lanes)[0])
    spec = mosaic_tpu_decoded.specify(
        q.shape[1] * q.shape[2], q.shape[3], linear.unit_groups(form), form.widest,
        layer.joint_heads is not None, lanes, layer.rope, gain_lanes=gains if gained else 0,
        softcap=None,
    )  # fmt: skip
    return mosaic_tpu_decoded.unsupported(spec, layer.rope_block if layer.rope else None)


def attend(
    q: Float[Array, "B T H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    matrices: LinearLayer | None = None,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    splits: int | None = None,
) -> Float[Array, "B T H E"]:
    """`turboq.cache.model_cache.attend`, by the implementation named.

    None takes the platform's kernel where it can run the case, else XLA. Of a chunk of more rows
    than a kernel reads bits for it decodes pages, whatever their codes, for flash attention
    (`columns.prompt`). `matrices` are those of `prepare`; without them they are made in every call.
    `splits`: parts of every sequence on a GPU,
    None as many as fill it; on a TPU a sequence is never cut.

    Raises:
      ValueError: unknown, or named and not able to; the message says why.
    """
    model_cache.check_window(state, window)
    if implementation is None:
        order = (*_PREFERENCE.get(jax.default_backend(), ()), "xla")
        name = next(n for n in order if unsupported(q, state, words, n) is None)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    else:
        name, reason = implementation, unsupported(q, state, words, implementation)
        if reason is not None:
            raise ValueError(f"{implementation=} cannot run this case: {reason}; use 'xla' or None")
    if splits is not None and splits < 1:
        raise ValueError(f"{splits=} must be at least 1, or None")
    options = {"scale": scale, "softcap": softcap}
    if name == "xla":
        return model_cache.attend(
            q, state, words, tail, q_positions=q_positions, window=window,
            sink_logits=sink_logits, **options,
        )  # fmt: skip
    if _decodes(q, state, words, name):
        return prompt.attend(
            q, state, words, tail, matrices, q_positions=q_positions, window=window,
            sink_logits=sink_logits, implementation=name, interpret=interpret, **options,
        )  # fmt: skip
    made = _made(state, words, name) if matrices is None else matrices
    decoded = name == "triton" and triton_decoded.reads(state.form.layer)
    if name == "triton" and triton_step.supported(q, state, tail):
        made = triton_decoded.added(made, state.form.layer, words) if decoded else made
        step = triton_decoded_step if decoded else triton_step
        return step.attend(
            q, state, words, tail, made, q_positions=q_positions, window=window, splits=splits,
            sink_logits=sink_logits, interpret=interpret, **options,
        )  # fmt: skip
    layer, heads, tokens = state.form.layer, made.k.mean.shape[0], q.shape[1]
    first = jnp.reshape(state.first, (-1, 1))
    operands = None
    if name == "mosaic_tpu" and _cannot_fold(q, state, words) is not None:
        operands = made.decoded or mosaic_tpu_decoded.prepare(made, words.shape[-1], layer.rope)
        spec = mosaic_tpu_decoded.spec_of(
            made, q.shape[1] * q.shape[2], q.shape[3], words.shape[-1], layer.rope,
            softcap=softcap, tables=len(first),
        )  # fmt: skip
        if mosaic_tpu_step.supported(spec, q, state, tail):
            return mosaic_tpu_step.attend(
                q, state, words, tail, made, operands, q_positions=q_positions, window=window,
                sink_logits=sink_logits, spec=spec, scale=scale, interpret=interpret,
            )  # fmt: skip
    rows = queries.to_rows(q, heads)
    per_token = rows.shape[1] // heads // tokens
    at = jnp.tile(jnp.repeat(q_positions, per_token, axis=1), (1, heads))  # [B, M]
    low = jnp.zeros_like(at) if window is None else at - window + 1
    starts = jnp.maximum(low, layer.policy.sinks) - first
    ends = jnp.minimum(layer.stored_until(at + 1), state.lengths[:, None]) - first
    if operands is not None:
        sums = mosaic_tpu_decoded.attend(
            rows, words, made, starts, ends, first, rope=layer.rope, block=layer.rope_block,
            operands=operands, table=state.table, interpret=interpret, **options,
        )  # fmt: skip
        acc = queries.values(sums, made, operands.values)
    elif decoded:
        made = triton_decoded.added(made, layer, words)
        folded = triton_decoded.logits(
            rows, words, made, layer, state.dropped, starts, ends, table=state.table,
            interpret=interpret,
        )  # fmt: skip
        sums = triton.attend(
            folded, words, made, starts, ends, table=state.table, splits=splits,
            interpret=interpret, **options,
        )  # fmt: skip
        acc = unit_values.values(sums, made, layer, made.decoded.values, triton.place_of(made, 1))
    else:
        k_matrix, v_matrix = (None, None)
        if name == "triton":
            k_matrix, v_matrix = triton.local(made, words.shape[-1])
        seen_from = rows
        if layer.rope is not None and state.dropped is not None:  # slots count from there
            seen_from = queries.to_rows(unrotate(layer.rope, q, first[..., None]), heads)
        folded = queries.fold(
            seen_from, made, slots=state.pages(words) * PAGE, rope=layer.rope,
            block=layer.rope_block, matrix=k_matrix,
        )  # fmt: skip
        run = {
            "linear": functools.partial(base.attend, table=state.table),
            "mosaic_tpu": functools.partial(
                mosaic_tpu.attend, table=state.table, interpret=interpret
            ),
            "triton": functools.partial(
                triton.attend, table=state.table, splits=splits, interpret=interpret
            ),
        }[name]
        sums = run(folded, words, made, starts, ends, **options)
        acc = queries.values(sums, made, v_matrix)
    parts = [Partial(acc=acc, top=sums.top, total=sums.total)]
    parts += _exact(rows, state, tail, at, low, heads, options)
    if sink_logits is not None:
        parts.append(_sink(sink_logits, heads, tokens, acc))
    whole = merge.merge(merge.stack(parts))
    total = jnp.where(whole.total > 0, whole.total, 1.0)
    return queries.from_rows(whole.acc / total[..., None], tokens, heads)


def _sink(
    sink_logits: Float[Array, "H"], heads: int, tokens: int, acc: Float[Array, "B M E"]
) -> Partial:
    """A logit of every query row (`queries.to_rows`)."""
    per_row = jnp.tile(sink_logits.reshape(heads, -1), (1, tokens))
    own = merge.sink(per_row, len(acc), acc.shape[-1])
    return jax.tree.map(lambda x: x.reshape(*acc.shape[:2], *x.shape[3:]), own)


def _exact(rows, state: LayerState, tail: Tail, at, low, heads: int, options) -> list[Partial]:
    """The softmaxes over sinks and recent tokens."""
    layer, sinks = state.form.layer, state.form.layer.policy.sinks
    batch, m, dim = rows.shape
    each = rows.reshape(batch, heads, m // heads, dim)
    out = []

    def over(k, v, positions, lower):
        seen = (positions[:, None] >= lower[..., None]) & (positions[:, None] <= at[..., None])
        # All heads see the same tokens: rows of the first stand for all.
        part = merge.exact(each, k, v, seen[:, : m // heads] & (positions >= 0)[:, None], **options)
        out.append(jax.tree.map(lambda x: x.reshape(batch, m, *x.shape[3:]), part))

    if sinks:
        slots = jnp.arange(sinks, dtype=jnp.int32)[None]
        held = jnp.where(slots < state.lengths[:, None], slots, -1)
        over(state.exact.k_sinks, state.exact.v_sinks, held, low)
    if tail.positions.shape[1]:
        k, v = (x.swapaxes(1, 2) for x in (tail.k, tail.v))
        lower = jnp.maximum(jnp.maximum(low, layer.stored_until(at + 1)), sinks)
        over(k, v, tail.positions, lower)
    return out
