"""Decode on GPUs by Pallas-Triton: split-KV attention over packed head-pages on the tensor cores.

One program reads one sequence, one KV head and one part of its tokens, `tile_rows` word rows (32
tokens each) at a time: a row of a page holds tokens `rows * j + r` of its page at bit j, and as
attention does not care for order inside a tile, tokens stay as they come out of the registers.

    K tile [w, T] (bfloat16, unpacked)   S' [T, M] = sum_i scale_i (K_i' q_i) + offset_i sum(q_i)
    softmax over T, online               acc_i [w, M] += V_i [w, T] (p scale_i)

Tokens and coordinates are on the long side of both products and the few query rows M (T * G, padded
to 8) on the short side, which is what the matrix units of Hopper take (wgmma, M padded to 16). For
M up to 16 the query and the probabilities are given as two bfloat16 numbers each, side by side, so
that only the levels themselves are rounded to bfloat16.

Channels of a tile are permuted (c = 4l + k at place k * w/4 + l): a thread loads 4 words at once,
and neighbouring lanes still write neighbouring rows of shared memory. Tuned numbers: `triton.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from turboq_kernels import merge
from turboq_kernels.decode.types import Pages, Partial, Side

try:
    from jax.experimental.pallas import triton as plgpu

    from turboq_kernels.decode import triton_unpack as unpacking
except ImportError as error:  # deprecated since JAX 0.11
    raise ImportError(
        f"JAX {jax.__version__} has no Pallas-Triton backend (jax.experimental.pallas.triton), "
        "which this kernel is written in; use JAX 0.11 or 0.12, or implementation='xla'"
    ) from error

_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
_SPLIT_ROWS = 16  # up to this many query rows, queries and probabilities are two bfloat16 each
_MAX_ROWS = 64
_MIN_RUN = 16  # the matrix units' smallest depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Word rows per step, warps per program, stages of load pipelining, programs to aim at."""

    tile_rows: int
    num_warps: int
    num_stages: int
    programs: int


@functools.cache
def _table() -> dict[str, Any]:
    file = importlib.resources.files("turboq_kernels.decode") / "triton.json"
    return json.loads(file.read_text())


def tuning(dim: int, rows: int) -> Tuning:
    """The tuned numbers for the widest side's `dim` coordinates and `rows` padded query rows."""
    for entry in _table()["sm_90"]:
        if dim <= entry["dim_up_to"] and rows <= entry["rows_up_to"]:
            return Tuning(**{f.name: entry[f.name] for f in dataclasses.fields(Tuning)})
    raise ValueError(f"no tuning for {dim=}, {rows=}")


def unsupported(q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages) -> str | None:
    """Why this kernel cannot run a case, or None."""
    if q.shape[2] > _MAX_ROWS:
        return f"{q.shape[2]} query rows per KV head are more than {_MAX_ROWS}"
    for side in (k, v):
        for part in side.reading.parts:
            if part.levels == "table" and part.bits > unpacking.NIBBLE_BITS:
                return f"a level table of {part.bits} bits ({part.field!r}) has no look-up"
            if part.width % _MIN_RUN:
                return f"{part.width} coordinates of {part.field!r} are no multiple of {_MIN_RUN}"
        if side.reading.width > 512:
            return f"{side.reading.width} coordinates are more than 512"
    return None


