"""The Viterbi search of window codes (`turboq.numbers.window`) on a TPU: states by vectors.

A lane takes one gain tried of one vector, its states are sublanes and registers: the three lowest
bits of a place are its sublane, the rest its register. A step is arithmetic of whole registers.

States move in place, as in `triton_search`: of two states that differ in their oldest bit, at
address bit k = -1 - t mod M of step t, come two that differ in their newest; they take the same
places, in which bit k is the newest bit now. So a step brings pairs together that differ in one bit
of the address: for k > 2 they are two registers, and nothing moves. The state of place a after t
steps is a, its M bits turned left t times.

    cost' = min over the oldest bit of cost + metric(register)
    path' = 2 (path of the less) + newest bit

The path of 24 steps and the place where it began are one word: there is no decision to store, and
no walk back but one look per 24 steps. Costs are less what every path has in common: a coordinate
beyond all registers' reach, (|u| - reach)^2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from turboq.numbers import window_gain

LANES, SUBLANES = 128, 8
STEPS = 24  # of a path's word: whole turns of 4, 6 and 8 bits
ROUND = 1.5 * 2.0**23  # added and taken off again, it leaves no bits below 1
_MASK = (1 << STEPS) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is static: M = `memory`, T = `tries` (a power of two), C = `coded` (a multiple of 8)."""

    memory: int
    tries: int
    coded: int
    interpret: bool

    @property
    def vectors(self) -> int:
        """That lanes take side by side: lane l has vector l mod V, gain l / V of those tried."""
        return LANES // self.tries

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all states of all lanes: registers, sublanes, lanes."""
        return (1 << self.memory) // SUBLANES, SUBLANES, LANES

    @property
    def blocks(self) -> int:
        return -(-self.coded // STEPS)

    def scratch(self) -> dict[str, Any]:
        """What `coded` needs: `rows` of the code (`put_rows`), and the rest its own."""
        one, taps = (self.coded, LANES), (self.memory + 1, self.coded, LANES)
        rows = dict.fromkeys(("step", "last", "weights", "price"), one) | {
            "taps": taps, "scaled": taps,
        }  # fmt: skip
        return {
            "rows": {name: pltpu.VMEM(shape, jnp.float32) for name, shape in rows.items()},
            "off": pltpu.VMEM(one, jnp.float32),
            "common": pltpu.VMEM(one, jnp.float32),
            "words": pltpu.VMEM((self.blocks, *self.shape), jnp.int32),
        }


def spread(x: Float[Array, "n C"], vectors: Float[Array, "n L"]) -> Float[Array, "C L"]:
    """Rows of x, which are finite, as columns: lane l has those whose `vectors` are 1 there.

    Exact: a float32 is the sum of three numbers of 8 bits, times 1.
    """
    return jax.lax.dot_general(
        x, vectors, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def put_rows(room: dict[str, Any], step, last, weights, taps: list[Array]) -> None:
    """The code of every lane, [C, 128] each. Lanes without a vector have zeros."""
    step = jnp.where(step > 0, step, 1.0)
    room["step"][...], room["last"][...], room["weights"][...] = step, last, weights
    room["price"][...] = weights * step * step
    for j, tap in enumerate(taps):
        room["taps"][j], room["scaled"][j] = tap, -tap / step


def coded(
    y: Float[Array, "C 128"], gains: Float[Array, "G 128"] | None, room: dict[str, Any], s: Search
) -> tuple[Int[Array, "C 128"], Int[Array, "1 128"]]:
    """Codes of every lane's vector, 0 but for the gain that leaves least, and that gain's index.

    y is finite, and not beyond `window_gain.FAR` of the last gain.
    """
    rows = room["rows"]
    step, last, weights = (rows[name][...] for name in ("step", "last", "weights"))
    half = 0.5 * last
    number = _iota((1, LANES), 1) // s.vectors  # of the gain tried
    first = jnp.zeros((1, LANES), jnp.int32)
    gain = jnp.ones((1, LANES), jnp.float32)
    if gains is not None:
        best = _best_gain(y, step, weights, rows, s)
        below = jnp.sum((best > gains).astype(jnp.float32), axis=0, keepdims=True)
        first = jnp.clip(below.astype(jnp.int32) - s.tries // 2, 0, gains.shape[0] - s.tries)
        tried = _iota(gains.shape, 0) == first + number
        gain = jnp.sum(jnp.where(tried, gains, 0.0), axis=0, keepdims=True)
    u = y / gain
    scaled = u / step
    reach = half + sum(jnp.abs(rows["scaled"][j]) for j in range(s.memory + 1))
    beyond = jnp.maximum(jnp.abs(scaled) - reach, 0.0)
    room["common"][...] = -rows["price"][...] * beyond * beyond
    room["off"][...] = scaled + half
    register = _registers(_own_bits(room, s), s)
    own = jnp.zeros(y.shape, jnp.float32)
    for j in range(s.memory + 1):
        own += rows["taps"][j] * (2 * (register >> j & 1) - 1).astype(jnp.float32)
    place = _whole((u - own) / step + half, last, s)
    left = y - gain * (own + step * (place - half))
    error = jnp.sum(weights * left * left, axis=0, keepdims=True)
    least = _over_tries(jnp.minimum, error, s)
    chosen = _over_tries(jnp.minimum, jnp.where(error == least, number, s.tries), s)
    chosen = jnp.where(chosen == s.tries, 0, chosen)  # all are NaN
    codes = (register & 1) + 2 * place.astype(jnp.int32)
    return jnp.where(number == chosen, codes, 0), first + chosen


def gathered(codes: Int[Array, "C 128"], vectors: Float[Array, "n 128"]) -> Float[Array, "n C"]:
    """Codes of every vector, of those of its lanes that are not 0: the inverse of `spread`."""
    return jax.lax.dot_general(
        vectors.astype(jnp.bfloat16), codes.astype(jnp.float32).astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _best_gain(y, step, weights, rows, s: Search) -> Float[Array, "1 128"]:
    """`window_gain.best_gain` of every lane."""
    size = jnp.abs(y)
    largest = sum(jnp.abs(rows["taps"][j]) for j in range(s.memory + 1))
    reach = window_gain.REACH * (0.5 * step * rows["last"][...] + largest)
    even = jnp.sum(step * step * weights, axis=0, keepdims=True) / 48
    gain = jnp.zeros((1, LANES), jnp.float32)
    for _ in range(window_gain.STEPS):
        beyond = jnp.where(size > gain * reach, weights * reach, 0.0)
        above = jnp.sum(beyond * size, axis=0, keepdims=True)
        gain = above / (even + jnp.sum(beyond * reach, axis=0, keepdims=True))
    return gain


def _own_bits(room, s: Search) -> list[Int[Array, "1 128"]]:
    """Own bits of the best path of every lane: a word for each 24 coordinates, first highest."""
    whole, rest = divmod(s.coded, STEPS)

    def block(b, cost, count: int):
        def some(first, carry, steps: int):
            for i in range(steps):
                carry = _step(room, b * STEPS + first + i, i, carry, s)
            return carry

        trips, more = divmod(count, s.memory)
        carry = jax.lax.fori_loop(
            0, trips, lambda i, carry: some(i * s.memory, carry, s.memory), (cost, _places(s))
        )
        cost, path = some(trips * s.memory, carry, more)
        room["words"][b] = path
        return cost

    cost = jnp.zeros(s.shape, jnp.float32)
    cost = jax.lax.fori_loop(0, whole, lambda b, cost: block(b, cost, STEPS), cost)
    if rest:
        cost = block(whole, cost, rest)
    return _back(cost, room["words"], s)


def _step(room, t, i: int, carry, s: Search):
    """Coordinate t, i of those since a whole turn of the states."""
    cost, path = carry
    m, k, scaled = s.memory, (-1 - i) % s.memory, room["rows"]["scaled"]

    def at(ref):
        return jnp.broadcast_to(ref[pl.ds(t, 1), :], (SUBLANES, LANES))[None]

    off = at(room["off"])
    for b in range(min(m, 3)):
        if b != k:
            off += at(scaled.at[(b + 1 + i) % m]) * _sign(b)
    for b in range(3, m):
        if b != k:
            tap = at(scaled.at[(b + 1 + i) % m])
            off = jnp.concatenate([off - tap, off + tap], axis=0)
    newest, oldest = at(scaled.at[0]), at(scaled.at[m])
    last, price = at(room["rows"]["last"]), at(room["rows"]["price"])

    def metric(off):
        left = off - _rounded(jnp.clip(off, 0.0, last), s)
        return price * left * left

    def best(off, bit):
        ways = [c + metric(x) for c, x in zip(costs, (off - oldest, off + oldest), strict=True)]
        # Of two equal ones the older bit 0 is taken.
        taken = ways[1] < ways[0]
        word = 2 * jnp.where(taken, paths[1], paths[0]) + bit
        return jnp.where(taken, ways[1], ways[0]), word

    costs, paths = _pairs(cost + at(room["common"]), k), _pairs(path, k)
    if k < 3:
        out = best(off + newest * _sign(k), _bit(k))
    else:
        both = zip(best(off - newest, 0), best(off + newest, 1), strict=True)
        out = [_join(*pair, k) for pair in both]
    # Or XLA fuses all steps, and compiles them for a minute.
    return tuple(jax.lax.optimization_barrier(out) if s.interpret else out)


def _pairs(x: Array, k: int) -> tuple[Array, Array]:
    """Of every place that of its pair whose bit k is 0, and 1; for k > 2 of each pair once."""
    if k < 3:
        one = _bit(k) == 1
        near = 1 << k
        low = jnp.where(one, pltpu.roll(x, near, 1), x)
        return low, jnp.where(one, x, pltpu.roll(x, SUBLANES - near, 1))
    pairs = x.reshape(-1, 2, 1 << k - 3, *x.shape[1:])
    low, high = (pairs[:, i].reshape(-1, *x.shape[1:]) for i in range(2))
    return low, high


def _join(low: Array, high: Array, k: int) -> Array:
    """Places of pairs that differ in bit k > 2."""
    both = [x.reshape(-1, 1, 1 << k - 3, *x.shape[1:]) for x in (low, high)]
    return jnp.concatenate(both, axis=1).reshape(-1, *low.shape[1:])


def _back(cost, words, s: Search) -> list[Int[Array, "1 128"]]:
    """Own bits of the path that ends where the cost is least, in the first such state."""
    places, turned, none = _places(s), s.coded % s.memory, 1 << s.memory

    def over(fold, x):
        return fold(fold(x, axis=0, keepdims=True), axis=1, keepdims=True)

    state = (places << turned | places >> s.memory - turned) & none - 1
    state = over(jnp.min, jnp.where(cost == over(jnp.min, cost), state, none))
    state = jnp.where(state == none, 0, state)  # all are NaN
    place = (state >> turned | state << s.memory - turned) & none - 1
    out = []
    for b in reversed(range(s.blocks)):
        steps = min(STEPS, s.coded - b * STEPS)
        word = over(jnp.sum, jnp.where(places == place, words[b], 0))
        out.append((word << STEPS - steps & _MASK)[0])
        place = (word >> steps) & none - 1
    return out[::-1]


def _registers(words: list[Array], s: Search) -> Int[Array, "C 128"]:
    """Bit j is the own bit of coordinate t - j."""
    out, before = [], jnp.zeros((1, LANES), jnp.int32)
    for b, word in enumerate(words):
        steps = min(STEPS, s.coded - b * STEPS)
        whole = jnp.broadcast_to(before << STEPS | word, (steps, LANES))
        out.append(jax.lax.shift_right_logical(whole, STEPS - 1 - _iota((steps, LANES), 0)))
        before = word
    return jnp.concatenate(out, axis=0) & (2 << s.memory) - 1


def _over_tries(fold, x: Array, s: Search) -> Array:
    """fold of all gains tried of every vector, in all of its lanes."""
    shift = s.vectors
    while shift < LANES:
        x = fold(x, pltpu.roll(x, shift, 1))
        shift *= 2
    return x


def _places(s: Search) -> Int[Array, "R 8 128"]:
    """Places of the states."""
    return _iota(s.shape, 0) * SUBLANES + _iota(s.shape, 1)


def _bit(bit: int) -> Int[Array, "1 8 128"]:
    """Of the place, one that the sublane tells."""
    return _iota((1, SUBLANES, LANES), 1) >> bit & 1


def _sign(bit: int) -> Float[Array, "1 8 128"]:
    return (2 * _bit(bit) - 1).astype(jnp.float32)


def _whole(x: Array, last: Array, s: Search) -> Array:
    """The nearest integer of 0..last; 0 for NaN."""
    return _rounded(jnp.where(x > 0, jnp.where(x < last, x, last), 0.0), s)


def _rounded(x: Array, s: Search) -> Array:
    """To the nearest integer, ties to even, of 0 <= x < 2^22."""
    # XLA would take the two constants together; Mosaic keeps them apart.
    return jnp.round(x) if s.interpret else (x + ROUND) - ROUND


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
