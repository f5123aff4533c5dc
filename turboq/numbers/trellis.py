"""Trellis-coded quantization of scalar sequences: Ungerboeck codes, Viterbi search, decoding.

A codebook of 2^(b+1) ascending points is dealt out to four subsets D0..D3: point i to D_{i mod 4}.
At step n the state s allows two of them: z0 = s & 1 says which pair, one stored bit z1 which of the
two, and b-1 further bits which point of D_{2 z1 + z0}: b bits per coordinate choose among twice as
many points as a scalar code has.

    h1(x) z1(x) + h0(x) z0(x) = 0  over GF(2)      Ungerboeck 1982, systematic feedback encoder
    s' = (s >> 1) ^ z0 (h0 >> 1) ^ z1 (h1 >> 1)    z0 = s & 1

The start state is free and is stored. The state is linear in the stored bits, so any z0 is the
parity of a fixed subset of them: decoding is one product with a 0/1 matrix, without a recursion.

Source: Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources"
(IEEE Trans. Commun. 1990); Ungerboeck (IEEE Trans. Inf. Theory 1982) for h1, h0.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt, UInt8

POLYNOMIALS = {4: (0o2, 0o5), 8: (0o4, 0o13), 16: (0o4, 0o23), 256: (0o362, 0o515)}  # h1, h0
MAX_BITS = 6

# Values of one search step (vectors times states). Its working set of a few MB stays in a core's
# cache, and what is kept for the traceback is bounded whatever the number of vectors.
STEP_VALUES = 1 << 14


def check(states: int, bits: int) -> None:
    """Raises ValueError unless there is a code of `states` states and `bits` is 1..6."""
    if type(states) is not int or states not in POLYNOMIALS:
        raise ValueError(f"{states=} must be one of {', '.join(map(str, POLYNOMIALS))}")
    if type(bits) is not int or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits=} must be 1..{MAX_BITS}")


def step(states: int, state: np.ndarray, z1: np.ndarray) -> np.ndarray:
    """Next state of integer arrays (module docstring)."""
    h1, h0 = POLYNOMIALS[states]
    return (state >> 1) ^ (state & 1) * (h0 >> 1) ^ z1 * (h1 >> 1)


@functools.cache
def codebooks() -> dict[str, np.ndarray]:
    """The committed tables "{states}-{bits}", float64, ascending, unit-variance scale.

    Written by `turboq.numbers.trellis_fit`: generalised Lloyd iteration, Gaussian samples.
    """
    text = resources.files("turboq.numbers").joinpath("trellis_codebooks.json").read_text("utf-8")
    return {name: np.asarray(values, np.float64) for name, values in json.loads(text).items()}


def codebook(states: int, bits: int) -> np.ndarray:
    """Points [2**(bits+1)] of one code, float64, for coordinates of unit variance.

    Raises:
      ValueError: no such code.
    """
    check(states, bits)
    return codebooks()[f"{states}-{bits}"]


def encode(
    states: int, points: Float[Array, "P"], u: Float[Array, "N D"]
) -> tuple[UInt8[Array, "N D"], UInt8[Array, "N"]]:
    """The codes [N, D] and start states [N] of the nearest path (Viterbi), least squared error.

    A code is z1 + 2 i with i the point's place in its subset. Works on a bounded number of vectors
    at a time: beside input and output, memory does not grow with N.
    """
    count = max(16, STEP_VALUES // states)
    n = u.shape[0]
    if n <= count:
        return _encode(states, points, u)
    whole = -(-n // count) * count
    parts = jnp.pad(u, ((0, whole - n), (0, 0))).reshape(-1, count, u.shape[1])
    codes, start = jax.lax.map(functools.partial(_encode, states, points), parts)
    return codes.reshape(whole, -1)[:n], start.reshape(whole)[:n]


def _encode(
    states: int, points: Float[Array, "P"], u: Float[Array, "N D"]
) -> tuple[UInt8[Array, "N D"], UInt8[Array, "N"]]:
    columns = u.T
    cost, kept = jax.lax.scan(
        functools.partial(_forward, states, points),
        jnp.zeros((states, u.shape[0]), jnp.float32),
        columns,
    )
    end = jnp.argmin(cost, axis=0).astype(jnp.int32)
    start, (z1, z0) = jax.lax.scan(functools.partial(back, states), end, kept, reverse=True)
    subset = 2 * z1 + z0
    codes = (z1 + 2 * place(points, columns, subset)).astype(jnp.uint8)
    return codes.T, start.astype(jnp.uint8)


def _forward(
    states: int, points: Float[Array, "P"], cost: Float[Array, "S N"], u: Float[Array, "N"]
) -> tuple[Float[Array, "S N"], UInt[Array, "W N"]]:
    """One step of the search: cost of the best path into each state, and which way it came."""
    # Squared distance to the nearest point of each subset. The barrier keeps XLA from repeating
    # this for every state.
    off = [
        functools.reduce(jnp.minimum, [jnp.abs(u - points[i]) for i in range(z, len(points), 4)])
        for z in range(4)
    ]
    near = jax.lax.optimization_barrier(jnp.stack(off))
    return advance(states, cost, near * near)


def advance(
    states: int, cost: Float[Array, "S N"], near: Float[Array, "4 N"]
) -> tuple[Float[Array, "S N"], UInt[Array, "W N"]]:
    """The same from the squared distance to the nearest point of each subset."""
    h1, h0 = POLYNOMIALS[states]
    high = states // 2
    # A state s' with top bit t is reached from ((s' ^ t h0' ^ z1 h1') << 1) + t by z1 = 0 and 1.
    split = cost.reshape(high, 2, -1)
    ways = []
    for z1 in range(2):
        flip = z1 * (h1 >> 1)
        even = _xor(split[:, 0], flip) + near[2 * z1][None, :]
        odd = _xor(split[:, 1], flip ^ (h0 >> 1) ^ high) + near[2 * z1 + 1][None, :]
        ways.append(jnp.concatenate([even, odd]))
    one = (ways[1] < ways[0]).astype(jnp.uint32)
    best = jnp.minimum(ways[0], ways[1])
    lanes = min(states, 32)
    shifts = jnp.arange(lanes, dtype=jnp.uint32)[None, :, None]
    words = jnp.sum(one.reshape(-1, lanes, near.shape[1]) << shifts, axis=1, dtype=jnp.uint32)
    # Costs grow with the path, so they are kept relative to state 0's: float32 stays exact enough.
    narrow = {4: jnp.uint8, 8: jnp.uint8, 16: jnp.uint16}.get(states, jnp.uint32)
    return best - best[:1], words.astype(narrow)


def _xor(rows: Float[Array, "R N"], mask: int) -> Float[Array, "R N"]:
    """rows[i ^ mask]: a reversal of some axes of a power-of-two index, which needs no gather."""
    bits = len(rows).bit_length() - 1
    axes = [a for a in range(bits) if mask >> (bits - 1 - a) & 1]
    return jnp.flip(rows.reshape(*(2,) * bits, -1), axes).reshape(rows.shape) if axes else rows


def back(
    states: int, state: Int[Array, "N"], words: Array
) -> tuple[Int[Array, "N"], tuple[Int[Array, "N"], Int[Array, "N"]]]:
    """One step of the traceback: the state before and the branch (z1, z0) taken from there."""
    h1, h0 = POLYNOMIALS[states]
    z0 = state // (states // 2)
    word = functools.reduce(
        lambda a, i: jnp.where(state // 32 == i, words[i], a), range(1, len(words)), words[0]
    )
    z1 = (word.astype(jnp.int32) >> (state % 32)) & 1
    before = ((state ^ z0 * (h0 >> 1) ^ z1 * (h1 >> 1)) << 1) + z0
    return before, (z1, z0)


def place(
    points: Float[Array, "P"], u: Float[Array, "D N"], subset: Int[Array, "D N"]
) -> Int[Array, "D N"]:
    """Place of the nearest point of each coordinate's own subset."""
    found = jnp.zeros(u.shape, jnp.int32)
    for i in range(len(points) // 4 - 1):
        ends = [0.5 * (points[4 * i + z] + points[4 * i + 4 + z]) for z in range(4)]
        end = jnp.where(
            subset >= 2,
            jnp.where(subset == 3, ends[3], ends[2]),
            jnp.where(subset == 1, ends[1], ends[0]),
        )
        found += (u > end).astype(jnp.int32)
    return found


@functools.lru_cache(maxsize=32)
def parity_matrix(states: int, length: int) -> np.ndarray:
    """G [log2(states) + length, length] over GF(2): z0 = (start bits, z1) @ G mod 2, uint8."""
    memory = states.bit_length() - 1
    rows = memory + length
    start = np.zeros(rows, np.int64)
    start[:memory] = 1 << np.arange(memory)
    state, z0 = start, np.zeros((rows, length), np.uint8)
    for n in range(length):
        z0[:, n] = state & 1
        state = step(states, state, (np.arange(rows) == memory + n).astype(np.int64))
    z0.setflags(write=False)
    return z0


def decode(
    states: int, points: Float[Array, "P"], codes: UInt8[Array, "*n D"], start: UInt8[Array, "*n"]
) -> Float[Array, "*n D"]:
    """Values of the codes: every coordinate on its own, by the parity of the bits before it."""
    return points.at[indices(states, codes, start)].get(mode="promise_in_bounds")


def indices(
    states: int, codes: UInt8[Array, "*n D"], start: UInt8[Array, "*n"] | None
) -> Int[Array, "*n D"]:
    """Number of the point of each code; `start` None is state 0."""
    memory = states.bit_length() - 1
    g = jnp.asarray(parity_matrix(states, codes.shape[-1]), jnp.float32)
    z1 = codes & jnp.uint8(1)
    if start is None:
        bits, g = z1, g[memory:]
    else:
        shifts = jnp.arange(memory, dtype=jnp.uint8).reshape((1,) * start.ndim + (-1,))
        first = (start[..., None] >> shifts) & jnp.uint8(1)
        bits = jnp.concatenate([first, z1], axis=-1)
    # 0/1 factors and sums far below 2^24: exact at any matmul precision that adds in float32.
    z0 = jnp.matmul(bits.astype(jnp.float32), g).astype(jnp.int32) & 1
    return (codes >> jnp.uint8(1)).astype(jnp.int32) * 4 + 2 * z1.astype(jnp.int32) + z0
