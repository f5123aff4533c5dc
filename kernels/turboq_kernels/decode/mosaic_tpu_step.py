"""What a step of attention needs beside the packed tokens, on TPU in two launches.

    prepare   what `mosaic_tpu.launch` takes: queries in the coordinates of keys (folded = q A,
              bias = q . a) as integers over bit planes, what rows see, the steps of every sequence
    finish    one softmax over what the decode kernel found, the exact tokens and a logit sink, and
              out of code space (out = acc U + mass u + exact)

A, a, U and u are those of `turboq_kernels.attention.maps`, the integers those of `mosaic_tpu`. A
grid step takes all heads of one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from turboq_kernels.decode import mosaic_tpu
from turboq_kernels.decode.mosaic_tpu import Operands
from turboq_kernels.decode.mosaic_tpu_kernel import (
    LOG2_E,
    PIECE,
    ROUND_BITS,
    PartSpec,
    Spec,
    rounded,
)
from turboq_kernels.decode.mosaic_tpu_layout import LANES
from turboq_kernels.decode.mosaic_tpu_planes import weights
from turboq_kernels.decode.types import Pages, Side
from turboq_kernels.spans import Rules, Spans, spans

UNROLLED = 8  # heads up to which a program is written out for each
MAX_VMEM = 12 * 2**20  # of the 16 MiB that one kernel may use by default


class Seen(NamedTuple):
    """Positions of query tokens, tokens of sequences, positions of first slots, rows of sinks."""

    at: Any  # int32 [B, T]
    lengths: Any  # int32 [B]
    first: Any  # int32 [B], or 0
    rows: Any  # int32 [B], or None: one after the other


class Exact(NamedTuple):
    """Exact tokens at positions (negative: none there), or sinks, whose slots are positions.

    Sinks are in rows of their own (`Seen.rows`).
    """

    k: Any  # [B, N, S, D], bfloat16 or float32
    v: Any  # [B, N, S, E]
    positions: Any  # int32 [B, S], or None


def vmem_bytes(spec: Spec, dims: tuple[int, int], exact: int, maps: int) -> int:
    """Bytes of VMEM of `finish`, the larger: windows twice; `maps` matrices, `exact` tokens."""
    m, heads, (dim, out) = spec.rows, spec.heads, dims
    sums = sum(math.prod(mosaic_tpu.sums_shape(spec, p)) for p in spec.v)
    stats = (2 + 2 * len(spec.v)) * m * LANES
    vectors = heads * (m * (dim + out) + exact * (dim + out))
    matrix = maps * max(dim, out) * sum(p.layout.lanes for p in (*spec.k, *spec.v))
    return 8 * (heads * (sums + stats) + vectors + matrix)


def prepare(
    q: Float[Array, "B N M D"],
    matrix: Float[Array, "#N D C"],
    offset: Float[Array, "#N D"] | None,
    seen: Seen,
    rules: Rules,
    *,
    spec: Spec,
    k: Side,
    pages: Pages,
    scale: float,
    interpret: bool | pltpu.InterpretParams,
) -> Operands:
    """Row t G + g of a head is query token t."""
    batch, heads, m, dim = q.shape
    inputs = {
        "table": pages.table, "q": q, "matrix": _placed(matrix, spec.k, k, 2),
        "offset": None if offset is None else offset[:, None, :], "weights": _weights(spec.k, k),
    }  # fmt: skip
    own = {
        "table": pl.BlockSpec(pages.table.shape, lambda b, *_: (0, 0)),
        "q": pl.BlockSpec((None, heads, m, dim), lambda b, *_: (b, 0, 0, 0)),
    }
    specs = {name: own.get(name, _whole(x)) for name, x in inputs.items()}
    specs["weights"] = _small(inputs["weights"])
    wide = (batch, spec.rows, LANES)
    kinds = [jnp.int8 if spec.integer(p) else jnp.bfloat16 for p in spec.k]
    shapes = [mosaic_tpu.query_shape(spec, p) for p in spec.k]
    out = Operands(
        table=jax.ShapeDtypeStruct((batch, spec.pages), jnp.int32),
        plan=jax.ShapeDtypeStruct((batch * spec.splits * 3,), jnp.int32),
        queries=[
            jax.ShapeDtypeStruct((batch, heads, *shape), kind)
            for shape, kind in zip(shapes, kinds, strict=True)
        ],
        rows=jax.ShapeDtypeStruct((batch, heads, *mosaic_tpu.rows_shape(spec)), jnp.float32),
        starts=jax.ShapeDtypeStruct(wide, jnp.int32),
        ends=jax.ShapeDtypeStruct(wide, jnp.int32),
    )

    def by_sequence(x):
        rest = (0,) * (len(x.shape) - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, *rest))

    out_specs = jax.tree.map(by_sequence, out)._replace(
        table=pl.BlockSpec(out.table.shape, lambda b, *_: (0, 0)),
        plan=pl.BlockSpec(memory_space=pltpu.SMEM),
    )
    body = functools.partial(
        _prepare, spec=spec, rules=rules, stride=pages.stride_page,
        capacity=pages.table.shape[1] * k.page,
        factor=scale / spec.softcap if spec.softcap else scale * LOG2_E,
    )  # fmt: skip
    return _call(body, scalars_of(seen), inputs, specs, out, out_specs, interpret, "turboq_prepare")


def _call(body, scalars, inputs, specs, out, out_specs, interpret, name: str) -> Any:
    """A grid step a sequence; body(scalars, inputs, out) of references."""
    first, first_tree = jax.tree.flatten(scalars)
    given, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(out)

    def kernel(*refs):
        scalars = jax.tree.unflatten(first_tree, refs[: len(first)])
        inputs = jax.tree.unflatten(tree, refs[len(first) : len(first) + len(given)])
        body(scalars, inputs, jax.tree.unflatten(out_tree, refs[len(first) + len(given) :]))

    found = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first),
            grid=(len(scalars.lengths),),
            in_specs=jax.tree.leaves(specs),
            out_specs=jax.tree.leaves(out_specs),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=name,
    )(*first, *given)
    return jax.tree.unflatten(out_tree, found)


def scalars_of(seen: Seen) -> Seen:
    """As kernels take it: `at` flat, `first` None for 0."""
    first = None if isinstance(seen.first, int) else seen.first
    return seen._replace(at=seen.at.reshape(-1), first=first)


def _tokens(seen: Seen) -> int:
    return seen.at.shape[0] // seen.lengths.shape[0]


def _whole(x: Any) -> Any:
    """All of every array of a tree, kept from step to step."""

    def block(a):
        zeros = (0,) * a.ndim
        return pl.BlockSpec(a.shape, lambda b, *_: zeros)

    return jax.tree.map(block, x)


def _small(x: Any) -> Any:
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), x)


def _placed(matrix: Array, parts: Sequence[PartSpec], side: Side, axis: int) -> Array:
    """Every part's coordinates along `axis` at lanes of its own, zeros between."""
    pieces = []
    for part, start in zip(parts, side.reading.starts, strict=True):
        layout = part.layout
        piece = jax.lax.slice_in_dim(matrix, start, start + layout.width, axis=axis)
        room = [(0, 0)] * matrix.ndim
        room[axis] = (0, layout.lanes - layout.width)
        pieces.append(jnp.pad(piece, room) if room[axis][1] else piece)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _weights(parts: Sequence[PartSpec], side: Side) -> list[Any]:
    """Of every part float32 [#N, planes + 1]: those of its planes, then level(0); None: floats."""

    def one(part: PartSpec, table):
        if part.float_levels:
            return None
        v, first = weights(part.part, part.planes, table, 1)
        return jnp.concatenate([v, first[:, None]], axis=1)

    return [one(p, t) for p, t in zip(parts, side.tables, strict=True)]


