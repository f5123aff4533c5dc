"""The body of the Triton kernels over packed head-pages, for decode and for prefill.

One program reads one KV head of one part of the tokens (`triton_parts`) for one tile of query rows,
`tile_rows` word rows (32 tokens each) at a time: a row of a page holds tokens `rows * j + r` of its
page at bit j, and as attention does not care for order inside a tile, tokens stay as they come out
of the registers.

    K tile [w, T] (bfloat16, unpacked)   S' [T, M] = sum_i scale_i (K_i' q_i) + offset_i sum(q_i)
    softmax over T, online               acc_i [w, M] += V_i [w, T] (p scale_i)

The long side of the matrix units of Hopper (wgmma, 64) takes tokens and coordinates, as written,
where query rows M are few, and the query rows of a tile of 64: S [M, T], acc_i [M, w], whose
probabilities then go from one product into the other without leaving the registers. For M up to 16
the query and the probabilities are given as two bfloat16 numbers each, side by side, so that only
the levels themselves are rounded to bfloat16. Tokens that no row of a tile sees are not read.

Channels of a tile are permuted (c = 4l + k at place k * w/4 + l): a thread loads 4 words at once,
and neighbouring lanes still write neighbouring rows of shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from turboq_kernels.decode import triton_parts
from turboq_kernels.decode import triton_unpack as unpacking
from turboq_kernels.decode.types import Coded, Pages, Partial, Side
from turboq_kernels.target import target

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
_ROWS_FIRST = 64  # from this many query rows on they are the long side
_SPLIT_ROWS = 16  # up to this many query rows, queries and probabilities are two bfloat16 each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Word rows per step, warps, stages of load pipelining, programs a multiprocessor holds."""

    tile_rows: int
    num_warps: int
    num_stages: int
    residency: int


def attend(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    bias: Float[Array, "B N M"] | None,
    scale: float,
    softcap: float | None,
    splits: int | None,
    interpret: bool,
    tuned: Tuning,
    rows: int,
    name: str,
) -> Partial:
    """What `turboq_kernels.decode.api.decode` says, `rows` query rows (a power of two) at a time.

    `splits` None spreads the tokens over what the GPU runs at a time; with a number, what a
    sequence gives does not depend on the others of its batch. `name` is the kernel's.
    """
    batch, heads, m, _ = q.shape
    plan, count = planned(
        (batch, heads, m), k, v, pages, scale=scale, softcap=softcap, splits=splits,
        interpret=interpret, tuned=tuned, rows=rows,
    )  # fmt: skip
    low, high = bounds(starts, ends, plan)
    if plan.whole or splits is not None:
        parts = triton_parts.split(low, high, splits or 1)
    else:
        parts = triton_parts.spread(low, high, count)
    pages = dataclasses.replace(pages, table=jnp.maximum(pages.table, 0))  # -1: seen by nobody
    found = launch(
        q, k, v, pages, starts, ends, [low, high] if plan.whole else list(parts[:3]), bias=bias,
        plan=plan, count=count, tuned=tuned, name=name,
    )  # fmt: skip
    if not plan.whole:
        found = triton_parts.merge(found, parts.start, batch=batch, interpret=interpret)
    return jax.tree.map(lambda x: x[:, :, :m], found)


