"""Logits of keys that no query can be folded for: decoded and turned inside a kernel (GPU).

Keys before their rotary embedding, or in blocks of few positions, have a rotation each or nearly so
(`turboq.cache.key_form`); `columns.queries` would need as many rows of folded queries. A program of
`turboq_logits` takes a page and a KV head, whose pairs of channels (a, b) turn together:

    x[t, c] = sum over lanes l of own[t, l] matrix[c, l],   own = gain (2 bit - 1) as float16
    a, b = x + mean;   k = (a cos - b sin, b cos + a sin) at the start of t's block;   logit = q . k

The first elements of all pairs are one product and the second ones another, so either layout of
pairs, and channels that do not turn, are data of `prepare`. A page's words pass memory once for a
head, its matrix once for a page: 256 tokens. Logits go to memory, 4 bytes a row and token, where
the kernel of `columns.triton` takes them for its own, so rows, masks, softmax and values are its.

Matrix, gains (of the largest) and decoded keys are float16, every head times a power of two under
which no key exceeds 2^15; queries are two float16 numbers, products float32. A key's coordinate is
off by at most 2^-10 of sum_l |gain matrix[c, l]| / 2 and 2^-11 of itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.layer import KVLayer
from turboq.numbers import rope as rotary
from turboq.numbers.packing import PAGE, ROWS
from turboq.numbers.rope import Rope
from turboq_kernels.columns import triton
from turboq_kernels.columns.linear import GAIN_BITS, LinearLayer, units_of
from turboq_kernels.columns.queries import Folded
from turboq_kernels.target import target
from turboq_kernels.triton_memory import store

RUN = 64  # lanes of a step; those of `triton.Tuning` are whole numbers of it
PAIRS = 64  # of channels, at a time
WARPS, STAGES = 8, 3
LARGEST = 2.0**15  # of a decoded key
_SIGN, _ONE = np.uint32(0x80008000), np.uint32(0x00010001)
# Tokens of a page are 2 x 8 x 2 x 8: bit 1 of a warp's own four, warp, bit 0, word row.
_SHAPE = (2, 8, 2, ROWS)
_BIT = (4 * np.arange(8)[None, :, None] + 2 * np.arange(2)[:, None, None] + np.arange(2)).astype(
    np.uint32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """K of a layer as this kernel reads it: U lanes of a group's units, C pairs, padded."""

    matrix: Any  # float16 [K, 2, C, U]
    means: Any  # float32 [K, 2, P, C]
    gains: Any  # float32 [units, 16], of each unit's largest
    scale: Any  # float32 [K], what logits are multiplied by
    lanes: Any  # int32 [J, U / RUN], lane of the pool where each step begins
    units: Any  # int32 [J, U / RUN]


def reads(layer: KVLayer) -> bool:
    """Whether keys of a layer are read so: those that no query is folded for."""
    return layer.rope is not None and layer.rope_block not in triton.BLOCKS


def added(made: LinearLayer, layer: KVLayer, words: UInt32[Array, "B P R C"]) -> LinearLayer:
    """With what this kernel needs, where it is the one."""
    if layer.rope is None or not reads(layer) or made.decoded is not None:
        return made
    return dataclasses.replace(made, decoded=prepare(made, layer.rope, pool_lanes=words.shape[-1]))


