"""Linear window codes: trellis-coded quantization whose reproduction is linear in the stored bits.

Coordinate t has one bit s_t of its own and a place q_t = 0..n_t - 1 (b - 1 bits) on a line of n_t
points; its value also leans on the own bits of the M coordinates before it:

    x_hat_t = step_t (q_t - (n_t - 1) / 2) + sum over j = 0..min(M, t) of taps_t,j (2 s_{t-j} - 1)

so x_hat = B bits + c with a banded matrix B, and a reader needs B^T q (keys) or B (sum of p bits)
(values) only: no table, no recursion. Modulo `step` the older bits act as a convolutional code
acts on the subsets of trellis-coded quantization, with real sums in place of XOR. The encoder is a
Viterbi search over 2^M states, two branches each whatever b: given s, q is a rounding.

Bits before the first coordinate do not exist: no start state is stored. Coordinates may differ in
bits; the state walks on across borders.

Source: Ungerboeck (IEEE Trans. Inf. Theory 1982) and Marcellin and Fischer (IEEE Trans. Commun.
1990) for the search; the real-linear labels and their weights are this project's (`window_fit`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

MEMORY = {16: 4, 64: 6, 256: 8}
MAX_BITS = 8

HELD = 1 << 11  # vectors that are worked on at a time
# Vectors of one search step on a CPU, by states: while all that a search holds is small enough, XLA
# makes one loop of it; else it cuts every step into parts for threads, which costs more.
TILE = {16: 128, 64: 32, 256: 128}


def check(states: int, bits: int) -> None:
    """Raises ValueError unless there is a code of `states` states and `bits` is 1..8."""
    if type(states) is not int or states not in MEMORY:
        raise ValueError(f"{states=} must be one of {', '.join(map(str, MEMORY))}")
    if type(bits) is not int or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits=} must be 1..{MAX_BITS}")


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """The committed weights "{states}-{bits}" = [step, taps...], float64, unit-variance scale."""
    text = resources.files("turboq.numbers").joinpath("window_weights.json").read_text("utf-8")
    return {name: np.asarray(values, np.float64) for name, values in json.loads(text).items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A code as data, a row per coordinate: its line's step and n - 1, and its taps, newest first.

    Taps that would reach before the first coordinate are 0. A coordinate that is not stored has
    only zeros but for its step.
    """

    step: Float[Array | np.ndarray, "*h C"]
    last: Float[Array | np.ndarray, "*h C"]
    taps: Float[Array | np.ndarray, "*h C M1"]


def rows(states: int, segments: tuple[tuple[int, int], ...], length: int | None = None) -> Rows:
    """Rows (NumPy, float32) of runs of (width, bits), then of coordinates that are not stored.

    Raises:
      ValueError: no such code.
    """
    table = []
    for width, bits in segments:
        check(states, bits)
        table += [(weights()[f"{states}-{bits}"], 2 ** (bits - 1) - 1.0)] * width
    none = np.append(1.0, np.zeros(MEMORY[states] + 1))
    table += [(none, 0.0)] * ((length or len(table)) - len(table))
    values = np.stack([w for w, _ in table]).astype(np.float32)
    reach = np.arange(values.shape[1] - 1)[None, :] <= np.arange(len(table))[:, None]
    last = np.array([n for _, n in table], np.float32)
    return Rows(step=values[:, 0], last=last, taps=values[:, 1:] * reach)


def head_by_head[T](search: Callable[..., T]) -> Callable[..., T]:
    """`search(u, arrays...)`, which under `vmap` takes one u [N, C] after the other on a CPU.

    So the steps of a search stay as small as `TILE` says; a few vectors, and those of other
    devices, are searched side by side.
    """
    mapped: Any = jax.custom_batching.custom_vmap(search)

    @mapped.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Any) -> tuple[Any, Any]:
        if jax.default_backend() == "cpu" and arrays[0].shape[-2] > min(TILE.values()):

            def one(own: Any) -> T:
                rest = iter(own)
                every = (next(rest) if b else x for x, b in zip(arrays, batched, strict=True))
                return mapped(*every)

            out = jax.lax.map(one, [x for x, b in zip(arrays, batched, strict=True) if b])
        else:
            axes = tuple(0 if b else None for b in batched)
            out = jax.vmap(search, in_axes=axes, axis_size=size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def encode(
    code: Rows, u: Float[Array, "N C"], weights: Float[Array, "C"] | None = None
) -> UInt8[Array, "N C"]:
    """Codes s + 2 q of the path of least sum of weights_t (u_t - x_hat_t)^2, by Viterbi search.

    Bit p of a code is stored bit p. `weights` None: all 1. As a bit serves several coordinates,
    they matter wherever neighbours differ in bits.

    Works on a bounded number of vectors at a time: beside input and output, memory does not grow
    with N.
    """
    weights = jnp.ones_like(jnp.asarray(code.step)) if weights is None else weights
    return _codes(u, code.step, code.last, code.taps, weights)


@head_by_head
def _codes(u: Any, step: Any, last: Any, taps: Any, weights: Any) -> Array:
    code = Rows(step=step, last=last, taps=taps)
    return in_chunks(functools.partial(encode_held, code, weights), u, HELD)


def in_chunks[T](search: Callable[[Array], T], u: Float[Array, "N C"], count: int) -> T:
    """search(u), whose arrays have a leading axis of N, of `count` vectors at a time."""
    n = u.shape[0]
    if n <= count:
        return search(u)
    whole = -(-n // count) * count
    parts = jnp.pad(u, ((0, whole - n), (0, 0))).reshape(-1, count, u.shape[1])
    out = jax.lax.map(search, parts)
    return jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:])[:n], out)