def planned(
    sizes: tuple[int, int, int], k: Side, v: Side, pages: Pages, *, scale: float,
    softcap: float | None, splits: int | None, interpret: bool, tuned: Tuning, rows: int,
) -> tuple[Plan, int]:  # fmt: skip
    """What is static about a call of (batch, heads, query rows), and how many parts there are."""
    batch, heads, m = sizes
    tiles = -(-m // rows)
    steps = -(-pages.table.shape[1] * k.page // (tuned.tile_rows * 32))
    gpu = target()
    count = batch * tiles * (splits or 1)
    if splits is None:
        slots = gpu.processors * tuned.residency
        count = triton_parts.count(batch * tiles, heads, steps, slots)
    plan = Plan(
        k=_runs(k), v=_runs(v), rows=k.rows,
        strides=(pages.stride_page, pages.stride_head), m=rows, tiles=tiles,
        tile_rows=tuned.tile_rows, whole=count == batch * tiles, steps=steps, scale=scale,
        softcap=softcap, interpret=interpret, asm=gpu.ptx and not interpret,
    )  # fmt: skip
    return plan, count


def launch(
    q: Float[Array, "B N _ C"], k: Side, v: Side, pages: Pages, starts: Int[Array, "_ m"],
    ends: Int[Array, "_ m"], parts: list[Int[Array, "_"]], *, bias: Float[Array, "B N _"] | None,
    plan: Plan, count: int, tuned: Tuning, name: str,
) -> Partial:  # fmt: skip
    """The softmax of every part: [P, N, rows], or [B, N, tiles * rows] of a whole plan.

    `parts`: `triton_parts.Parts` up to `last`, of a whole plan the bounds of every item.
    """
    batch, heads = q.shape[:2]
    inputs = {
        "table": pages.table,
        "bounds": parts,
        "starts": starts,
        "ends": ends,
        "bias": bias,
        # Rounded out here, a large tile goes from memory into the matrix units, by no register.
        "q": q.astype(jnp.bfloat16 if plan.rows_first else jnp.float32),
        "k": _operands(k),
        "v": _operands(v),
    }
    leaves, tree = jax.tree.flatten(inputs)
    lead = (batch, heads, plan.tiles * plan.m) if plan.whole else (count, heads, plan.m)
    acc, top, total = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(plan.tiles, heads, batch) if plan.whole else (count, heads),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, v.reading.width), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tuned.num_warps, num_stages=tuned.num_stages
        ),
        interpret=plan.interpret,
        name=name,
    )(*leaves)
    return Partial(acc=acc, top=top, total=total)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A power-of-two run of coordinates of one part: what the kernel unpacks into one tile."""

    part: int  # of the side's reading
    first: int  # coordinate within the part
    start: int  # coordinate within the side
    width: int
    bits: int
    levels: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    k: tuple[_Run, ...]
    v: tuple[_Run, ...]
    strides: tuple[int, int]
    rows: int  # word rows per page
    m: int  # query rows of a tile
    tiles: int  # of query rows
    tile_rows: int
    whole: bool  # a program reads all tokens of its item
    steps: int
    scale: float
    softcap: float | None
    interpret: bool
    asm: bool  # NVIDIA's instructions, or plain operations
    clamped: bool = False  # entries of the page table may be negative

    @property
    def columns(self) -> int:
        return 2 * self.m if self.m <= _SPLIT_ROWS else self.m

    @property
    def rows_first(self) -> bool:
        """Query rows on the long side of the products: logits are [M, T], sums [M, w]."""
        return self.m >= _ROWS_FIRST

    def square(self, tokens: int, rows: int) -> tuple[int, int]:
        """Shape of an array over tokens (or coordinates) and query rows."""
        return (rows, tokens) if self.rows_first else (tokens, rows)

    def of_tokens(self, x: Array) -> Array:
        """A number per token (or coordinate), to meet such an array."""
        return x[None, :] if self.rows_first else x[:, None]

    def of_rows(self, x: Array) -> Array:
        """A number per query row, to meet such an array."""
        return x[:, None] if self.rows_first else x[None, :]

    @property
    def over_tokens(self) -> int:
        """The axis of tokens (or coordinates) of such an array."""
        return 1 if self.rows_first else 0


def _runs(side: Side) -> tuple[_Run, ...]:
    """Every part as power-of-two runs, widest first: 96 = 64 + 32."""
    runs = []
    for i, (part, start) in enumerate(zip(side.reading.parts, side.reading.starts, strict=True)):
        first = 0
        while first < part.width:
            width = 1 << ((part.width - first).bit_length() - 1)
            runs.append(_Run(i, first, start + first, width, part.bits, part.levels))
            first += width
    return tuple(runs)


def _two(x: Float[Array, "*s M"], plan: Plan) -> Array:
    """x as bfloat16 [*s, columns]; of split rows the leading 8 bits, and beside it the next 8."""
    if plan.columns == plan.m:
        return x.astype(jnp.bfloat16)
    # Both cut, not rounded: the sum keeps 16 bits, and taking the upper halves is cheap.
    high, rest = _cut(x)
    low, _ = _cut(rest)
    pair = jnp.stack([high, low], axis=-1)
    return pair.swapaxes(-1, -2).reshape(*x.shape[:-1], plan.columns)


def _cut(x: Float[Array, "*s"]) -> tuple[Array, Array]:
    """x cut to bfloat16, and what is left in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return high, x - kept