@functools.partial(jax.jit, static_argnames=("rope", "pool_lanes"))
def prepare(layer: LinearLayer, rope: Rope, *, pool_lanes: int) -> Decoded:
    """Once per plan."""
    whole, _ = triton.local(layer, pool_lanes)
    largest = jnp.max(jnp.abs(layer.k.gains), axis=1)
    largest = jnp.where(largest > 0, largest, 1.0)
    lanes, units = _steps(layer, pool_lanes)
    worth = 0.5 * jnp.repeat(largest[units], RUN, axis=1)  # [J, U]
    matrix = (whole * worth[:, None, None]).reshape(-1, *whole.shape[2:])  # [K, D, U]
    bound = jnp.sum(jnp.abs(matrix), axis=2) + jnp.max(jnp.abs(layer.means), axis=1)
    bound = jnp.sqrt(2.0) * jnp.max(bound, axis=1)  # of a pair, turned
    power = jnp.floor(jnp.log2(LARGEST / jnp.where(bound > 0, bound, 1.0)))
    scale = jnp.exp2(power)[:, None, None]
    places = _places(rope, matrix.shape[1])

    def in_pairs(x, axis):
        padded = jnp.concatenate(
            [x, jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))], axis
        )
        return jnp.stack([jnp.take(padded, at, axis=axis) for at in places], axis=1)

    return Decoded(
        matrix=in_pairs(matrix * scale, 1).astype(jnp.float16),
        means=in_pairs(layer.means * scale, 2), gains=layer.k.gains / largest[:, None],
        scale=jnp.exp2(-power), lanes=lanes, units=units,
    )  # fmt: skip