def decode(
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
    interpret: bool = False,
    tuned: Tuning | None = None,
) -> Partial:
    """See `turboq_kernels.decode.api.decode`; `tuned` overrides `triton.json`."""
    batch, heads, m, _ = q.shape
    rows = max(8, 1 << (m - 1).bit_length())
    tuned = tuned or tuning(max(k.reading.width, v.reading.width), rows)
    steps = -(-pages.table.shape[1] * k.page // (tuned.tile_rows * 32))
    if splits is None:
        splits = max(1, min(-(-tuned.programs // (batch * heads)), steps))
    plan = _Plan(
        k=_runs(k), v=_runs(v), strides=(pages.stride_page, pages.stride_head), rows=k.rows,
        m=rows, tile_rows=tuned.tile_rows, splits=splits, steps=steps, scale=scale,
        softcap=softcap, interpret=interpret, asm=not (interpret or _is_amd()),
    )  # fmt: skip
    inputs = {
        "table": pages.table,
        "bounds": _bounds(starts, ends, plan),
        "starts": starts,
        "ends": ends,
        "bias": bias,
        "q": q.astype(jnp.float32),
        "k": _operands(k),
        "v": _operands(v),
    }
    leaves, tree = jax.tree.flatten(inputs)
    lead = (batch, heads, splits, rows)
    acc, top, total = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tree=tree),
        grid=(splits, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, v.reading.width), jnp.float32),
            *[jax.ShapeDtypeStruct(lead, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tuned.num_warps, num_stages=tuned.num_stages
        ),
        interpret=interpret,
        name="turboq_decode",
    )(*leaves)
    parts = Partial(acc=acc, top=top, total=total)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, :m], 2, 0), parts)
    return jax.tree.map(lambda x: x[0], parts) if splits == 1 else merge.merge(parts)


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
class _Plan:
    k: tuple[_Run, ...]
    v: tuple[_Run, ...]
    strides: tuple[int, int]
    rows: int  # word rows per page
    m: int  # padded query rows
    tile_rows: int
    splits: int
    steps: int
    scale: float
    softcap: float | None
    interpret: bool
    asm: bool  # NVIDIA's instructions, or plain operations

    @property
    def columns(self) -> int:
        return 2 * self.m if self.m <= _SPLIT_ROWS else self.m


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


def _two(x: Float[Array, "*s M"], plan: _Plan) -> Array:
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


def _is_amd() -> bool:
    return "rocm" in jax.devices()[0].client.platform_version.lower()


def _kernel(*refs, plan: _Plan, tree) -> None:
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    acc_ref, top_ref, total_ref = refs[tree.num_leaves :]
    split, n, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    m, tile_tokens = plan.m, plan.tile_rows * 32
    rows = jnp.arange(m, dtype=jnp.int32)
    real = rows < inputs["starts"].shape[1]  # padding rows see nothing
    at = jnp.minimum(rows, inputs["starts"].shape[1] - 1)
    starts = jnp.where(real, inputs["starts"][b, at], 0)
    ends = jnp.where(real, inputs["ends"][b, at], 0)
    bias = None if inputs["bias"] is None else inputs["bias"][b, n, at]
    exact = [_query(inputs["q"], b, n, at, real, run) for run in plan.k]
    queries = [_two(piece, plan) for piece in exact]
    sums: list[Any] = [
        sum(
            jnp.sum(piece, axis=0)
            for run, piece in zip(plan.k, exact, strict=True)
            if run.part == i
        )
        for i in range(len(inputs["k"]["words"]))
    ]
    k_tables = [_registers(inputs["k"], run, n) for run in plan.k]
    v_tables = [_registers(inputs["v"], run, n) for run in plan.v]
    lowest = jnp.min(jnp.where(ends > starts, starts, jnp.int32(2**30)))
    highest = jnp.max(jnp.where(ends > starts, ends, 0))
    first, last = inputs["bounds"][b, split, 0], inputs["bounds"][b, split, 1]
    bits = unpacking.bit_of_field(jnp.arange(32, dtype=jnp.int32))
    gain = plan.scale * (_LOG2E if plan.softcap is None else 1.0)

    def step(s, carry):
        accs, top, total = carry
        at = s * plan.tile_rows + jnp.arange(plan.tile_rows, dtype=jnp.int32)
        p, row = at // plan.rows, at % plan.rows
        page = inputs["table"][b, jnp.minimum(p, inputs["table"].shape[1] - 1)]
        page = page * plan.strides[0] + n * plan.strides[1]
        inner = plan.rows * bits[None, :] + row[:, None]  # token within its page
        slots = (p[:, None] * (plan.rows * 32) + inner).reshape(tile_tokens)
        pages = jnp.broadcast_to(page[:, None], inner.shape)

        def vector(ref):
            return ref[pages, inner].astype(jnp.float32).reshape(tile_tokens)

        logits = jnp.zeros((tile_tokens, m), jnp.float32)
        side = inputs["k"]
        for i in range(len(side["words"])):
            raw = jnp.zeros((tile_tokens, plan.columns), jnp.float32)
            for run, table, query in zip(plan.k, k_tables, queries, strict=True):
                if run.part == i:
                    tile = _tile(side["words"][i], page, row, run, table, plan)
                    raw += _dot(tile, query, 0)
            raw = _one(raw, plan)
            factor = (
                gain if side["scales"][i] is None else vector(side["scales"][i])[:, None] * gain
            )
            raw = raw * factor
            if side["offsets"][i] is not None:
                raw += (vector(side["offsets"][i]) * gain)[:, None] * sums[i][None, :]
            logits = raw if i == 0 else logits + raw
        if bias is not None:
            logits += (bias * gain)[None, :]
        if plan.softcap is not None:
            logits = jnp.tanh(logits / plan.softcap) * (plan.softcap * _LOG2E)
        seen = (slots[:, None] >= starts[None, :]) & (slots[:, None] < ends[None, :])
        logits = jnp.where(seen, logits, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(logits, axis=0))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = unpacking.exp2(logits - base[None, :], plan.asm)
        old = unpacking.exp2(top - base, plan.asm)
        total = total * old + jnp.sum(weights, axis=0)

        # A NaN in a slot nobody sees must not reach the sums as 0 * NaN.
        held = (slots >= lowest) & (slots < highest)
        side, new = inputs["v"], []
        for i in range(len(side["words"])):
            weighted = weights
            if side["scales"][i] is not None:
                weighted = weights * jnp.where(held, vector(side["scales"][i]), 0.0)[:, None]
            weighted = _two(weighted, plan)
            shift = None
            if side["offsets"][i] is not None:
                offset = jnp.where(held, vector(side["offsets"][i]), 0.0)
                shift = jnp.sum(weights * offset[:, None], axis=0)
            for run, table, acc in zip(plan.v, v_tables, accs, strict=True):
                if run.part == i:
                    tile = _tile(side["words"][i], page, row, run, table, plan)
                    acc = acc * old[None, :] + _one(_dot(tile, weighted, 1), plan)
                    new.append(acc if shift is None else acc + shift[None, :])
        return new, new_top, total

    carry = (
        [jnp.zeros((run.width, m), jnp.float32) for run in plan.v],
        jnp.full((m,), -jnp.inf, jnp.float32),
        jnp.zeros((m,), jnp.float32),
    )
    accs, top, total = jax.lax.fori_loop(first, last, step, carry)
    for run, acc in zip(plan.v, accs, strict=True):
        across, down = _places(run, rows)
        acc_ref[b, n, split, across, down] = acc
    top_ref[b, n, split] = top * _LN2
    total_ref[b, n, split] = total