def _own(ref, n):
    """Index of head n, or of what all heads share."""
    return n if ref.shape[0] > 1 else 0


def _each_head(heads: int, do) -> None:
    if heads <= UNROLLED:
        for n in range(heads):
            do(n)
        return

    def one(n, _):
        do(n)
        return 0

    jax.lax.fori_loop(0, heads, one, 0)


def of_rows(seen: Seen, rules: Rules, b, m: int, shape) -> tuple[Array, Spans]:
    """Positions of query rows along the first axis of `shape`, and what they see."""
    row, tokens = jax.lax.broadcasted_iota(jnp.int32, shape, 0), _tokens(seen)
    at = jnp.full(shape, seen.at[b * tokens], jnp.int32)
    for t in range(1, tokens):
        at = jnp.where(row >= t * (m // tokens), seen.at[b * tokens + t], at)
    first = jnp.int32(0) if seen.first is None else seen.first[b]
    return at, spans(rules, at, seen.lengths[b], first)


def _prepare(
    seen: Seen, x, out: Operands, *, spec: Spec, rules: Rules, stride: int, capacity: int,
    factor: float,
) -> None:  # fmt: skip
    b, m = pl.program_id(0), x["q"].shape[1]

    @pl.when(b == 0)
    def _():
        out.table[...] = jnp.zeros(out.table.shape, jnp.int32)
        # What lies behind a sequence may be -1: some page.
        out.table[:, : x["table"].shape[1]] = jnp.maximum(x["table"][...], 0) * stride

    found = of_rows(seen, rules, b, m, (spec.rows, LANES))[1]
    real = jax.lax.broadcasted_iota(jnp.int32, (spec.rows, LANES), 0) < m
    out.starts[...] = jnp.where(real, found.starts, 0)
    out.ends[...] = jnp.where(real, jnp.minimum(found.ends, capacity), 0)
    _plan(seen, rules, b, capacity, out.plan, spec)

    def head(n):
        q = filled_rows(x["q"][n], spec.rows)
        folded = product(q, x["matrix"][_own(x["matrix"], n)])
        start = 0
        for i, part in enumerate(spec.k):
            lanes, queries = part.layout.lanes, out.queries[i]
            piece = folded[:, start : start + lanes]
            start += lanes
            unit, constant, total, planes = _query(spec, part, piece, x["weights"][i], n)
            for p, plane in enumerate(planes):
                queries[n, :, p * lanes : (p + 1) * lanes] = plane.astype(queries.dtype)
            for j, number in enumerate((unit * factor, constant, total * factor)):
                out.rows[n, 3 * i + j] = jnp.broadcast_to(number, (spec.rows, LANES))
        bias = jnp.zeros((spec.rows, 1), jnp.float32)
        if x["offset"] is not None:
            bias = jnp.sum(q * x["offset"][_own(x["offset"], n)], axis=1, keepdims=True) * factor
        out.rows[n, 3 * len(spec.k)] = jnp.broadcast_to(bias, (spec.rows, LANES))

    _each_head(spec.heads, head)


def filled_rows(x, count: int) -> Float[Array, "R D"]:
    """float32, with zeros for rows that are not there."""
    x = x.astype(jnp.float32)
    extra = count - x.shape[0]
    return jnp.concatenate([x, jnp.zeros((extra, x.shape[1]), jnp.float32)]) if extra else x


def product(a, b, transposed: bool = False):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _plan(seen: Seen, rules: Rules, b, capacity: int, plan, spec: Spec) -> None:
    """`mosaic_tpu.steps_of` of the tokens that some row sees."""
    low, high = jnp.int32(jnp.iinfo(jnp.int32).max), jnp.int32(0)
    first = jnp.int32(0) if seen.first is None else seen.first[b]
    tokens = _tokens(seen)
    for t in range(tokens):
        found = spans(rules, seen.at[b * tokens + t], seen.lengths[b], first)
        end = jnp.minimum(found.ends, capacity)
        some = end > found.starts
        low = jnp.minimum(low, jnp.where(some, found.starts, low))
        high = jnp.maximum(high, jnp.where(some, end, 0))
    for split in range(spec.splits):
        for i, number in enumerate(mosaic_tpu.steps_of(spec, low, high, split)):
            plan[(b * spec.splits + split) * 3 + i] = number


def _query(spec: Spec, part: PartSpec, piece, weights, n):
    """Unit, constant term, sum [M, 1], and planes [rows, lanes] of the left operand."""
    total = jnp.sum(piece, axis=1, keepdims=True)
    if part.float_levels:
        high = piece.astype(jnp.bfloat16).astype(jnp.float32)
        planes = [_blocks(spec, part, high, piece - high)]
        return jnp.ones_like(total), jnp.zeros_like(total), total, planes
    own, count = _own(weights, n), len(part.planes)
    each = [piece * weights[own, p] for p in range(count)]
    sizes = [jnp.abs(x) for x in each]
    peak = jnp.max(functools.reduce(jnp.maximum, sizes), axis=1, keepdims=True)
    mass = jnp.sum(functools.reduce(jnp.add, sizes), axis=1, keepdims=True)
    # Twice: no integer above 2**31 can arise in the sum over coordinates and planes.
    size = jnp.maximum(peak / PIECE, mass * 2.0**-23)
    unit = jnp.where(size > 0, size, 1.0)
    planes = []
    for x in each:
        whole = rounded(x / unit) - ROUND_BITS
        high = (whole + 128) >> 8
        planes.append(_blocks(spec, part, high, whole - (high << 8)))
    return unit, weights[own, count] * total / unit, total, planes


def _blocks(spec: Spec, part: PartSpec, high, low):
    """[M, lanes] high and low -> [rows, lanes], lane block h in rows of its own, then zeros."""
    layout = part.layout
    pieces = [
        pltpu.roll(x, h * layout.padded, 1) if h else x
        for x in (high, low) for h in range(layout.fold)
    ]  # fmt: skip
    extra = spec.left_rows(part) - sum(len(x) for x in pieces)
    if extra:
        pieces.append(jnp.zeros((extra, layout.lanes), pieces[0].dtype))
    return jnp.concatenate(pieces, axis=0)


def finish(
    q: Float[Array, "B N M D"],
    sums: Sequence[Array],
    stats: Array,
    exact: Sequence[Exact],
    seen: Seen,
    rules: Rules,
    sink: Float[Array, "N M"] | None,
    matrix: Float[Array, "#N C E"],
    mean: Float[Array, "#N E"] | None,
    *,
    spec: Spec,
    v: Side,
    scale: float,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "B T N G E"]:
    """Outputs of a group's heads, normalised; a row that saw nothing becomes zero.

    A row that saw Inf or NaN in an exact token becomes NaN. `sums` and `stats` are of one split.
    """
    batch, heads, m, _ = q.shape
    tokens, out_dim = seen.at.shape[1], matrix.shape[-1]
    if sink is not None:
        sink = jnp.pad(sink.astype(jnp.float32), ((0, 0), (0, spec.rows - m)))[..., None]
    inputs = {
        "q": q, "sums": list(sums), "stats": stats, "sink": sink,
        "matrix": _placed(matrix, spec.v, v, 1), "mean": None if mean is None else mean[:, None],
        "weights": _weights(spec.v, v),
        "exact": [
            x._replace(positions=None if x.positions is None else x.positions[:, None])
            for x in exact
        ],
    }  # fmt: skip

    def by_sequence(x):
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, *rest))

    def of_split(x):
        rest = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, *_: (0, b, *rest))

    specs = {name: _whole(x) for name, x in inputs.items()}
    scalars = scalars_of(seen)
    tree = jax.tree.structure(scalars)

    def by_row(x):
        def place(b, *refs):
            rows = jax.tree.unflatten(tree, refs).rows
            return (b if rows is None else rows[b], *(0,) * (x.ndim - 1))

        return pl.BlockSpec((None, *x.shape[1:]), place)

    specs["q"] = by_sequence(q)
    specs["exact"] = [
        jax.tree.map(by_row if x.positions is None else by_sequence, x) for x in inputs["exact"]
    ]
    specs |= {name: jax.tree.map(of_split, inputs[name]) for name in ("sums", "stats")}
    specs["weights"] = _small(inputs["weights"])
    out = jax.ShapeDtypeStruct((batch, tokens, heads, m // tokens, out_dim), jnp.float32)
    body = functools.partial(_finish, spec=spec, rules=rules, scale=scale)
    return _call(body, scalars, inputs, specs, out, by_sequence(out), interpret, "turboq_finish")


@dataclasses.dataclass(frozen=True)
class Merge:
    """What is static about one softmax over all that query rows see: `m` real ones of `rows`."""

    rules: Rules
    rows: int
    m: int
    scale: float
    softcap: float | None


def _finish(seen: Seen, x, out, *, spec: Spec, rules: Rules, scale: float) -> None:
    b, how = pl.program_id(0), Merge(rules, spec.rows, x["q"].shape[1], scale, spec.softcap)

    def head(n):
        stats = x["stats"]
        total, y = jnp.sum(stats[n, 1], axis=1, keepdims=True), _unfolded(spec, x, n)
        if x["mean"] is not None:
            y = y + total * x["mean"][_own(x["mean"], n)]
        sink = None if x["sink"] is None else x["sink"][n]
        put(out, n, merged(how, seen, x["q"][n], x["exact"], (stats[n, 0], total, y), sink, b, n))

    _each_head(spec.heads, head)


def put(out, n, y) -> None:
    """Rows [R, E] of head n, token by token."""
    per = out.shape[2]
    for t in range(out.shape[0]):
        out[t, n] = y[t * per : (t + 1) * per]


def merged(how: Merge, seen: Seen, q, exact: Sequence[Exact], stored, sink, b, n):
    """Outputs [R, E] of query rows [M, D] of head n of sequence b.

    `stored`: the top [R, 128] in powers of two, total [R, 1] and sums [R, E] of what is packed.
    """
    q, (top, total, y) = filled_rows(q, how.rows), stored
    tops = [jnp.where(total > 0, top[:, :1] * (1 / LOG2_E), -jnp.inf)]
    segments, broken = [], jnp.zeros((how.rows, 1), jnp.float32)
    for segment in exact:
        logits, values, bad = _logits(how, seen, segment, q, b, n)
        segments.append((logits, values))
        broken = jnp.maximum(broken, bad)
        tops.append(jnp.max(logits, axis=1, keepdims=True))
    if sink is not None:
        tops.append(sink)
    top = functools.reduce(jnp.maximum, tops)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    factor = jnp.exp(tops[0] - base)
    weight, y = total * factor, y * factor
    for logits, values in segments:
        p = jnp.exp(logits - base)
        weight = weight + jnp.sum(p, axis=1, keepdims=True)
        y = y + product(p, values)
    if sink is not None:
        weight = weight + jnp.exp(sink - base)
    y = y / jnp.where(weight > 0, weight, 1.0)
    return jnp.where(broken > 0, jnp.nan, y)


def _logits(how: Merge, seen: Seen, x: Exact, q, b, n):
    """Logits [M, S] over exact tokens, -inf of those not seen; values; which rows saw a broken one.

    Broken vectors are taken apart: a weight of zero times Inf would be NaN.
    """
    (k, bad_k), (v, bad_v) = (_sound(y[n].astype(jnp.float32)) for y in (x.k, x.v))
    shape = (how.rows, k.shape[0])
    at, found = of_rows(seen, how.rules, b, how.m, shape)
    if x.positions is None:
        held, low = jax.lax.broadcasted_iota(jnp.int32, shape, 1), found.low
        visible = held < seen.lengths[b]
    else:
        held = jnp.broadcast_to(x.positions[...], shape)
        low = found.lower(how.rules.policy.sinks)
        visible = held >= 0
    visible &= (held >= low) & (held <= at)
    visible &= jax.lax.broadcasted_iota(jnp.int32, shape, 0) < how.m
    logits = product(q, k, True) * how.scale
    if how.softcap is not None:
        logits = how.softcap * jnp.tanh(logits / how.softcap)
    ones = [jnp.ones((how.rows, bad.shape[1]), jnp.float32) for bad in (bad_k, bad_v)]
    broken = product(ones[0], bad_k, True) + product(ones[1], bad_v, True)
    broken = jnp.max(jnp.where(visible, broken, 0.0), axis=1, keepdims=True)
    return jnp.where(visible, logits, -jnp.inf), v, broken


def _sound(x):
    """x with zeros for Inf and NaN, and ones where those are."""
    sound = jnp.abs(x) < jnp.inf
    return jnp.where(sound, x, 0.0), jnp.where(sound, 0.0, 1.0)


def _unfolded(spec: Spec, x, n) -> Float[Array, "M E"]:
    """Sums over planes as sums of values (`mosaic_tpu`), out of code space."""
    matrix, stats, rows = x["matrix"], x["stats"], spec.rows
    y, start = None, 0
    for i, part in enumerate(spec.v):
        layout, sums, count = part.layout, x["sums"][i], max(len(part.planes), 1)
        acc = jnp.zeros((rows, layout.lanes), jnp.float32)
        for p in range(count):
            plane = sums[n, :, p * layout.lanes : (p + 1) * layout.lanes]
            own = _own_blocks(layout, plane, rows)
            if not part.float_levels:
                own = own * x["weights"][i][_own(x["weights"][i], n), p]
            acc = acc + own
        mass, offset = (jnp.sum(stats[n, j], axis=1, keepdims=True) for j in (2 + 2 * i, 3 + 2 * i))
        if not part.float_levels:
            acc = acc + mass * x["weights"][i][_own(x["weights"][i], n), count]
        acc = acc + offset
        piece = matrix[_own(matrix, n), start : start + layout.lanes, :]
        start += layout.lanes
        more = product(acc, piece)
        y = more if y is None else y + more
    assert y is not None
    return y


def _own_blocks(layout, plane, rows: int):
    """Rows h of a plane belong to lane block h: their sum in the first block, the rest arbitrary.

    What is arbitrary is finite and meets zeros of the matrix.
    """
    own = plane[:rows]
    for h in range(1, layout.fold):
        block = plane[h * rows : (h + 1) * rows]
        own = own + pltpu.roll(block, layout.lanes - h * layout.padded, 1)
    return own
