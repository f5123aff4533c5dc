"""The gain of a vector that a window code stores: of a few, the one that leaves the least.

    E(g) = sum over coordinates of w (g^2 step^2 / 48 + max(|y| - g reach, 0)^2)

is about what a vector y loses as g times the code of y / g: errors even between points half a step
apart, and what lies beyond the code's reach. The few gains around its minimum are searched, and the
one that really leaves the least is stored: a vector has several codes to choose from, as in a
gain-shape quantizer, and one large coordinate does not coarsen all the others.

Source: gain-shape vector quantization (Sabin and Gray, IEEE Trans. ASSP 1984); E and its constants
are this project's, chosen by what few of 16 gains leave over all 16 (4 gains: 2 %).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from turboq.numbers import window
from turboq.numbers.window import lead

TRIES = 8
# Of the largest value: few sums of taps come near it.
REACH = 0.8
STEPS = 6
# Coordinates further out than so many of the largest gain count as if they were there.
FAR = 1e6


def encode(
    code: window.Rows, y: Float[Array, "N C"], gains: Float[Array, "G"], weights: Float[Array, "C"]
) -> tuple[UInt8[Array, "N C"], UInt8[Array, "N"]]:
    """Codes of y / gain and the gain's index, of least sum of weights (y - gain x_hat)^2 found.

    `gains` are positive and ascending. Works on a bounded number of vectors at a time, as
    `window.encode` does.
    """
    return _encode(y, code.step, code.last, code.taps, gains, weights)


@window.head_by_head
def _encode(
    y: Any, step: Any, last: Any, taps: Any, gains: Any, weights: Any
) -> tuple[Array, Array]:
    code = window.Rows(step=step, last=last, taps=taps)
    tries = min(TRIES, gains.shape[0])

    def search(y: Float[Array, "n C"]) -> tuple[Array, Array]:
        y = jnp.clip(y, -FAR * gains[-1], FAR * gains[-1])
        below = jnp.sum(best_gain(code, y, weights)[:, None] > gains[None, :], axis=1)
        first = jnp.clip(below - tries // 2, 0, gains.shape[0] - tries)
        index = first[:, None] + jnp.arange(tries)[None, :]
        gain = gains.at[index].get(mode="promise_in_bounds")[..., None]  # [n, tries, 1]
        codes = window.encode_held(code, weights, (y[:, None, :] / gain).reshape(-1, y.shape[1]))
        codes = codes.reshape(*index.shape, -1)
        left = y[:, None, :] - gain * window.decode(code, codes)
        best = jnp.argmin(jnp.sum(lead(weights, 3) * jnp.square(left), axis=2), axis=1)[:, None]
        chosen = jnp.take_along_axis(codes, best[..., None], axis=1)[:, 0]
        return chosen, jnp.take_along_axis(index, best, axis=1)[:, 0].astype(jnp.uint8)

    return window.in_chunks(search, y, window.HELD // tries)


def best_gain(code: window.Rows, y: Any, weights: Any) -> Any:
    """The gain [N] of least E of every vector y [N, C]; all NumPy or all JAX.

    Newton's method on E', which is concave: from 0 on it rises to the root and never passes it.
    """
    size, w = abs(y), lead(weights, 2)
    reach = lead(REACH * largest(code), 2)
    even = (lead(code.step, 2) ** 2 * w).sum() / 48
    gain = 0.0 * size[:, :1]
    for _ in range(STEPS):
        beyond = w * reach * (size > gain * reach).astype(size.dtype)
        gain = ((beyond * size).sum(axis=1) / (even + (beyond * reach).sum(axis=1)))[:, None]
    return gain[:, 0]


def largest(code: window.Rows) -> Any:
    """[C] the largest value of each coordinate, whatever its neighbours; 0 where none is stored."""
    return 0.5 * code.step * code.last + abs(code.taps).sum(axis=-1)