def _operands(side: Side) -> dict[str, Any]:
    """Buffers and level tables by part; those of affine codes and signs are made here."""
    tables = []
    for part, table in zip(side.reading.parts, side.tables, strict=True):
        if part.levels == "sign":
            table = jnp.array([[-1.0, 1.0]], jnp.float32)
        elif part.levels == "affine" and part.bits <= unpacking.NIBBLE_BITS:
            table = jnp.arange(2.0**part.bits, dtype=jnp.float32)[None]
        tables.append(table)
    return {
        "words": list(side.words),
        "scales": list(side.scales),
        "offsets": list(side.offsets),
        "tables": tables,
    }


def _kernel(*refs, plan: Plan, tree) -> None:
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    acc_ref, top_ref, total_ref = refs[tree.num_leaves :]
    n = pl.program_id(1)
    if plan.whole:
        tile, b = pl.program_id(0), pl.program_id(2)
        first, last = (bound[b * plan.tiles + tile] for bound in inputs["bounds"])
    else:
        item, first, last = (bound[pl.program_id(0)] for bound in inputs["bounds"])
        b, tile = item // plan.tiles, item % plan.tiles
    m, tile_tokens = plan.m, plan.tile_rows * 32
    rows = tile * m + jnp.arange(m, dtype=jnp.int32)
    real = rows < inputs["starts"].shape[1]  # padding rows see nothing
    at = jnp.minimum(rows, inputs["starts"].shape[1] - 1)
    starts = jnp.where(real, inputs["starts"][b, at], 0)
    ends = jnp.where(real, inputs["ends"][b, at], 0)
    bias = None if inputs["bias"] is None else inputs["bias"][b, n, at]
    exact = [_query(inputs["q"], b, n, at, real, run, plan) for run in plan.k]
    queries = exact if plan.rows_first else [_two(piece, plan) for piece in exact]
    sums: list[Any] = [
        sum(
            jnp.sum(piece.astype(jnp.float32), axis=plan.over_tokens)
            for run, piece in zip(plan.k, exact, strict=True)
            if run.part == i
        )
        for i in range(len(inputs["k"]["words"]))
    ]
    k_tables = [_registers(inputs["k"], run, n) for run in plan.k]
    v_tables = [_registers(inputs["v"], run, n) for run in plan.v]
    lowest = jnp.min(jnp.where(ends > starts, starts, jnp.int32(2**30)))
    highest = jnp.max(jnp.where(ends > starts, ends, 0))
    bits = unpacking.bit_of_field(jnp.arange(32, dtype=jnp.int32))
    gain = plan.scale * (LOG2E if plan.softcap is None else 1.0)

    def located(s):
        """Head-pages and word rows of a step's rows, and its tokens within their pages."""
        at = s * plan.tile_rows + jnp.arange(plan.tile_rows, dtype=jnp.int32)
        p, row = at // plan.rows, at % plan.rows
        page = inputs["table"][b, jnp.minimum(p, inputs["table"].shape[1] - 1)]
        page = jnp.maximum(page, 0) if plan.clamped else page  # -1: a page that nobody sees
        page = page * plan.strides[0] + n * plan.strides[1]
        return p, row, page, plan.rows * bits[None, :] + row[:, None]

    def vectors(page, inner, side, i):
        """Scale and offset of a step's tokens in one part, as they are stored."""
        pages = jnp.broadcast_to(page[:, None], inner.shape)
        refs = inputs[side]["scales"][i], inputs[side]["offsets"][i]
        return [ref if ref is None else _numbers(ref, pages, inner, n, plan) for ref in refs]

    def all_vectors(s):
        _, _, page, inner = located(s)
        return {(side, i): vectors(page, inner, side, i) for side, i in carried}

    # Few rows wait for memory, not for registers: they load scales a step ahead of their use.
    every = [(side, i) for side in ("k", "v") for i in range(len(inputs[side]["words"]))]
    carried = [] if plan.rows_first else every

    def step(s, carry):
        accs, top, total, stored = carry
        p, row, page, inner = located(s)
        ahead = all_vectors(jnp.minimum(s + 1, last - 1)) if carried else {}
        slots = (p[:, None] * (plan.rows * 32) + inner).reshape(tile_tokens)

        def numbers(side, i):
            of = stored[side, i] if carried else vectors(page, inner, side, i)
            return [x if x is None else x.astype(jnp.float32).reshape(tile_tokens) for x in of]

        logits = jnp.zeros(plan.square(tile_tokens, m), jnp.float32)
        side = inputs["k"]
        for i in range(len(side["words"])):
            raw = jnp.zeros(plan.square(tile_tokens, plan.columns), jnp.float32)
            for run, table, query in zip(plan.k, k_tables, queries, strict=True):
                if run.part == i:
                    levels = _levels(side["words"][i], page, row, run, table, plan)
                    raw += _dot(levels, query, 0, plan)
            raw = _one(raw, plan)
            scales, offsets = numbers("k", i)
            raw = raw * (gain if scales is None else plan.of_tokens(scales) * gain)
            if offsets is not None:
                raw += plan.of_tokens(offsets * gain) * plan.of_rows(sums[i])
            logits = raw if i == 0 else logits + raw
        if bias is not None:
            logits += plan.of_rows(bias * gain)
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * LOG2E)
        at_slot = plan.of_tokens(slots)
        seen = (at_slot >= plan.of_rows(starts)) & (at_slot < plan.of_rows(ends))
        logits = jnp.where(seen, logits, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(logits, axis=plan.over_tokens))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = unpacking.exp2(logits - plan.of_rows(base), plan.asm)
        old = unpacking.exp2(top - base, plan.asm)
        total = total * old + jnp.sum(weights, axis=plan.over_tokens)

        # A NaN in a slot nobody sees must not reach the sums as 0 * NaN.
        held = (slots >= lowest) & (slots < highest)
        side, new = inputs["v"], []
        for i in range(len(side["words"])):
            scales, offsets = numbers("v", i)
            weighted = weights
            if scales is not None:
                weighted = weights * plan.of_tokens(jnp.where(held, scales, 0.0))
            weighted = _two(weighted, plan)
            shift = None
            if offsets is not None:
                offset = plan.of_tokens(jnp.where(held, offsets, 0.0))
                shift = jnp.sum(weights * offset, axis=plan.over_tokens)
            for run, table, acc in zip(plan.v, v_tables, accs, strict=True):
                if run.part == i:
                    levels = _levels(side["words"][i], page, row, run, table, plan)
                    acc = acc * plan.of_rows(old) + _one(_dot(levels, weighted, 1, plan), plan)
                    new.append(acc if shift is None else acc + plan.of_rows(shift))
        return new, new_top, total, ahead

    carry = (
        [jnp.zeros(plan.square(run.width, m), jnp.float32) for run in plan.v],
        jnp.full((m,), -jnp.inf, jnp.float32),
        jnp.zeros((m,), jnp.float32),
        all_vectors(first) if carried else {},
    )
    accs, top, total, _ = jax.lax.fori_loop(first, last, step, carry)
    place, at = (b, tile * m) if plan.whole else (pl.program_id(0), 0)
    for run, acc in zip(plan.v, accs, strict=True):
        across, down = _places(run, at + jnp.arange(m, dtype=jnp.int32), plan)
        acc_ref[place, n, across, down] = acc
    span = pl.ds(at, m)
    top_ref[place, n, span] = top * LN2
    total_ref[place, n, span] = total