def encode_held(
    code: Rows, weights: Float[Array, "C"], u: Float[Array, "N C"]
) -> UInt8[Array, "N C"]:
    """`encode` of as many vectors as are held."""
    own = _search(code, weights, u)
    place = _place(code, u - _product(_signs(own), band(code.taps).T))
    return own.astype(jnp.uint8) + 2 * place.astype(jnp.uint8)


def _search(code: Rows, weights: Float[Array, "C"], u: Float[Array, "N C"]) -> Bool[Array, "N C"]:
    """Own bits of the best path."""
    # A register is the state and the new bit: its bit j is s_{t-j}. In units of the step.
    memory = code.taps.shape[1] - 1
    registers = np.arange(2 << memory)[None, :] >> np.arange(memory + 1)[:, None] & 1
    step, last = jnp.asarray(code.step), jnp.asarray(code.last)
    centres = _product(jnp.asarray(code.taps), jnp.asarray(2 * registers - 1, jnp.float32))
    centres = centres / step[:, None] - 0.5 * last[:, None]

    def paths(u: Float[Array, "n C"]) -> Bool[Array, "n C"]:
        # Taps before the first coordinate are 0, so paths from all states are the same at first.
        start = jnp.zeros((1 << memory, len(u)), jnp.float32)
        each = (u.T, centres, weights * jnp.square(step), last)
        cost, dropped = jax.lax.scan(_forward, start, each)
        end = jnp.argmin(cost, axis=0).astype(jnp.int32)
        _, own = jax.lax.scan(functools.partial(_back, memory), end, dropped, reverse=True)
        return own.T

    tile = TILE[1 << memory] if jax.default_backend() == "cpu" else HELD
    return in_chunks(paths, u / lead(step, 2), tile)


def _forward(
    cost: Float[Array, "S N"], row: tuple[Array, Array, Array, Array]
) -> tuple[Float[Array, "S N"], Bool[Array, "S N"]]:
    """One step of the search: cost of the best path into each state, and the bit that it drops."""
    u, centres, square, last = row
    off = u[None, :] - centres[:, None]
    off -= jnp.clip(jnp.round(off), 0.0, last)
    # The barrier keeps XLA from repeating this for both outputs and both ways: ten times the speed.
    added = jax.lax.optimization_barrier(square * off * off)
    states, n = cost.shape
    ways = cost.reshape(2, states // 2, 1, n) + added.reshape(2, states // 2, 2, n)
    ways = ways.reshape(2, states, n)
    best = jnp.minimum(ways[0], ways[1])
    # Costs grow with the path, so they are kept relative to state 0's: float32 stays exact enough.
    return best - best[:1], ways[1] < ways[0]


def _back(
    memory: int, state: Int[Array, "N"], dropped: Bool[Array, "S N"]
) -> tuple[Int[Array, "N"], Bool[Array, "N"]]:
    """One step of the traceback: the state before, and the own bit taken from there."""
    oldest = jnp.take_along_axis(dropped, state[None, :], axis=0)[0]
    return (oldest.astype(jnp.int32) << (memory - 1)) | (state >> 1), (state & 1) == 1


def _place(code: Rows, left: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """q of the nearest point of each line, once the own bits are taken off."""
    step, last = (lead(jnp.asarray(a), left.ndim) for a in (code.step, code.last))
    return jnp.clip(jnp.round(left / step + 0.5 * last), 0.0, last)


def decode(code: Rows, codes: UInt8[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Values of the codes."""
    own = _product((_signs(codes & jnp.uint8(1))).reshape(-1, codes.shape[-1]), band(code.taps).T)
    step, last = (lead(jnp.asarray(a), codes.ndim) for a in (code.step, code.last))
    place = (codes >> jnp.uint8(1)).astype(jnp.float32)
    return own.reshape(codes.shape) + step * (place - 0.5 * last)


def band(taps: Float[Array | np.ndarray, "C M1"]) -> Float[Array, "C C"]:
    """[t, i]: what the own bit of coordinate i, as a sign, adds to t; lower triangular."""
    count = len(taps)
    reach = min(taps.shape[1], count)
    return sum(
        (jnp.diag(jnp.asarray(taps)[j:, j], -j) for j in range(reach)),
        jnp.zeros((count, count), jnp.float32),
    )


def bit_matrix(
    states: int, segments: tuple[tuple[int, int], ...]
) -> tuple[Float[np.ndarray, "C T"], Float[np.ndarray, "C"]]:
    """(B, c) with x_hat = B bits + c, float64; bits 0 or 1, of each coordinate the lowest first."""
    code = rows(states, segments)
    bits = np.repeat([b for _, b in segments], [w for w, _ in segments])
    taps, step = np.asarray(code.taps, np.float64), np.asarray(code.step, np.float64)
    own = np.zeros((len(bits), len(bits)))
    for j in range(min(taps.shape[1], len(bits))):
        own += np.diag(taps[j:, j], -j)
    matrix, column = np.zeros((len(bits), int(bits.sum()))), 0
    for t, b in enumerate(bits):
        matrix[:, column] = 2 * own[:, t]
        matrix[t, column + 1 : column + b] = step[t] * 2.0 ** np.arange(b - 1)
        column += b
    return matrix, -own.sum(axis=1) - 0.5 * step * np.asarray(code.last, np.float64)


def lead(x: Array | np.ndarray, ndim: int) -> Any:
    """`x` [C] with leading axes of size 1."""
    return x.reshape((1,) * (ndim - 1) + x.shape)


def _signs(bits: Array) -> Float[Array, "*n"]:
    return 2.0 * bits.astype(jnp.float32) - 1.0


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
