"""The body of the TPU decode kernel: all KV heads of one sequence, one split of its tokens.

A pipeline of three stages over steps (see `kernel`): logits by bit planes, online softmax with the
step's own maximum, weighted values by bit planes. Logits and weights are [M, 128] registers, one
for each block (chunk and lane block) and group j, in the token order of `mosaic_tpu_layout`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from turboq.codecs.reading import Part
from turboq_kernels.decode.mosaic_tpu_layout import (
    CHUNK_ROWS,
    GROUPS,
    LANES,
    PartLayout,
    ScaleLayout,
    Step,
)
from turboq_kernels.decode.mosaic_tpu_planes import FLOATS, decode_float, parity

LOWEST = -1e38  # below every logit; masked ones are twice that, so that their weight is zero
ROUND = 1.5 * 2.0**23  # added to |x| < 2**22, leaves round(x) in the low bits of the float
ROUND_BITS = 0x4B400000  # the bits of ROUND
PIECE = 32639.0  # 127 * 256 + 127: the largest integer of a signed high and low byte
UNITS = CHUNK_ROWS // 8
KEYS, WEIGHTS, VALUES = 0, 1, 2  # what the three stages wait for
SHARED = 3  # tiles of scales that all heads of a step share
STEPS_HELD = 4  # steps whose tiles are kept: the one at work, the one before, two on their way


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """One part of K or V: layout, and which scale and offset buffers it uses (None: not stored)."""

    part: Part
    layout: PartLayout
    words: int
    scale: int | None
    offset: int | None
    planes: tuple[int, ...]  # see `mosaic_tpu_planes.subsets`

    @property
    def float_levels(self) -> bool:
        return self.part.levels in FLOATS


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a call."""

    k: tuple[PartSpec, ...]
    v: tuple[PartSpec, ...]
    step: Step
    scales: tuple[ScaleLayout, ...]
    rows: int  # M, rounded up to a multiple of 8
    heads: int
    splits: int
    pages: int  # entries of a sequence's table, a multiple of the step's pages
    stride_head: int
    bulk: bool  # the pages of a step are adjacent
    softcap: float | None
    biased: bool
    int8: bool  # integer matrix unit, else bfloat16

    @property
    def words(self) -> tuple[PartLayout, ...]:
        return tuple(p.layout for p in self.k + self.v)

    def words_of(self, stage: int) -> tuple[int, ...]:
        parts = {KEYS: self.k, WEIGHTS: (), VALUES: self.v}[stage]
        return tuple(p.words for p in parts)

    def scales_of(self, stage: int) -> tuple[int, ...]:
        parts = {KEYS: self.k, WEIGHTS: self.v, VALUES: ()}[stage]
        used = {x for p in parts for x in (p.scale, p.offset)}
        return tuple(sorted(x for x in used if x is not None))

    def rows_of(self, stage: int) -> tuple[int, ...]:
        """Those of which every head has rows of its own."""
        return tuple(i for i in self.scales_of(stage) if not self.scales[i].heads)

    def integer(self, part: PartSpec) -> bool:
        """Whether the planes of a part are multiplied as int8."""
        return self.int8 and not part.float_levels

    def left_rows(self, part: PartSpec) -> int:
        """Rows of the matrix unit's left operand: high and low, lane blocks, M; whole tiles."""
        tile = 32 if self.integer(part) else 16
        return -(-2 * part.layout.fold * self.rows // tile) * tile


def kernel(spec: Spec, *refs):
    """Order of refs: table, plan; queries, rows, starts, ends, words, scales; sums, stats; scratch.

    The items of a call are the heads of one step of its split after the other, in a pipeline of
    three stages whose work fills each other's gaps: iteration i computes the logits of item i, the
    softmax of item i - 1 and the weighted values of item i - 2, while the next two items of each
    stage are on their way. Nothing is conditional: items before the first and past the last have
    weight zero.
    """
    refs = list(refs)

    def take(n):
        out, refs[:n] = refs[:n], []
        return out

    table, plan = take(2)
    queries = take(len(spec.k))
    row_ref, start_ref, end_ref = take(3)
    words, scales = take(len(spec.words)), take(len(spec.scales))
    sums = take(len(spec.v))
    (stats,) = take(1)
    word_buffers, scale_buffers = take(len(spec.words)), take(len(spec.scales))
    weights = take(len(spec.v))
    first_terms, logit_ref, gathered, factors, semaphores = take(5)

    b, split = pl.program_id(0), pl.program_id(1)
    step, m = spec.step, spec.rows
    entry = (b * spec.splits + split) * 3
    first, count, limit = (plan[entry + i] for i in range(3))

    def head_pages(item):
        """Where the head-pages of an item (n, at) lie."""
        n, at = item
        entry = jnp.minimum(at * step.pages, spec.pages - step.pages)
        return [table[b, entry + i] + n * spec.stride_head for i in range(step.pages)]

    def transfers(stage, slot, item):
        at = head_pages(item)
        # Adjacent pages are one copy.
        runs = [(0, step.pages)] if spec.bulk else [(i, 1) for i in range(step.pages)]
        for index in spec.words_of(stage):
            layout, source, target = spec.words[index], words[index], word_buffers[index].at[slot]
            for i, run in runs:
                if layout.whole:
                    yield source.at[pl.ds(at[i], run)], target.at[pl.ds(i, run)]
                else:
                    rows = pl.ds(i * layout.page_rows, layout.page_rows)
                    yield source.at[at[i]], target.at[:, rows, :]
        for index in spec.rows_of(stage):
            layout = spec.scales[index]
            for i, run in runs:
                size = run * layout.page_rows
                source = scales[index].at[pl.ds(layout.first_row(at[i]), size)]
                yield source, scale_buffers[index].at[slot, pl.ds(i * layout.page_rows, size)]

    def send(stage, slot, item):
        for source, target in transfers(stage, slot, item):
            pltpu.make_async_copy(source, target, semaphores.at[stage, slot]).start()

    def arrived(stage, slot):
        held = [word_buffers[i] for i in spec.words_of(stage)]
        held += [scale_buffers[i] for i in spec.rows_of(stage)]
        for buffer in held:
            done = buffer.at[slot]  # a wait needs the destination's size only
            pltpu.make_async_copy(done, done, semaphores.at[stage, slot]).wait()

    shared = [i for i, layout in enumerate(spec.scales) if layout.heads]

    def shares(item):
        """Copies of the tiles of a step that come while this head is at work."""
        n, at = item
        begin = jnp.minimum(at * step.pages, spec.pages - step.pages)
        for index in shared:
            layout = spec.scales[index]
            tiles, each = layout.heads // layout.tile, layout.share(step.pages)
            for j in range(each):
                target = n * each + j
                known = jnp.minimum(target, step.pages * tiles - 1)  # past the last: into nothing
                entry = table[b, begin + known // tiles] >> (layout.tile.bit_length() - 1)
                source = scales[index].at[entry + known % tiles]
                yield pltpu.make_async_copy(
                    source,
                    scale_buffers[index].at[at & (STEPS_HELD - 1), target],
                    semaphores.at[SHARED, at & 1],
                )

    def send_shares(item):
        for copy in shares(item):
            copy.start()

    def shares_arrived(at):
        for index in shared:
            each = pl.ds(0, spec.scales[index].share(step.pages))
            done = scale_buffers[index].at[0, each]
            pltpu.make_async_copy(done, done, semaphores.at[SHARED, at & 1]).wait()

    def every_head(do):
        def one(n, _):
            do(n)
            return 0

        if shared:
            jax.lax.fori_loop(0, spec.heads, one, 0)

    def following(item):
        n, at = item
        last = n + 1 == spec.heads
        return jnp.where(last, 0, n + 1), jnp.where(last, at + 1, at)

    def in_order(index, slot, item):
        layout, (n, at) = spec.scales[index], item
        if layout.heads:
            tiles = scale_buffers[index].at[at & (STEPS_HELD - 1)]
            if tiles.dtype != jnp.uint32:  # JAX's race detector knows no bitcast: words, in a test
                tiles = tiles.bitcast(jnp.uint32)
            own = pl.ds(n % layout.tile // 2, 1)
            rows = [
                layout.words_of(tiles[layout.tile_of(i, n), own, :], n) for i in range(step.pages)
            ]
            values = _in_order(step, layout, rows, None)
        else:
            buffer = scale_buffers[index].at[slot]
            size = step.pages * layout.page_rows
            rows = [buffer[pl.ds(i, 1), :] for i in range(size)]
            values = _in_order(step, layout, rows, head_pages(item))
        for i, value in enumerate(values):
            gathered[index, i] = value

    start = (jnp.int32(0), first)
    second = following(start)
    # The weights of item -1 and the values of items -2 and -1 are those of item 0, times zero.
    for stage, ahead in (
        (KEYS, (start, second)),
        (WEIGHTS, (start, start)),
        (VALUES, (start,) * 2),
    ):
        for slot in (0, 1):
            send(stage, slot, ahead[slot])
    every_head(lambda n: send_shares((n, first)))
    every_head(lambda n: shares_arrived(first))
    every_head(lambda n: send_shares((n, first + 1)))
    low = jnp.maximum(start_ref[0], first * step.tokens)
    high = jnp.minimum(end_ref[0], limit)
    lane = jax.lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
    slots = [
        (step.page_of(lane) + c * step.chunk_pages) * step.page + step.slot_of(lane, h, 0)
        for c, h in step.blocks
    ]
    for ref in (*sums, stats, factors, *weights):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    logit_ref[...] = jnp.full(logit_ref.shape, 2 * LOWEST, jnp.float32)

    def scale_first(n, _):
        for i, part in enumerate(spec.k):
            for j in range(GROUPS):
                power = 1.0 if part.float_levels else _power(j)
                first_terms[n, i, j] = row_ref[0, n, 3 * i + 1] * power
        return 0

    jax.lax.fori_loop(0, spec.heads, scale_first, 0)

    def body(i, items):
        summed, weighed, scored, nxt, after = items
        slot = i & 1
        arrived(KEYS, slot)
        arrived(WEIGHTS, 1 - slot)
        arrived(VALUES, slot)
        shares_arrived(scored[1] + 1)  # one of them: all, after the last head

        totals = _values(spec, weights, word_buffers, slot)
        send(VALUES, slot, scored)
        _add(spec, summed[0], totals, factors, sums)

        p = [[logit_ref[i, j] for j in range(GROUPS)] for i in range(len(step.blocks))]
        for index in spec.scales_of(WEIGHTS):
            in_order(index, 1 - slot, weighed)
        n, fresh = weighed[0], weighed[1] == first
        here = jnp.max(_tree(jnp.maximum, _flat(p)), axis=1, keepdims=True)
        here = jnp.maximum(here, LOWEST)
        p = [[jnp.exp2(x - here) for x in by_j] for by_j in p]
        top = jnp.where(fresh, LOWEST, stats[0, 0, n, 0])
        new_top = jnp.maximum(top, here)
        old = jnp.where(fresh, 0.0, jnp.exp2(top - new_top))
        new = jnp.exp2(here - new_top)
        stats[0, 0, n, 0] = new_top
        stats[0, 0, n, 1] = stats[0, 0, n, 1] * old + new * _tree(jnp.add, _flat(p))
        factors[0] = old
        _weights(spec, n, p, old, new, gathered, weights, factors, stats)

        for index in spec.scales_of(KEYS):
            in_order(index, slot, scored)
        at = scored[1] * step.tokens

        def keep(block, j, logits):
            below, above = low - slots[block] - at, high - slots[block] - at
            seen = (below <= step.rows * j) & (above > step.rows * j)
            logit_ref[block, j] = jnp.where(seen, logits, 2 * LOWEST)

        _logits(spec, scored[0], queries, row_ref, first_terms, gathered, word_buffers, slot, keep)
        # Copies start only between loads and stores: here, where nothing but results of the matrix
        # unit is awaited. The buffers have just been read.
        send(KEYS, slot, after)
        send(WEIGHTS, 1 - slot, nxt)
        send_shares((scored[0], scored[1] + 2))
        return weighed, scored, nxt, after, following(after)

    third = following(second)
    # Items past the last lie behind `limit`: they are masked, and their pages are some page's.
    jax.lax.fori_loop(0, spec.heads * count + 2, body, (start, start, start, second, third))
    for stage in (KEYS, WEIGHTS, VALUES):
        for slot in (0, 1):
            arrived(stage, slot)
    end = first + count
    # Two items behind the last were scored: of that step all shares but two, two of the next.
    every_head(lambda n: shares_arrived(end + jnp.where(n < 2, 0, 1)))


def _flat(by_h):
    return [x for by_j in by_h for x in by_j]


def _power(j: int) -> float:
    """Value of bit j of a byte, as int8."""
    return 2.0**j if j < 7 else -128.0


def _tree(op, items):
    while len(items) > 1:
        items = [
            op(*items[i : i + 2]) if i + 1 < len(items) else items[i]
            for i in range(0, len(items), 2)
        ]
    return items[0]


def _in_order(step: Step, layout: ScaleLayout, rows, head_pages):
    """Entries of a step in logit order: for each block float32 [8, 128], row j for its logits j.

    `rows` are the words of its pages, one after the other, each [1, 128].
    """
    j = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 1)
    page_of = step.page_of(lane)
    for c, h in step.blocks:
        token = step.slot_of(lane, h, j)
        word = token & (LANES - 1) if layout.heads else token // layout.per_word
        found = jnp.zeros((8, LANES), jnp.uint32)
        for i in range(c * step.chunk_pages, (c + 1) * step.chunk_pages):
            at = word if layout.heads else word + layout.first_lane(head_pages[i])
            for row in range(layout.page_rows):
                held = jnp.broadcast_to(rows[i * layout.page_rows + row], (8, LANES))
                picked = jnp.take_along_axis(held, at & (LANES - 1), axis=1)
                here = page_of == i - c * step.chunk_pages
                if layout.page_rows > 1:
                    here &= at // LANES == row
                found = jnp.where(here, picked, found)
        yield layout.decode(found, token >= LANES if layout.heads else token % 2 == 1)


def _operand(spec: Spec, part: PartSpec, buffer, slot, chunk: int, a: int):
    """Right operands of group j: a function j -> list over planes of [128, lanes]."""
    layout = part.layout
    stride = spec.step.fold // layout.fold

    def load(plane, u):
        if layout.whole:
            return buffer[slot, chunk * UNITS + u, plane]
        start = 8 * (chunk * UNITS + u) * stride + a
        if stride == 1:
            return buffer[slot, plane, pl.ds(start, 8), :]
        # Interpret mode takes no integer beside a stride.
        rows = pl.ds(start, 8, stride=stride)
        return buffer[pl.ds(slot, 1), pl.ds(plane, 1), rows, :].reshape(8, layout.lanes)

    stored = [[load(p, u) for p in range(layout.bits)] for u in range(UNITS)]
    if part.float_levels:
        return lambda j: [_float_operand(part, stored, j)]
    planes = [[parity(w, s) for s in part.planes] for w in stored]

    def operand(j):
        mask = jnp.uint32((0x01010101 << j) & 0xFFFFFFFF)
        out = []
        for p in range(len(part.planes)):
            whole = jnp.concatenate([planes[u][p] & mask for u in range(UNITS)], axis=0)
            whole = pltpu.bitcast(whole, jnp.int8)
            out.append(whole if spec.int8 else whole.astype(jnp.bfloat16))
        return out

    return operand


def _float_operand(part: PartSpec, stored, j: int):
    registers = []
    for words in stored:
        code = None
        for p, w in enumerate(words):
            bit = (w >> j if j else w) & jnp.uint32(0x01010101)
            bit = bit << p if p else bit
            code = bit if code is None else code | bit
        registers.append(code)
    codes = pltpu.bitcast(jnp.concatenate(registers, axis=0), jnp.uint8).astype(jnp.int32)
    return decode_float(part.part.levels, codes).astype(jnp.bfloat16)


def _dot(left, right, transposed: bool):
    """left @ right, or left @ right.T, in the matrix unit's exact accumulator."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    out = jnp.int32 if left.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(left, right, dims, preferred_element_type=out)


def _logits(spec: Spec, n, queries, row_ref, first_terms, gathered, buffers, slot, keep):
    """Calls keep(block, j, logits) for a step, in units in which the softmax is a power of two."""
    step, m = spec.step, spec.rows
    out: list[list] = [[None] * GROUPS for _ in step.blocks]
    for index, part in enumerate(spec.k):
        fold = part.layout.fold
        query = queries[index][0, n]
        row = row_ref[0, n, 3 * index]
        for c in range(step.chunks):
            for a in range(step.fold // fold):
                operand = _operand(spec, part, buffers[part.words], slot, c, a)
                for j in range(GROUPS):
                    raw = _dot(query, jnp.concatenate(operand(j), axis=1), True)
                    for inner in range(fold):
                        block = c * step.fold + a * fold + inner
                        value = _join(
                            raw[inner * m : (inner + 1) * m],
                            raw[(fold + inner) * m : (fold + inner + 1) * m],
                            1.0 if part.float_levels else 256.0,
                        )
                        value = value + first_terms[n, index, j]
                        power = 1.0 if part.float_levels else 1.0 / _power(j)
                        if part.scale is not None:
                            scale = gathered[part.scale, block, pl.ds(j, 1), :] * power
                            value = value * jnp.broadcast_to(scale, (m, LANES)) * row
                        else:
                            value = value * (row * power)
                        if part.offset is not None:
                            offset = gathered[part.offset, block, pl.ds(j, 1), :]
                            offset = jnp.broadcast_to(offset, (m, LANES))
                            value = value + offset * row_ref[0, n, 3 * index + 2]
                        if out[block][j] is not None:
                            value = value + out[block][j]
                        if index + 1 == len(spec.k):
                            if spec.biased:
                                value = value + row_ref[0, n, 3 * len(spec.k)]
                            if spec.softcap is not None:
                                value = jnp.tanh(value) * (spec.softcap * LOG2_E)
                            keep(block, j, value)
                        out[block][j] = value


def _join(high, low, unit: float):
    """unit * high + low in float32; the integer sum fits (see `_queries`)."""
    if high.dtype == jnp.int32:
        return ((high << 8) + low).astype(jnp.float32)
    return high * unit + low


LOG2_E = 1.4426950408889634


def _weights(spec: Spec, n, p, old, new, gathered, weights, factors, stats):
    """Left operands of the values of a step into `weights`, their units into `factors`.

    Weights are p times the scale, rounded to 16 bits of the step's largest; `stats` takes their sum
    and that of p times the offset.
    """
    step, m = spec.step, spec.rows

    def times(index):
        """p times the entries of one buffer."""
        if index is None:
            return p
        return [
            [
                p[block][j] * jnp.broadcast_to(gathered[index, block, pl.ds(j, 1), :], (m, LANES))
                for j in range(GROUPS)
            ]
            for block in range(len(step.blocks))
        ]

    for index, part in enumerate(spec.v):
        fold, at = part.layout.fold, 2 + 2 * index
        weighted = times(part.scale)
        if part.offset is not None:
            moved = _tree(jnp.add, _flat(times(part.offset)))
            stats[0, 0, n, at + 1] = stats[0, 0, n, at + 1] * old + new * moved
        gain = jnp.broadcast_to(new, (m, LANES))
        if spec.integer(part):
            sizes = [jnp.abs(x) for x in _flat(weighted)]
            size = jnp.maximum(jnp.max(_tree(jnp.maximum, sizes), axis=1, keepdims=True), 1e-30)
            factor = jnp.broadcast_to(PIECE / size, (m, LANES))
            gain = jnp.broadcast_to(new * size * (1.0 / PIECE), (m, LANES))
            weighted = [[rounded(x * factor) for x in by_j] for by_j in weighted]
            # The sum of what the planes are weighted with: errors are then relative to the levels.
            flat = _flat(weighted)
            excess = (len(flat) * ROUND_BITS + 2**31) % 2**32 - 2**31
            mass = (_tree(jnp.add, flat) - jnp.int32(excess)).astype(jnp.float32)
        else:
            mass = _tree(jnp.add, _flat(weighted))
        stats[0, 0, n, at] = stats[0, 0, n, at] * old + gain * mass
        factors[1 + index] = gain * (1.0 / 128.0) if spec.integer(part) else gain
        for first in range(0, len(step.blocks), fold):
            for j in range(GROUPS):
                group = [weighted[first + inner][j] for inner in range(fold)]
                if spec.integer(part):
                    left = _bytes(group, spec.left_rows(part))
                else:
                    left = _halves(group, 1.0 if part.float_levels else 1.0 / _power(j))
                weights[index][first // fold, j] = left


def _values(spec: Spec, weights, buffers, slot):
    """For each part of V the weighted sums of a step, high and low rows together."""
    step, totals = spec.step, []
    for index, part in enumerate(spec.v):
        stride = step.fold // part.layout.fold
        integer = spec.integer(part)
        total = None
        for c in range(step.chunks):
            for a in range(stride):
                operand = _operand(spec, part, buffers[part.words], slot, c, a)
                for j in range(GROUPS):
                    left = weights[index][c * stride + a, j]
                    raw = _dot(left, jnp.concatenate(operand(j), axis=1), False)
                    raw = raw[: 2 * part.layout.fold * spec.rows]
                    if integer and j < 7:
                        raw = raw << (7 - j)
                    if total is None:
                        total = raw
                    else:
                        total = total - raw if integer and j == 7 else total + raw
        totals.append(total)
    return totals


def _add(spec: Spec, n, totals, factors, sums):
    """sums = sums * keep + totals * gain, for head n."""
    keep = factors[0]
    for index, (out, part, total) in enumerate(zip(sums, spec.v, totals, strict=True)):
        gain = factors[1 + index]
        half = part.layout.fold * spec.rows
        high, low = total[:half], total[half:]
        if total.dtype == jnp.int32:
            fresh = high.astype(jnp.float32) * 256.0 + low.astype(jnp.float32)
        else:
            fresh = high + low
        k, g = (jnp.concatenate([x] * part.layout.fold, axis=0) for x in (keep, gain))
        for c in range(fresh.shape[1] // LANES):
            lanes = slice(c * LANES, (c + 1) * LANES)
            out[0, 0, n, :, lanes] = out[0, 0, n, :, lanes] * k + fresh[:, lanes] * g


def rounded(x):
    """int32 round(x) + ROUND_BITS; the low 16 bits are those of the integer."""
    return jax.lax.bitcast_convert_type(x + ROUND, jnp.int32)


def _bytes(group, rows: int):
    """int8 [rows, 128] of `rounded` integers: 256 * high + low, high first, then zeros."""
    both = [(x + 128) >> 8 for x in group] + group
    both += [jnp.zeros_like(group[0])] * (rows // group[0].shape[0] - len(both))
    return jnp.concatenate(both, axis=0).astype(jnp.int8)


def _halves(group, power: float):
    """bfloat16 [2 * fold * M, 128]: group * power as a sum of two."""
    whole = jnp.concatenate([x * power for x in group], axis=0)
    high = whole.astype(jnp.bfloat16)
    low = (whole - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, low], axis=0)
