"""Flash attention over exact tokens by Pallas-Triton: a chunk's own, and the recent ones before it.

One program takes a tile of query rows of one sequence and KV head and goes through the tiles of
entries that some of its rows see:

    S [M, T] = q [M, D] k [T, D]'    online softmax over T    acc [M, E] += p [M, T] v [T, E]

Products are of bfloat16 numbers and summed in float32. Where K (or V) is given as bfloat16, the
queries (or probabilities) are rounded to bfloat16 too, as everywhere in flash attention. Where it
is float32 or float16, both factors are two bfloat16 numbers each and three of the four products are
taken, which leaves a relative error of 2**-16.

(Dao, arXiv 2307.08691.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from turboq_kernels.decode import triton_unpack as unpacking
from turboq_kernels.decode.triton_kernel import LN2, LOG2E
from turboq_kernels.decode.types import Partial
from turboq_kernels.target import target

_FAR = 2**30
_MIN_WIDTH = 16  # the matrix units' smallest depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnTuning:
    """Query rows and entries of a tile, warps per program, stages of load pipelining."""

    rows: int
    entries: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    rows: int
    entries: int
    k_pieces: int
    v_pieces: int
    softcap: float | None
    asm: bool


def attend_exact(
    q: Float[Array, "B N M D"],
    k: Float[Array, "B N R D"],
    v: Float[Array, "B N R E"],
    positions: Int[Array, "B R"],
    lower: Int[Array, "B M"],
    upper: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
    tuned: OwnTuning,
) -> Partial:
    """See `turboq_kernels.prefill.kernels.own`."""
    batch, heads, m, _ = q.shape
    width = v.shape[-1]
    tiles = -(-m // tuned.rows)
    gain = scale * (LOG2E if softcap is None else 1.0)
    ks, vs = _rounded(k), _rounded(v)
    # Rounded out here, they go from memory into the matrix units and take no registers.
    qs = _rounded(q.astype(jnp.float32) * gain)[: len(ks)]
    plan = _Plan(
        rows=tuned.rows, entries=tuned.entries, k_pieces=len(ks), v_pieces=len(vs),
        softcap=softcap, asm=target().ptx and not interpret,
    )  # fmt: skip
    lower = jnp.maximum(lower, 0)
    limits = bounds(positions, lower, upper, tuned)
    lead = (batch, heads, tiles * tuned.rows)
    acc, top, total = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(tiles, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, _padded(width)), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tuned.num_warps, num_stages=tuned.num_stages
        ),
        interpret=interpret,
        name="turboq_own",
    )(positions, lower, upper, limits, *qs, *ks, *vs)
    return Partial(acc=acc[:, :, :m, :width], top=top[:, :, :m], total=total[:, :, :m])


def bounds(
    positions: Int[Array, "B R"],
    lower: Int[Array, "B M"],
    upper: Int[Array, "B M"],
    tuned: OwnTuning,
) -> Int[Array, "B tiles 2"]:
    """First and one past the last tile of entries that some row of each tile of rows may see.

    By the smallest and largest position of every tile: one comparison per pair of tiles.
    """
    seen = upper >= lower
    low = _by_tile(jnp.where(seen, lower, _FAR), tuned.rows, _FAR).min(axis=2)
    high = _by_tile(jnp.where(seen, upper, -1), tuned.rows, -1).max(axis=2)
    held = positions >= 0
    least = _by_tile(jnp.where(held, positions, _FAR), tuned.entries, _FAR).min(axis=2)
    largest = _by_tile(positions, tuned.entries, -1).max(axis=2)
    meets = (least[:, None] <= high[..., None]) & (largest[:, None] >= low[..., None])
    count = meets.shape[2]
    last = count - jnp.argmax(meets[..., ::-1], axis=2)
    return jnp.stack(
        [jnp.argmax(meets, axis=2), jnp.where(jnp.any(meets, axis=2), last, 0)], axis=-1
    ).astype(jnp.int32)


def _by_tile(x: Int[Array, "B L"], size: int, fill: int) -> Int[Array, "B tiles {size}"]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return x.reshape(x.shape[0], -1, size)


def _rounded(x: Array) -> list[Array]:
    """x as one bfloat16 array if it is one, else as two whose sum it is (to 2**-17)."""
    if x.dtype == jnp.bfloat16:
        return [x]
    x = x.astype(jnp.float32)
    # Not astype there and back, which XLA may leave out.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)]


def _padded(width: int) -> int:
    return max(_MIN_WIDTH, 1 << (width - 1).bit_length())


def _kernel(positions_ref, lower_ref, upper_ref, bounds_ref, *refs, plan: _Plan) -> None:
    q_refs, k_refs = refs[: plan.k_pieces], refs[plan.k_pieces : 2 * plan.k_pieces]
    v_refs, (acc_ref, top_ref, total_ref) = refs[2 * plan.k_pieces : -3], refs[-3:]
    tile, n, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    last_row, entries = lower_ref.shape[1] - 1, positions_ref.shape[1]
    rows = tile * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)
    real = rows <= last_row  # padding rows see nothing
    at = jnp.minimum(rows, last_row)
    lower = jnp.where(real, lower_ref[b, at], 1)
    upper = jnp.where(real, upper_ref[b, at], 0)
    queries = [_load(ref, b, n, rows, real) for ref in q_refs]
    some = lower <= upper
    lowest, highest = jnp.min(jnp.where(some, lower, _FAR)), jnp.max(jnp.where(some, upper, -1))
    # All rows see a common entry, so what lies between the lowest and the highest is seen.
    whole = jnp.max(jnp.where(some, lower, 0)) <= jnp.min(jnp.where(some, upper, _FAR))

    def step(s, carry):
        acc, top, total = carry
        entry = s * plan.entries + jnp.arange(plan.entries, dtype=jnp.int32)
        valid = entry < entries
        position = plgpu.load(positions_ref.at[b, entry], mask=valid, other=-1)
        keys = [_load(ref, b, n, entry, valid) for ref in k_refs]
        logits = _sum(jnp.zeros((plan.rows, plan.entries), jnp.float32), queries, keys, 1)
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * LOG2E)
        seen = _sees(position[None, :], lower[:, None], upper[:, None])
        logits = jnp.where(seen, logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = unpacking.exp2(logits - base[:, None], plan.asm)
        old = unpacking.exp2(top - base, plan.asm)
        # A NaN in an entry nobody sees must not reach the sums as 0 * NaN.
        held = jax.lax.cond(
            whole,
            lambda: ((position >= lowest) & (position <= highest)).astype(jnp.int32),
            lambda: jnp.max(
                _sees(position[:, None], lower[None, :], upper[None, :]).astype(jnp.int32), axis=1
            ),
        )
        values = [_load(ref, b, n, entry, held > 0) for ref in v_refs]
        acc = _sum(acc * old[:, None], _pieces(weights, plan.v_pieces), values, 0)
        return acc, new_top, total * old + jnp.sum(weights, axis=1)

    carry = (
        jnp.zeros((plan.rows, acc_ref.shape[3]), jnp.float32),
        jnp.full((plan.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((plan.rows,), jnp.float32),
    )
    first, last = bounds_ref[b, tile, 0], bounds_ref[b, tile, 1]
    acc, top, total = jax.lax.fori_loop(first, last, step, carry)
    span = pl.ds(tile * plan.rows, plan.rows)
    acc_ref[b, n, span, :] = acc
    top_ref[b, n, span] = top * LN2
    total_ref[b, n, span] = total


def _sees(position: Array, lower: Array, upper: Array) -> Array:
    return (position >= lower) & (position <= upper)


def _load(ref, b, n, at: Int[Array, "T"], held: Bool[Array, "T"]) -> Array:
    """Vectors [T, width padded to a power of two], zero where padded or not `held`."""
    width = ref.shape[3]
    column = jnp.arange(_padded(width), dtype=jnp.int32)
    shape = (at.shape[0], column.shape[0])
    mask = jnp.broadcast_to(held[:, None], shape)
    if width < column.shape[0]:
        mask = mask & (column < width)[None, :]
    at = jnp.broadcast_to(at[:, None], shape)
    column = jnp.broadcast_to(column[None, :], shape)
    return plgpu.load(ref.at[b, n, at, column], mask=mask, other=0)


def _pieces(x: Float[Array, "M C"], count: int) -> list[Array]:
    """x rounded to bfloat16, and what is left as a second one."""
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)][:count]


def _sum(start: Array, left: list[Array], right: list[Array], axis: int) -> Array:
    """start [M, N] + left [M, c] over right's axis `axis`, in float32."""
    pairs = [(left[1], right[0]), (left[0], right[1])] if len(left) > 1 else []
    for x, y in (*pairs, (left[0], right[0])):
        start = start + jax.lax.dot_general(
            x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
        )
    return start