def _numbers(ref, pages, inner, n, plan: Plan) -> Array:
    """Numbers of tokens `inner` of head-pages, as they are stored or what their codes say."""
    if not isinstance(ref, Coded):
        return ref[pages, inner]
    row, bit = inner % plan.rows, (inner // plan.rows).astype(jnp.uint32)
    none, code = jnp.zeros_like(row), jnp.zeros_like(row)
    for p in range(ref.words.shape[1]):
        word = ref.words[pages, none + p, row, none]
        code += ((word >> bit) & jnp.uint32(1)).astype(jnp.int32) << p
    return ref.table[none + n, code]


def bounds(
    starts: Int[Array, "B M"], ends: Int[Array, "B M"], plan: Plan
) -> tuple[Int[Array, "I"], Int[Array, "I"]]:
    """First step and the one after the last of what some row of every item sees."""
    tokens = plan.tile_rows * 32
    unit = max(plan.rows * 32, tokens)  # the tokens of a page are spread over all its steps
    each = unit // tokens
    padding = ((0, 0), (0, plan.tiles * plan.m - starts.shape[1]))
    shape = (starts.shape[0] * plan.tiles, plan.m)
    starts, ends = (jnp.pad(x, padding).reshape(shape) for x in (starts, ends))
    seen = ends > starts
    low = jnp.min(jnp.where(seen, starts, jnp.int32(2**30)), axis=1) // unit * each
    high = (jnp.max(jnp.where(seen, ends, 0), axis=1) + unit - 1) // unit * each
    return low, jnp.minimum(high, plan.steps)


def _places(run: _Run, rows: Array, plan: Plan) -> tuple[Array, Array]:
    """Query row and coordinate of a tile's places: coordinate k * w/4 + l is 4l + k."""
    place = jnp.arange(run.width, dtype=jnp.int32)
    lanes = run.width // 4
    channel = run.start + 4 * (place % lanes) + place // lanes
    shape = plan.square(run.width, rows.shape[0])
    rows, channel = plan.of_rows(rows), plan.of_tokens(channel)
    return jnp.broadcast_to(rows, shape), jnp.broadcast_to(channel, shape)


def _query(ref, b, n, at, real, run: _Run, plan: Plan) -> Float[Array, "..."]:
    """The query's coordinates of one run in a tile's order, zero in padding rows."""
    rows, channels = _places(run, at, plan)
    mask = jnp.broadcast_to(plan.of_rows(real), rows.shape)
    return plgpu.load(ref.at[b, n, rows, channels], mask=mask, other=0)


def _registers(side: dict[str, Any], run: _Run, n) -> list[Array] | None:
    """The look-up registers of a run, shaped to meet words [rows, w / 4, 4].

    Every lane loads its own copy: as scalars they would lie in uniform registers, of which `prmt`
    cannot read two.
    """
    ref = side["tables"][run.part]
    if ref is None:
        return None
    head = jnp.full((run.width // 4,), n if ref.shape[0] > 1 else 0, jnp.int32)
    levels = [ref[head, jnp.full_like(head, i)] for i in range(ref.shape[1])]
    return [x[None, :, None] for x in unpacking.byte_tables(levels)]


def _one(x: Float[Array, "T columns"], plan: Plan) -> Float[Array, "T M"]:
    """The sum of the two halves of split rows."""
    if plan.columns == plan.m:
        return x
    high, low = jax.lax.split(x, (plan.m, plan.m), axis=1)
    return high + low


def _dot(levels: Array, other: Array, axis: int, plan: Plan) -> Array:
    """Product of levels [w, T], over their axis `axis`, with queries or weights, in float32."""
    if plan.rows_first:
        left, right, axes = other, levels, ((1,), (axis,))
    else:
        left, right, axes = levels, other, ((axis,), (0,))
    return jax.lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)


def _levels(ref, page, row, run: _Run, table, plan: Plan) -> Array:
    """The levels of one run, bfloat16 [w (permuted), T]."""
    shape = (plan.tile_rows, run.width // 4, 4)
    span = pl.ds(run.first, run.width)
    planes = [ref[page, p, row, span].reshape(shape) for p in range(run.bits)]
    if table is not None:
        words = unpacking.lookup_words(planes, table, plan.asm, together=plan.interpret)
    elif run.levels in ("int8", "affine"):
        words = unpacking.byte_words(planes, plan.asm)
        words = unpacking.integer_words(words, run.levels == "int8", plan.asm)
    else:
        words = unpacking.byte_words(planes, plan.asm)
        words = unpacking.float_words(words, run.levels == "e4m3", plan.asm)
    joined = jnp.stack(words, axis=-1) if plan.interpret else join(words)
    halves = (joined.astype(jnp.uint16), (joined >> 16).astype(jnp.uint16))
    halves = [jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in halves]
    tile = jnp.stack(halves, axis=-1).reshape(*shape, 32).transpose(2, 1, 0, 3)
    return tile.reshape(run.width, plan.tile_rows * 32)


def join(arrays: list[Array]) -> Array:
    """Stacks 2**n arrays along n new last axes, the first array's bits the most significant."""
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [jnp.stack([arrays[i], arrays[i + half]], axis=-1) for i in range(half)]
    return arrays[0]
