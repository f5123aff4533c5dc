"""One trellis path over runs of coordinates that have different codebooks.

The code of `numbers.trellis`, but the points change from run to run: a run of b bits deals 2^(b+1)
points out to the same four subsets, and the state walks on across the border. So a transform code
with several bit widths pays for one start state, or for none: `free=False` starts in state 0, which
costs no bits and leaves the first log2(states) steps fewer paths to choose from.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from turboq.numbers import trellis

Runs = tuple[tuple[Array, int], ...]  # points [2**(bits+1)] and number of coordinates of each run


def encode(
    states: int, runs: Runs, u: Float[Array, "N C"], *, free: bool
) -> tuple[UInt8[Array, "N C"], UInt8[Array, "N"]]:
    """Codes [N, C] and start states [N] of the path of least squared error (Viterbi)."""
    count = max(16, trellis.STEP_VALUES // states)
    n = u.shape[0]
    if n <= count:
        return _encode(states, runs, free, u)
    whole = -(-n // count) * count
    parts = jnp.pad(u, ((0, whole - n), (0, 0))).reshape(-1, count, u.shape[1])
    codes, start = jax.lax.map(functools.partial(_encode, states, runs, free), parts)
    return codes.reshape(whole, -1)[:n], start.reshape(whole)[:n]


def _encode(
    states: int, runs: Runs, free: bool, u: Float[Array, "N C"]
) -> tuple[UInt8[Array, "N C"], UInt8[Array, "N"]]:
    columns = _split(runs, u.T, 0)
    near = [_near(points, x) for (points, _), x in zip(runs, columns, strict=True)]
    # Costs stay relative to state 0's: "never" must outlast the path and stay finite when added.
    never = jnp.where(jnp.arange(states) == 0, 0.0, 0.0 if free else 1e12).astype(jnp.float32)
    cost, kept = jax.lax.scan(
        functools.partial(trellis.advance, states),
        jnp.broadcast_to(never[:, None], (states, u.shape[0])),
        jax.lax.optimization_barrier(jnp.concatenate(near)),
    )
    end = jnp.argmin(cost, axis=0).astype(jnp.int32)
    start, (z1, z0) = jax.lax.scan(functools.partial(trellis.back, states), end, kept, reverse=True)
    subsets = _split(runs, 2 * z1 + z0, 0)
    places = [
        trellis.place(points, x, subset)
        for (points, _), x, subset in zip(runs, columns, subsets, strict=True)
    ]
    codes = (z1 + 2 * jnp.concatenate(places)).astype(jnp.uint8)
    return codes.T, start.astype(jnp.uint8)


def _near(points: Float[Array, "P"], u: Float[Array, "w N"]) -> Float[Array, "w 4 N"]:
    """Squared distance to the nearest point of each subset."""
    off = [
        functools.reduce(jnp.minimum, [jnp.abs(u - points[i]) for i in range(z, len(points), 4)])
        for z in range(4)
    ]
    return jnp.square(jnp.stack(off, axis=1))


def decode(
    states: int, runs: Runs, codes: UInt8[Array, "*n C"], start: UInt8[Array, "*n"] | None
) -> Float[Array, "*n C"]:
    """Values of the codes; `start` None is state 0."""
    index = trellis.indices(states, codes, start)
    values = [
        points.at[i].get(mode="promise_in_bounds")
        for (points, _), i in zip(runs, _split(runs, index, -1), strict=True)
    ]
    return jnp.concatenate(values, axis=-1)


def _split(runs: Runs, x: Array, axis: int) -> list[Array]:
    ends = [sum(width for _, width in runs[: i + 1]) for i in range(len(runs) - 1)]
    return jnp.split(x, ends, axis=axis)