def _bounds(starts: Int[Array, "B M"], ends: Int[Array, "B M"], plan: _Plan) -> Int[Array, "B S 2"]:
    """First and last step of every split, of the slots that some row of the sequence sees."""
    tokens = plan.tile_rows * 32
    unit = max(plan.rows * 32, tokens)  # the tokens of a page are spread over all its steps
    each = unit // tokens
    seen = ends > starts
    low = jnp.min(jnp.where(seen, starts, jnp.int32(2**30)), axis=1) // unit * each
    high = (jnp.max(jnp.where(seen, ends, 0), axis=1) + unit - 1) // unit * each
    high = jnp.minimum(high, plan.steps)
    share = (jnp.maximum(high - low, 0) + plan.splits - 1) // plan.splits
    first = low[:, None] + share[:, None] * jnp.arange(plan.splits, dtype=jnp.int32)[None, :]
    return jnp.stack([first, jnp.minimum(first + share[:, None], high[:, None])], axis=-1)


def _places(run: _Run, rows: Array) -> tuple[Array, Array]:
    """Query row and coordinate of every place of a tile [w, M]: place k * w/4 + l is 4l + k."""
    place = jnp.arange(run.width, dtype=jnp.int32)
    lanes = run.width // 4
    channel = run.start + 4 * (place % lanes) + place // lanes
    shape = (run.width, rows.shape[0])
    return jnp.broadcast_to(rows[None, :], shape), jnp.broadcast_to(channel[:, None], shape)


def _query(ref, b, n, at, real, run: _Run) -> Float[Array, "w M"]:
    """The query's coordinates of one run in a tile's order, zero in padding rows."""
    rows, channels = _places(run, at)
    return jnp.where(real[None, :], ref[b, n, rows, channels], 0.0)


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


def _one(x: Float[Array, "T columns"], plan: _Plan) -> Float[Array, "T M"]:
    """The sum of the two halves of split rows."""
    if plan.columns == plan.m:
        return x
    high, low = jax.lax.split(x, (plan.m, plan.m), axis=1)
    return high + low


def _dot(tile: Array, right: Array, axis: int) -> Array:
    """Product over axis `axis` of the tile [w, T] and axis 0 of `right`, summed in float32."""
    return jax.lax.dot_general(
        tile, right, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _tile(ref, page, row, run: _Run, table, plan: _Plan) -> Array:
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
