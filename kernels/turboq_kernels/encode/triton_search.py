"""The Viterbi search of window codes (`turboq.numbers.window`) in the registers of a GPU's warps.

A warp takes one gain tried of one vector and all states: their five lowest bits are its lanes, the
rest its registers, so that nothing of the search passes shared memory and no warp waits for others.

States move in place. Of two states that differ in their oldest bit, at address bit k = -1 - t mod M
of step t, come two that differ in their newest: they take the same places, in which bit k is the
newest bit now. So a step exchanges cost and path with one partner, by one shuffle each, where a
copy in the order of states would go through shared memory. The state of place a after t steps is a,
its M bits turned left t times.

    own, partner = cost + metric(register of the place's own old state, of its partner's)
    path = 2 * (path of the less) + newest bit

The path of 24 steps and the place where it began are one word, exchanged with the cost (register
exchange): there is no decision to store, and no walk back but one look per 24 steps. Costs are
less what every path has in common: a coordinate beyond all registers' reach, (|u| - reach)^2. So
one far out leaves the others their float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

LANES = 32
STEPS = 24  # of a path's word: whole turns of 4, 6 and 8 bits, whole runs of 8 coordinates
RUN = 8  # coordinates of equal bits, aligned (`turboq.codecs.transform.check_segments`)
_WHOLE = 1.5 * 2.0**23  # added, it leaves no bits below 1
_MASK = (1 << STEPS) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is static: M = `memory`, T = `tries` (a power of two), C = `coded` (a multiple of 8)."""

    memory: int
    tries: int
    coded: int
    interpret: bool
    asm: bool  # NVIDIA's instructions, or plain operations

    @property
    def lanes(self) -> int:
        return min(1 << self.memory, LANES)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all states of all gains tried: registers, gains, lanes."""
        return (1 << self.memory) // self.lanes, self.tries, self.lanes

    @property
    def warps(self) -> int:
        return max(1, self.tries * self.lanes // LANES)

    @property
    def blocks(self) -> int:
        return -(-self.coded // STEPS)

    @property
    def unrolled(self) -> int:
        """Steps of a loop's body: whole turns of the states, whole runs of coordinates."""
        return int(np.lcm(self.memory, RUN))


Row = tuple[Any, Any, list[Any]]  # step, n - 1 and taps of the coordinates of a run


def own_bits(row_at, value_at, inverse: Float[Array, "T"], s: Search) -> list[Int[Array, "T"]]:
    """Own bits of the best path of every gain tried: a word for each 24 coordinates, first highest.

    Args:
      row_at: gives the `Row` of run g. value_at: gives (y, weight) of coordinate t. inverse: 1 over
        the gains. Coordinates that are not there weigh nothing.
    """
    places = _places(s)
    cost = jnp.zeros(s.shape, jnp.float32)
    words = [jnp.zeros(s.shape, jnp.int32)] * s.blocks
    whole, rest = divmod(s.coded, STEPS)

    def block(b, cost, count: int):
        path = jnp.broadcast_to(places, s.shape)

        def some(first, carry, steps: int):
            return _steps(row_at, value_at, inverse, b * STEPS + first, carry, steps, s)

        unrolled = min(s.unrolled, count)
        trips = count // unrolled
        if trips == 1:
            return some(0, (cost, path), unrolled)
        return jax.lax.fori_loop(
            0, trips, lambda i, carry: some(i * unrolled, carry, unrolled), (cost, path)
        )

    def full(b, carry):
        cost, *words = carry
        cost, path = block(b, cost, STEPS)
        return cost, *(jnp.where(b == i, path, word) for i, word in enumerate(words))

    if whole:
        cost, *words = jax.lax.fori_loop(0, whole, full, (cost, *words))
    if rest:
        cost, words[whole] = block(jnp.int32(whole), cost, rest)
    return _back(cost, words, s)


def _places(s: Search) -> Int[Array, "R 1 L"]:
    """Places of the states."""
    register, _, lanes = s.shape
    lane = jnp.arange(lanes, dtype=jnp.int32)[None, None, :]
    return jnp.arange(register, dtype=jnp.int32)[:, None, None] * lanes + lane


