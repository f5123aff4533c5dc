"""Window codes on GPUs (Pallas-Triton): the search of every gain tried, one program per vector.

    y [C] -> the gains around the one of least E (`turboq.numbers.window_gain.best_gain`)
          -> own bits of the best path of each (`triton_search`), a warp for a gain
          -> places by rounding, errors, and the codes of the gain that leaves least

Bits of a coordinate are data, so one program codes all heads of all layers of a plan. What is
promised: the weighted error of what is stored is least to float32's rounding; where two paths or
gains leave as little as that, codes may differ from those of XLA, whose sums are in another order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt8

from turboq.numbers import window, window_gain
from turboq_kernels.encode.triton_search import RUN, STEPS, Search, own_bits
from turboq_kernels.target import target, too_old
from turboq_kernels.triton_memory import load, store

MAX_CODED = 256  # coordinates: words of their paths are held in registers


def unsupported(coded: int) -> str | None:
    """Why this kernel cannot code so many coordinates, or None."""
    if coded > MAX_CODED:
        return f"{coded} coordinates are more than {MAX_CODED}"
    return too_old()


def encode(
    code: window.Rows,
    y: Float[Array, "B H T C"],
    gains: Float[Array, "H G"] | None,
    weights: Float[Array, "H C"],
    *,
    interpret: bool = False,
) -> tuple[UInt8[Array, "B H T C"], UInt8[Array, "B H T"]]:
    """`window_gain.encode` of every head's vectors, or without gains `window.encode` (gain 1).

    Rows have a leading axis H, and are equal within each 8 coordinates from a multiple of 8 on.
    """
    batch, heads, tokens, _ = y.shape
    search = search_of(
        code.taps.shape[-1] - 1, 0 if gains is None else gains.shape[1], y.shape[3], interpret
    )  # fmt: skip
    if gains is not None:
        far = window_gain.FAR * gains[None, :, None, -1:]
        y = jnp.clip(y, -far, far)
    inputs = {
        "y": y, "gains": gains, "weights": weights,
        "step": code.step, "last": code.last, "taps": code.taps,
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, search=search, tree=tree),
            grid=(tokens, heads, batch),
            out_shape=[
                jax.ShapeDtypeStruct(y.shape, jnp.uint8),
                jax.ShapeDtypeStruct(y.shape[:3], jnp.uint8),
            ],
            compiler_params=plgpu.CompilerParams(num_warps=search.warps, num_stages=1),
            interpret=interpret,
            name="turboq_window",
        )(*leaves)
    )


def search_of(memory: int, gains: int, coded: int, interpret: bool) -> Search:
    """What is static about the search of vectors of so many coordinates; 0 gains: gain 1."""
    asm = target().ptx and not interpret
    tries = min(window_gain.TRIES, gains or 1)
    return Search(memory=memory, tries=tries, coded=coded, interpret=interpret, asm=asm)


def _kernel(*refs, search: Search, tree) -> None:
    x: dict[str, Any] = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    codes_ref, gain_ref = refs[tree.num_leaves :]
    t, h, b = (pl.program_id(i) for i in range(3))
    at = (b, h, t)
    channel = jnp.arange(pl.next_power_of_2(search.coded), dtype=jnp.int32)
    real = channel < search.coded
    y = load(x["y"], (*at, channel), real)
    codes, index = coded(x, y, lambda c: x["y"][(*at, c)], h, search)
    store(
        codes_ref, (*at, channel), codes.astype(jnp.uint8), real, interpret=search.interpret
    )  # fmt: skip
    gain_ref[at] = index.astype(jnp.uint8)


def coded(x: dict[str, Any], y: Float[Array, "P"], y_at, h, s: Search) -> tuple[Array, Array]:
    """Codes [P] of a vector y, zero behind its C coordinates, and the index of its gain.

    y is not beyond `window_gain.FAR` of the last gain, and `y_at` gives a coordinate of it. `x` has
    weights, gains, step, last, taps of all heads.
    """
    channel = jnp.arange(y.shape[0], dtype=jnp.int32)
    real = channel < s.coded
    rows = [load(x[name], (h, channel), real) for name in ("step", "last", "weights")]
    rows += [load(x["taps"], (h, channel, j), real) for j in range(s.memory + 1)]
    step, last, weight, *taps = rows
    first = jnp.int32(0)
    gain = jnp.ones((s.tries,), jnp.float32)
    if x["gains"] is not None:
        count = x["gains"].shape[1]
        every = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
        best = _best_gain(y, step, last, weight, taps)
        below = (best > load(x["gains"], (h, every), every < count)) & (every < count)
        below = jnp.sum(below.astype(jnp.int32))
        first = jnp.clip(below - s.tries // 2, 0, count - s.tries)
        gain = x["gains"][h, first + jnp.arange(s.tries, dtype=jnp.int32)]

    def row_at(g):
        # The last of its run: there every tap exists that may count.
        c = jnp.minimum(RUN * g + RUN - 1, s.coded - 1)
        own = [x["taps"][h, c, j] for j in range(s.memory + 1)]
        return x["step"][h, c], x["last"][h, c], own

    def value_at(c):
        return y_at(c), x["weights"][h, c]

    words = own_bits(row_at, value_at, 1.0 / gain, s)
    u = y[None, :] / gain[:, None]
    register = _registers(words, channel, s)
    own = sum(
        tap[None, :] * (2 * (register >> j & 1) - 1).astype(jnp.float32)
        for j, tap in enumerate(taps)
    )
    safe = jnp.where(real, step, 1.0)[None, :]
    half = 0.5 * last[None, :]
    place = jnp.clip(_whole((u - own) / safe + half, last[None, :], s), 0.0, last[None, :])
    left = y[None, :] - gain[:, None] * (own + step[None, :] * (place - half))
    error = jnp.sum(weight[None, :] * left * left, axis=1)
    number = jnp.arange(s.tries, dtype=jnp.int32)
    chosen = jnp.min(jnp.where(error == jnp.min(error), number, s.tries))
    chosen = jnp.where(chosen == s.tries, 0, chosen)  # all are NaN
    codes = (register & 1) + 2 * place.astype(jnp.int32)
    codes = jnp.sum(jnp.where((number == chosen)[:, None], codes, 0), axis=0)
    return codes, first + chosen


def _whole(x: Array, last: Array, s: Search) -> Array:
    """The nearest integer of 0..last; 0 for NaN."""
    x = jnp.where(x > 0, jnp.where(x < last, x, last), 0.0)
    return jnp.round(x) if s.interpret else (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


def _best_gain(y, step, last, weight, taps) -> Array:
    """`window_gain.best_gain` of one vector."""
    size = jnp.abs(y)
    reach = window_gain.REACH * (0.5 * step * last + sum(jnp.abs(tap) for tap in taps))
    even = jnp.sum(step * step * weight) / 48
    gain = 0.0 * jnp.sum(size)  # NaN of NaN
    for _ in range(window_gain.STEPS):
        beyond = weight * reach * (size > gain * reach).astype(jnp.float32)
        gain = jnp.sum(beyond * size) / (even + jnp.sum(beyond * reach))
    return gain


def _registers(words: list[Array], channel: Array, s: Search) -> Array:
    """[T, P]: bit j is the own bit of coordinate t - j."""
    block, place = channel // STEPS, channel % STEPS
    out = jnp.zeros((s.tries, channel.shape[0]), jnp.int32)
    before = jnp.zeros((s.tries,), jnp.int32)
    for b, word in enumerate(words):
        whole = (before << STEPS) | word
        out = jnp.where((block == b)[None, :], whole[:, None], out)
        before = word
    shifted = jax.lax.bitcast_convert_type(out, jnp.uint32) >> (STEPS - 1 - place)[None, :].astype(
        jnp.uint32
    )
    return shifted.astype(jnp.int32) & (2 << s.memory) - 1
