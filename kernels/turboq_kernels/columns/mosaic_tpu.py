"""Columns on TPU (Pallas, Mosaic): all heads of a layer in one matrix product per page, whatever
their bits.

A page [8, W] of words is masked to bytes of value 2^j, 32 tokens each, which the matrix unit takes
as int8; the rows of all query heads stand on the other side, each zero outside its head's lanes, as
a signed high and low byte, below them rows that read the stored gains. Probabilities times gains
are 12 bits or more of the largest of their page. `mosaic_tpu_kernel` is the loop.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.columns import mosaic_tpu_kernel as inner
from turboq_kernels.columns.linear import GAIN_BITS, LANES, LinearLayer
from turboq_kernels.columns.mosaic_tpu_kernel import HALF, PIECE, Spec
from turboq_kernels.columns.queries import Folded, as_integers
from turboq_kernels.columns.types import Sums

BLOCKS = (HALF, PAGE)  # positions of a block of keys
MAX_VMEM = 14 * 2**20


def unsupported(rows: int, widths: tuple[int, int], block: int | None) -> str | None:
    """Why this kernel cannot run a case, or None; `block` None: keys after RoPE."""
    if block is not None and block not in BLOCKS:
        return f"keys of blocks of {block} positions; it reads blocks of {BLOCKS} positions"
    used = vmem_bytes(rows, widths)
    if used > MAX_VMEM:
        return f"{rows} query rows of {widths} lanes need {used} bytes of VMEM"
    return None


def vmem_bytes(rows: int, widths: tuple[int, int]) -> int:
    """Bytes of VMEM of operands and scratch."""
    m = _up(rows, inner.ROW_TILE)
    words = 2 * ROWS * 4 * sum(widths)
    left = 4 * 2 * m * widths[0]
    sums = 2 * m * 4 * widths[1]
    rest = m * LANES * 4 * 32
    return words + left + sums + rest


def _up(n: int, tile: int) -> int:
    return -(-n // tile) * tile


def attend(
    folded: Folded,
    words: UInt32[Array, "B P R C"],
    layer: LinearLayer,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`)."""
    batch, rows = starts.shape
    pages = words.shape[1]
    spec = Spec(
        rows=_up(rows, inner.ROW_TILE), widths=(layer.k.matrix.shape[1], layer.v.matrix.shape[1]),
        blocks=folded.left.shape[1], pages=pages, per_token=folded.bias.shape[-1] > 1,
        softcap=softcap, gained=layer.gained, gain_lanes=layer.gain_weights.shape[1],
    )  # fmt: skip
    factor = scale / softcap if softcap else scale * inner.LOG2_E
    extra = spec.rows - rows
    bias = jnp.pad(folded.bias, ((0, 0), (0, extra), (0, 0))) * factor
    starts, ends = (jnp.pad(x, ((0, 0), (0, extra))) for x in (starts, ends))
    ends = jnp.minimum(ends, pages * PAGE)

    whole, unit = as_integers(folded, PIECE)
    whole = jnp.pad(whole, ((0, 0), (0, 0), (0, extra), (0, 0)))
    unit = jnp.pad(unit, ((0, 0), (0, extra)))
    high = (whole + 128) >> 8
    low = whole - (high << 8)
    half = -0.5 * jnp.sum(whole, axis=-1).astype(jnp.float32) * unit[:, None] * factor
    query = jnp.concatenate([high, low], axis=2).astype(jnp.int8)
    constants = jnp.broadcast_to(half[..., None], (*half.shape, LANES))
    row = jnp.broadcast_to((unit * factor)[..., None], (batch, spec.rows, LANES))
    if spec.per_token:
        bias = _page_order(jnp.pad(bias, ((0, 0), (0, 0), (0, pages * PAGE - bias.shape[-1]))))
    else:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], LANES))[:, None]
    heads = layer.k.mean.shape[0]
    of_row = jnp.minimum(jnp.arange(spec.rows, dtype=jnp.int32) // (rows // heads), heads - 1)
    gains = jnp.stack([jnp.pad(s.gains, ((0, 0), (0, LANES - (1 << GAIN_BITS))))[of_row]
                       for s in (layer.k, layer.v)])  # fmt: skip
    weights = layer.gain_weights[of_row]
    weights = jnp.where(weights >= 128, weights - 256, weights).astype(jnp.int8)
    weights = jnp.pad(weights, ((0, _up(spec.rows, 32) - spec.rows), (0, 0)))
    lanes = words.shape[-1]
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, -lanes % LANES)))
    any_row = ends > starts
    low_slot = jnp.min(jnp.where(any_row, starts, jnp.iinfo(jnp.int32).max), axis=1)
    first = jnp.minimum(low_slot // PAGE, pages - 1)
    last = -(-jnp.max(jnp.where(any_row, ends, 0), axis=1) // PAGE)
    plan = jnp.stack([first, jnp.maximum(last - first, 0)], axis=-1).astype(jnp.int32)
    places = jnp.append(layer.first, layer.gain_lane)
    wide = [jnp.broadcast_to(x[..., None], (*x.shape, LANES)) for x in (starts, ends)]
    acc, stats = _call(
        spec, interpret, plan.reshape(-1), places // LANES, row, *wide, gains, weights,
        query, constants, bias, words,
    )  # fmt: skip
    return Sums(
        acc=acc[:, :rows],
        gained=jnp.sum(stats[:, 2, :rows], axis=-1),
        total=jnp.sum(stats[:, 1, :rows], axis=-1),
        top=stats[:, 0, :rows, 0] / inner.LOG2_E,
    )


def _page_order(bias: Float[Array, "B M S"]) -> Float[Array, "B P M 256"]:
    """Page by page, tokens in the order in which masks take them: byte of the word last."""
    batch, m, slots = bias.shape
    parts = bias.reshape(batch, m, slots // PAGE, PAGE // 32, 4, ROWS).swapaxes(-1, -2)
    return parts.reshape(batch, m, slots // PAGE, PAGE).swapaxes(1, 2)


def _call(spec: Spec, interpret, plan, first, row, starts, ends, gains, weights, *streamed):
    query, constants, bias, words = streamed
    batch, m, (k_width, v_width) = row.shape[0], spec.rows, spec.widths
    once = not spec.turned

    def block(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, *_: (b, *(0,) * (x.ndim - 1)))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda b, *_: (0,) * x.ndim)

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch,),
        in_specs=[
            *(block(x) for x in (row, starts, ends)), whole(gains), whole(weights),
            *(block(x) if once else hbm for x in (query, constants)),
            hbm if spec.per_token else block(bias),
            hbm,
        ],
        out_specs=[
            pl.BlockSpec((1, m, v_width), lambda b, *_: (b, 0, 0)),
            pl.BlockSpec((1, 3, m, LANES), lambda b, *_: (b, 0, 0, 0)),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, ROWS, k_width), jnp.uint32),
            pltpu.VMEM((2, ROWS, v_width), jnp.uint32),
            pltpu.VMEM((2, spec.per_page, 2 * m, k_width), jnp.int8),
            pltpu.VMEM((2, spec.per_page, m, LANES), jnp.float32),
            pltpu.VMEM((2, m, PAGE), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )  # fmt: skip
    if not interpret:
        words = pltpu.with_memory_space_constraint(words, pltpu.HBM)
    return pl.pallas_call(
        functools.partial(inner.kernel, spec),
        out_shape=[
            jax.ShapeDtypeStruct((batch, m, v_width), jnp.float32),
            jax.ShapeDtypeStruct((batch, 3, m, LANES), jnp.float32),
        ],
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="turboq_columns",
    )(plan, first, row, starts, ends, gains, weights, query, constants, bias, words)
