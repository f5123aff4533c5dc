"""What both TPU prefill kernels share: tiles of query rows and one step of the online softmax.

Rows of a tile are computed in runs of `run` rows. Queries are two bfloat16 numbers each, the larger
halves of a run above the smaller ones, so that one matrix product does both; a probability is one
bfloat16 number, its sum is taken before rounding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from turboq_kernels.decode.types import Partial

LANES = 128
LOWEST = -1e38  # below every logit; masked ones are twice that, so that their weight is zero
LOG2_E = 1.4426950408889634
MAX_RUN = 128  # rows computed together
RUNS = 4  # runs of a tile: what is unpacked once serves so many


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Query rows in tiles of `runs` runs."""

    rows: int  # query rows that are real
    run: int
    runs: int

    @property
    def tile(self) -> int:
        return self.run * self.runs

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def padded(self) -> int:
        return self.tiles * self.tile


def tiling(rows: int) -> Tiling:
    run = min(MAX_RUN, -(-rows // 16) * 16)  # a bfloat16 register holds 16 rows
    return Tiling(rows, run, min(RUNS, -(-rows // run)))


def pad_rows(x: jax.Array, tiles: Tiling, axis: int) -> jax.Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, tiles.padded - tiles.rows)
    return jnp.pad(x, room)


def halves(q: jax.Array, tiles: Tiling) -> jax.Array:
    """float32 [B, N, M, W] -> bfloat16 [B, N, runs, 2 run, W]; the two halves of a run add up."""
    q = pad_rows(q, tiles, 2)
    q = q.reshape(*q.shape[:2], -1, tiles.run, q.shape[-1])
    high = q.astype(jnp.bfloat16)
    low = (q - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, low], axis=3)


def bounds(low: jax.Array, high: jax.Array, tiles: Tiling) -> jax.Array:
    """int32 [B, M, 128]: lane 0 the first and lane 1 the last visible number; padding sees none."""
    both = [pad_rows(x, tiles, 1) for x in (low, high + 1)]
    both[1] = both[1] - 1  # of padding rows: -1
    return jnp.pad(jnp.stack(both, axis=-1), ((0, 0), (0, 0), (0, LANES - 2)))


def spread(ref, column: int, rows, width: int) -> jax.Array:
    """One lane of ref[0, rows] along all `width` lanes."""
    return jnp.broadcast_to(ref[0, rows, column : column + 1], (ref[0, rows].shape[0], width))


def dot_halves(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """[2 run, W] times [S, W] transposed, both halves added: float32 [run, S]."""
    both = jax.lax.dot_general(
        queries, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    run = both.shape[0] // 2
    return both[:run] + both[run:]


def fold_lanes(op, x: jax.Array) -> jax.Array:
    """[run, n * 128] -> [run, 128]."""
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        parts = [
            op(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i]
            for i in range(0, len(parts), 2)
        ]
    return parts[0]


def weigh(logits: jax.Array, rows, top_ref, total_ref) -> tuple[jax.Array, jax.Array]:
    """(2**(logits - top) [run, S], what older sums are multiplied by [run, 128]).

    `top_ref` [tile, 128] holds the largest logit so far in every lane, `total_ref` sums by lane.
    """
    here = jnp.max(fold_lanes(jnp.maximum, logits), axis=1, keepdims=True)
    old = top_ref[rows, :]
    top = jnp.maximum(old, here)
    p = jnp.exp2(logits - widen(top, logits.shape[1]))
    keep = jnp.exp2(old - top)
    top_ref[rows, :] = top
    total_ref[rows, :] = total_ref[rows, :] * keep + fold_lanes(jnp.add, p)
    return p, keep


def widen(x: jax.Array, width: int) -> jax.Array:
    """[run, 128] of equal lanes -> [run, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def attend(tiles: Tiling, logits, here, bound, tops, totals, add) -> None:
    """One step of the softmax of every run of a tile.

    `logits(r)` are those of run r, `here` [1, S] the numbers (slots, positions) that are compared
    with `bound`; `add(rows, p, keep)` sums values. The matrix unit is one run ahead, so that its
    results are ready when they are needed.
    """
    following = logits(0)
    for r in range(tiles.runs):
        rows = pl.ds(r * tiles.run, tiles.run)
        scores, following = following, logits(r + 1) if r + 1 < tiles.runs else following
        low, high = (spread(bound, c, rows, here.shape[1]) for c in (0, 1))
        scores = jnp.where((here >= low) & (here <= high), scores, 2 * LOWEST)
        p, keep = weigh(scores, rows, tops, totals)
        add(rows, p, keep)


def clear(tops, totals) -> None:
    """No token seen."""
    tops[...] = jnp.full(tops.shape, LOWEST, jnp.float32)
    totals[...] = jnp.zeros(totals.shape, jnp.float32)


def statistics(top: jax.Array, total: jax.Array) -> jax.Array:
    """[tile, 128]: lane 0 the largest logit, all others the sum of weights."""
    lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
    return jnp.where(lane == 0, top, jnp.sum(total, axis=1, keepdims=True))


def factor(scale: float, softcap: float | None) -> float:
    """What queries are multiplied by: logits are then powers of two, or what tanh takes."""
    return scale / softcap if softcap else scale * LOG2_E


def finish(acc: jax.Array, stats: jax.Array, rows: int) -> Partial:
    """The result of a kernel's sums and `statistics`, without padding rows."""
    return Partial(
        acc=acc[:, :, :rows], top=stats[:, :, :rows, 0] / LOG2_E, total=stats[:, :, :rows, 1]
    )
