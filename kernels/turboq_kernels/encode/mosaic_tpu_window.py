"""Window codes on TPUs: the search of every gain tried, 128 of them side by side.

    y [C] -> the gains around the one of least E (`turboq.numbers.window_gain.best_gain`)
          -> own bits of the best path of each (`mosaic_tpu_search`), a lane for a gain
          -> places by rounding, errors, and the codes of the gain that leaves least

Bits of a coordinate are data, so one program codes all heads of all layers of a plan. What is
promised is what `triton_window` promises: the weighted error of what is stored is least to
float32's rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from turboq.numbers import window, window_gain
from turboq_kernels.encode import mosaic_tpu_search as searches
from turboq_kernels.encode.mosaic_tpu_search import LANES, Search

MAX_CODED = 256  # coordinates: VMEM that rows of the code take in every lane


def unsupported(coded: int) -> str | None:
    """Why this kernel cannot code so many coordinates, or None."""
    if coded > MAX_CODED:
        return f"{coded} coordinates are more than {MAX_CODED}"
    if coded % 8:
        return f"{coded} coordinates, which are no multiple of 8"
    return None


def search_of(memory: int, gains: int, coded: int, interpret: bool) -> Search:
    """What is static about the search of vectors of so many coordinates; 0 gains: gain 1."""
    tries = min(window_gain.TRIES, gains or 1)
    return Search(memory=memory, tries=tries, coded=coded, interpret=interpret)


def encode(
    code: window.Rows,
    y: Float[Array, "B H T C"],
    gains: Float[Array, "H G"] | None,
    weights: Float[Array, "H C"],
    *,
    interpret: bool = False,
) -> tuple[UInt8[Array, "B H T C"], UInt8[Array, "B H T"]]:
    """`window_gain.encode` of every head's vectors, or without gains `window.encode` (gain 1).

    Rows have a leading axis H.
    """
    batch, heads, tokens, width = y.shape
    s = search_of(
        code.taps.shape[-1] - 1, 0 if gains is None else gains.shape[1], width, interpret
    )  # fmt: skip
    # A grid step takes V vectors: all heads of some tokens, or some heads of one.
    room = 1 << (heads - 1).bit_length()
    parts, each = max(1, room // s.vectors), max(1, s.vectors // room)
    every = y.swapaxes(1, 2).reshape(batch * tokens, heads, width)
    every = jnp.pad(every, ((0, -len(every) % each), (0, room - heads), (0, 0)))
    steps = len(every) // each

    def of_heads(x):  # [H, ..] as the vectors of a step have them, [P, V, ..]
        x = jnp.pad(x, ((0, room - heads), *((0, 0),) * (x.ndim - 1)))
        return jnp.tile(x, (each, *(1,) * (x.ndim - 1))).reshape(parts, s.vectors, *x.shape[1:])

    held: dict[str, Any] = {
        "step": of_heads(code.step), "last": of_heads(code.last), "weights": of_heads(weights),
        "taps": jnp.moveaxis(of_heads(code.taps), 3, 1),
        "gains": None if gains is None else of_heads(gains),
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(held)
    scratch, scratch_tree = jax.tree.flatten(s.scratch())
    y_spec = pl.BlockSpec((None, None, s.vectors, width), lambda p, i: (i, p, 0, 0))
    out = jax.ShapeDtypeStruct((steps, parts, s.vectors, width), jnp.int32)
    index = jax.ShapeDtypeStruct((steps, parts, s.vectors, LANES), jnp.int32)

    def whole(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda p, i: (p, *(0,) * (x.ndim - 1)))

    codes, chosen = pl.pallas_call(
        functools.partial(_kernel, trees=(tree, scratch_tree), s=s),
        grid=(parts, steps),
        in_specs=[*map(whole, leaves), y_spec],
        out_specs=[
            y_spec, pl.BlockSpec((None, None, s.vectors, LANES), lambda p, i: (i, p, 0, 0))
        ],
        out_shape=[out, index],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="turboq_window",
    )(*leaves, every.reshape(steps, parts, s.vectors, width))  # fmt: skip

    def of_tokens(x):
        x = x.reshape(steps * each, room, x.shape[-1])[: batch * tokens, :heads].astype(jnp.uint8)
        return x.reshape(batch, tokens, heads, -1).swapaxes(1, 2)

    return of_tokens(codes), of_tokens(chosen[..., :1])[..., 0]


def _kernel(*refs, trees, s: Search) -> None:
    tree, scratch_tree = trees
    x = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    y_ref, codes_ref, index_ref = refs[tree.num_leaves : tree.num_leaves + 3]
    room = jax.tree.unflatten(scratch_tree, refs[tree.num_leaves + 3 :])
    vectors = of_lanes(s.vectors, 0, s)

    @pl.when(pl.program_id(1) == 0)
    def _():
        step, last, weights = (
            searches.spread(x[name][...], vectors) for name in ("step", "last", "weights")
        )
        taps = [searches.spread(x["taps"][j], vectors) for j in range(s.memory + 1)]
        searches.put_rows(room["rows"], step, last, weights, taps)

    y, gains = y_ref[...], None
    if x["gains"] is not None:
        own = x["gains"][...]
        y, gains = within(y, own), searches.spread(own, vectors)
    else:
        y = jnp.where(y == y, y, 0.0)
    codes, index = searches.coded(searches.spread(y, vectors), gains, room, s)
    codes_ref[...] = searches.gathered(codes, vectors).astype(jnp.int32)
    # All lanes of a vector hold its gain's index; those of the first one tried are taken.
    tried = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 1) < s.vectors, index, 0)
    found = searches.gathered(tried, vectors)[:, :1]
    index_ref[...] = jnp.broadcast_to(found.astype(jnp.int32), index_ref.shape)


def of_lanes(count: int, first: int, s: Search) -> Float[Array, "n 128"]:
    """1 where lane l has vector `first` + n, 0 elsewhere."""
    shape = (count, LANES)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
    return (lane % s.vectors == row + first).astype(jnp.float32)


def within(y: Float[Array, "n C"], gains: Float[Array, "n G"]) -> Float[Array, "n C"]:
    """y, no further out than `window_gain.FAR` of its vector's last gain; 0 for NaN."""
    far = window_gain.FAR * jnp.max(gains, axis=1, keepdims=True)
    return jnp.where(y == y, jnp.clip(y, -far, far), 0.0)