def _steps(row_at, value_at, inverse, first, carry, steps: int, s: Search):
    """`steps` coordinates from `first` on, which is a multiple of M and of 8."""
    cost, path = carry
    places, m = _places(s), s.memory
    newest = [places >> k & 1 for k in range(m)]
    signs = [(2 * bit - 1).astype(jnp.float32) for bit in newest]
    for i in range(steps):
        if i % RUN == 0:
            step, last, taps = row_at((first + i) // RUN)
            less = -1 / step
            scaled = [tap * less for tap in taps]
            unit, square = -less * inverse[None, :, None], step * step
            reach = 0.5 * last + sum(jnp.abs(tap) for tap in scaled)
            later = jnp.minimum(first + i, 1).astype(jnp.float32)
        # Bits before the first coordinate do not exist.
        here = [tap if j <= i or i >= RUN else tap * later for j, tap in enumerate(scaled)]
        y, weight = value_at(first + i)
        k = (-1 - i) % m
        u, price = y * unit, weight * square
        beyond = jnp.maximum(jnp.abs(u) - reach, 0.0)
        common, off = -price * beyond * beyond, u + 0.5 * last
        for j in range(1, m):
            off = _fma(here[j], signs[(j - 1 - i) % m], off, s)
        off = _fma(here[0], signs[k], off, s)
        oldest = here[m] * signs[k]
        other = _as_float(_partner(_as_int(cost), k, s))
        own = cost + _metric(off + oldest, last, price, common, s)
        other += _metric(off - oldest, last, price, common, s)
        # Of two equal ones the older bit 0 is taken, which is the partner's where the own is 1.
        taken = (other < own) | ((newest[k] == 1) & ~(own < other))
        cost = jnp.where(taken, other, own)
        path = jnp.where(taken, _partner(path, k, s), path)
        path = 2 * path + newest[k]
        if s.interpret:  # or XLA fuses all steps, and compiles them for a minute
            cost, path = jax.lax.optimization_barrier((cost, path))
    return cost, path


def _metric(off: Array, last, price, common, s: Search) -> Float[Array, "R T L"]:
    """What the best place of a register costs, which is `off` away from its line's first."""
    left = off - _rounded(jnp.clip(off, 0.0, last), s)
    return _fma(price * left, left, common, s)


def _fma(a, b, c, s: Search) -> Array:
    """a b + c; Triton would multiply, then add."""
    if not s.asm:
        return a * b + c
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (a, b, c)))
    (out,) = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[jnp.broadcast_to(x, shape) for x in (a, b, c)],
        constraints="=f,f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )  # fmt: skip
    return out


def _rounded(x: Array, s: Search) -> Array:
    """To the nearest integer, ties to even, of 0 <= x < 2^22."""
    # XLA would take the two constants together; Triton has no rounding, and keeps them apart.
    return jnp.round(x) if s.interpret else (x + _WHOLE) - _WHOLE


def _partner(x: Int[Array, "R T L"], k: int, s: Search) -> Int[Array, "R T L"]:
    """x at the place whose bit k is the other: the sum of both, modulo 2^32, less the own."""
    registers, tries, lanes = s.shape
    bits = lanes.bit_length() - 1
    if k < bits:
        pairs, axis = x.reshape(registers, tries, lanes >> k + 1, 2, 1 << k), 3
    else:
        inner = 1 << k - bits
        pairs, axis = x.reshape(registers // (2 * inner), 2, inner, tries, lanes), 1
    both = jnp.sum(pairs, axis=axis, keepdims=True, dtype=jnp.int32)
    return (jnp.broadcast_to(both, pairs.shape) - pairs).reshape(x.shape)


def _back(cost, words, s: Search) -> list[Int[Array, "T"]]:
    """Own bits of the path that ends where the cost is least, in the first such state."""
    places, turned = _places(s), s.coded % s.memory
    state = (places << turned | places >> s.memory - turned) & (1 << s.memory) - 1
    least = jnp.min(jnp.min(cost, axis=2), axis=0)[None, :, None]
    none = 1 << s.memory
    state = jnp.where(cost == least, state, none)
    state = jnp.min(jnp.min(state, axis=2), axis=0)
    state = jnp.where(state == none, 0, state)  # all are NaN
    place = (state >> turned | state << s.memory - turned) & (none - 1)
    out = []
    for b in reversed(range(s.blocks)):
        steps = min(STEPS, s.coded - b * STEPS)
        own = jnp.where(places == place[None, :, None], words[b], 0)
        word = jnp.sum(jnp.sum(own, axis=2), axis=0)
        out.append(word << STEPS - steps & _MASK)
        place = (word >> steps) & (none - 1)
    return out[::-1]


def _as_int(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _as_float(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