def _steps(layer: LinearLayer, pool_lanes: int) -> tuple[Int[Array, "J s"], Int[np.ndarray, "J s"]]:
    """The first lane of every step, and its unit."""
    counts = [width // RUN for width in triton.widths(layer, 0)]
    units = units_of(layer.unit_groups)[:, np.repeat(np.arange(len(counts)), counts)]
    within = np.concatenate([np.arange(count) for count in counts]) * RUN
    return triton.windows(layer, pool_lanes)[0][units] + within[None], units


def _places(rope: Rope, dim: int) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C"]]:
    """Channels of all pairs, first those that turn; `dim` where there is none."""
    half, rest = rope.dim // 2, np.arange(rope.dim, dim)
    turning = np.arange(rope.dim)
    split = (turning[:half], turning[half:])
    if rope.layout == "interleaved":
        split = (turning[::2], turning[1::2])
    cut = -(-len(rest) // 2)
    out = [
        np.concatenate([own, more])
        for own, more in zip(split, (rest[:cut], rest[cut:]), strict=True)
    ]
    count = _padded(len(out[0]))
    return tuple(np.pad(x, (0, count - len(x)), constant_values=dim) for x in out)  # pyright: ignore[reportReturnType]


def _chunk(pairs: int) -> int:
    return min(PAIRS, max(16, pl.next_power_of_2(pairs)))


def _padded(pairs: int) -> int:
    chunk = _chunk(pairs)
    return -(-pairs // chunk) * chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything static about a call."""

    m: int  # query rows of a KV head, padded
    rows: int
    each: int  # KV heads of a group
    block: int
    shared: bool  # rotations are those of all sequences
    gained: bool
    asm: bool


def logits(
    rows: Float[Array, "B M D"],
    words: UInt32[Array, "B P R C"],
    made: LinearLayer,
    layer: KVLayer,
    first: Int[Array, "B"] | None,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    interpret: bool = False,
) -> Folded:
    """q . k of every row and slot, a `bias`; anything in pages of which no row sees a slot.

    Slot 0 is position first[b] (None: 0).
    """
    rope, block, own = layer.rope, layer.rope_block, made.decoded
    assert rope is not None
    batch, m, _ = rows.shape
    pages, heads = words.shape[1], own.matrix.shape[0]
    words = triton.padded(words, made)
    least = 4 if target().ptx else 8
    plan = _Plan(
        m=max(least, pl.next_power_of_2(m // heads)), rows=m // heads, each=heads // made.groups,
        block=block, shared=first is None, gained=made.gained, asm=target().ptx and not interpret,
    )  # fmt: skip
    low, high = triton.seen_pages(starts, jnp.minimum(ends, pages * PAGE))
    queries, unit = _queries(rows, rope, own, plan)
    inputs = {
        "words": words, "queries": queries, "unit": unit, "low": low, "high": high,
        "turns": _turns(rope, block, first, pages * PAGE, own.matrix.shape[2]),
        "after": jnp.zeros(1, jnp.int32) if first is None else first % block,
        "gain_lanes": made.gain_lanes[0], "matrix": own.matrix, "means": own.means,
        "gains": own.gains, "lanes": own.lanes, "units": own.units,
        # Loaded and not computed: see `columns.triton`.
        "select": np.where(np.arange(8) < 4, 0x5410, 0x7632).astype(np.uint32),
        "left": 15 - _BIT % 16,
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    bias = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(pages, heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, m, pages * PAGE), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="turboq_logits",
    )(*leaves)
    return Folded(left=None, largest=None, bias=bias)


def _queries(
    rows: Float[Array, "B M D"], rope: Rope, own: Decoded, plan: _Plan
) -> tuple[Float[Array, "B K 2 N C"], Float[Array, "B M"]]:
    """Pairs of channels of pairs of float16 (2 i and 2 i + 1 are row i), and their unit."""
    batch, _, dim = rows.shape
    heads = len(own.scale)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    unit = jnp.where(largest == 0, 1.0, largest)
    padded = jnp.pad(rows / unit[..., None], ((0, 0), (0, 0), (0, 1)))
    both = jnp.stack([padded[..., at] for at in _places(rope, dim)], axis=1)  # [B, 2, M, C]
    high = both.astype(jnp.float16)
    low = ((both - high.astype(jnp.float32)) * triton.LOW).astype(jnp.float16)
    both = jnp.stack([high, low], axis=3).reshape(batch, 2, heads, 2 * plan.rows, -1)
    both = jnp.pad(both, [(0, 0)] * 3 + [(0, 2 * (plan.m - plan.rows)), (0, 0)])
    return both.swapaxes(1, 2), unit * jnp.repeat(own.scale, plan.rows)[None]


def _turns(
    rope: Rope, block: int, first: Int[Array, "B"] | None, slots: int, pairs: int
) -> Float[Array, "b Q 2 C"]:
    """cos and sin at the start of every block that has a slot."""
    count = -(-slots // block) + (block > 1)
    start = block * jnp.arange(count, dtype=jnp.int32)[None]
    if first is not None:
        start = start + (first // block * block)[:, None]
    cos, sin = rotary.tables(rope, start)
    more = ((0, 0), (0, 0), (0, pairs - cos.shape[-1]))
    return jnp.stack([jnp.pad(cos, more, constant_values=1.0), jnp.pad(sin, more)], axis=2)


def _kernel(*refs, plan: _Plan, tree) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out_ref = refs[tree.num_leaves]
    page, n, b = (pl.program_id(i) for i in range(3))
    pl.when((page >= x["low"][b]) & (page < x["high"][b]))(
        lambda: _page(x, out_ref, page, n, b, plan)
    )


def _page(x, out_ref, page, n, b, plan: _Plan) -> None:
    group, steps = n // plan.each, x["lanes"].shape[1]
    pairs = x["matrix"].shape[2]
    chunk = _chunk(pairs)
    at, lane = (jnp.arange(k, dtype=jnp.int32) for k in (PAGE, RUN))
    word_row = jnp.arange(ROWS, dtype=jnp.int32)
    bit = 4 * (at // 16 % 8) + 2 * (at // 128) + at // 8 % 2
    slots = page * PAGE + 32 * (bit % 8) + 8 * (bit // 8) + at % ROWS  # `turboq.cache.columns`
    select = x["select"][jnp.arange(8, dtype=jnp.int32)].reshape(1, 8, 1, 1, 1)
    left = [jnp.arange(k, dtype=jnp.int32) for k in _SHAPE[:3]]
    left = x["left"][left[0][:, None, None], left[1][None, :, None], left[2][None, None, :]]
    left = left.reshape(*_SHAPE[:3], 1, 1)
    ones = jnp.full((*_SHAPE, 1), 0x3C003C00, jnp.uint32)

    def gains(step):
        """Twice the gain of a step's unit at every token, as a word."""
        if not plan.gained:
            return ones
        unit, code = x["units"][group, step], jnp.zeros((PAGE,), jnp.int32)
        for p in range(GAIN_BITS):
            lane = x["gain_lanes"][unit, p]
            word = plgpu.load(
                x["words"].at[b, page, at % ROWS, jnp.maximum(lane, 0)], mask=lane >= 0, other=0
            )
            code += ((word >> bit.astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.int32) << p
        half = x["gains"][unit, code].astype(jnp.float16)
        half = jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)
        return (half * _ONE).reshape(*_SHAPE, 1)

    def own(step, gain):
        """+-gain of a step's lanes, float16 [256, RUN]."""
        lanes = x["lanes"][group, step] + lane
        words = x["words"][b, page, word_row[:, None], lanes[None, :]]
        low, high = jnp.unstack(words.reshape(ROWS, RUN // 2, 2), axis=-1)
        both = [y.reshape(1, 1, 1, ROWS, RUN // 2) for y in (low, high)]
        halves = _halves(*both, select, plan.asm)
        # A bit that is not set is a sign.
        signed = ((~halves << left) & _SIGN) ^ gain
        parts = [(signed >> 16 * i).astype(jnp.uint16) for i in range(2)]
        numbers = jnp.stack(parts, axis=-1).reshape(PAGE, RUN)
        return jax.lax.bitcast_convert_type(numbers, jnp.float16)

    columns = jnp.arange(2 * plan.m, dtype=jnp.int32)
    found = jnp.zeros((PAGE, 2 * plan.m), jnp.float32)
    after = slots if plan.shared else slots + x["after"][b]
    turn = after // plan.block
    for start in range(0, pairs, chunk):
        pair = start + jnp.arange(chunk, dtype=jnp.int32)

        def step(i, carry, pair=pair):
            a, b_, gain = carry
            bits = own(i, gain)
            gain = gains(jnp.minimum(i + 1, steps - 1))
            halves = []
            for j, acc in enumerate((a, b_)):
                columns = (i * RUN + lane)[None, :]
                right = x["matrix"][n, j, pair[:, None], columns]
                halves.append(acc + _dot(bits, right))
            return *halves, gain

        zero = jnp.zeros((PAGE, chunk), jnp.float32)
        a, b_, _ = jax.lax.fori_loop(0, steps, step, (zero, zero, gains(0)))
        if plan.block == 1:
            mean = [x["means"][n, j, 0, pair][None, :] for j in range(2)]
        else:
            offset = after % plan.block
            mean = [x["means"][n, j, offset[:, None], pair[None, :]] for j in range(2)]
        a, b_ = a + mean[0], b_ + mean[1]
        of = 0 if plan.shared else b
        cos, sin = (x["turns"][of, turn[:, None], i, pair[None, :]] for i in range(2))
        turned = (a * cos - b_ * sin, b_ * cos + a * sin)
        for j, key in enumerate(turned):
            query = x["queries"][b, n, j, columns[:, None], pair[None, :]]
            found += _dot(key.astype(jnp.float16), query)
    row = jnp.arange(plan.m, dtype=jnp.int32)
    rows = n * plan.rows + jnp.minimum(row, plan.rows - 1)
    value = triton.one(found) * x["unit"][b, rows][None, :]
    mask = (row < plan.rows)[None, :] & (slots >= 0)[:, None]
    index = (b, (n * plan.rows + row)[None, :], slots[:, None])
    store(out_ref, index, value, mask, interpret=not plan.asm)


def _halves(low: Array, high: Array, select: Array, asm: bool) -> Array:
    """The low or high 16 bits of two words side by side, as selectors say."""
    if asm:
        return triton.assembly("prmt.b32 $0, $1, $2, $3;", low, high, select)
    shift = jnp.where(select == 0x5410, jnp.uint32(0), jnp.uint32(16))
    return (low >> shift & 0xFFFF) | (high >> shift) << 16


def _dot(left: Array, right: Array) -> Array:
    return jax.lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
