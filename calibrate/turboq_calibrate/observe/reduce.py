"""One chunk of q, k or v to the statistics it adds: jitted, all heads and tokens at once.

The device works in float32 and int32; `to_host` turns a chunk's results into the float64 and int64
fields of `statistics.FIELDS`, which are then merged by that table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.numbers.rotation import Rotation
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.histogram import scatter

HIGHEST = jax.lax.Precision.HIGHEST
BLOCK = 256  # tokens summed in one float32 run

Reduced = dict[str, Array]


def moments(x: Float[Array, "B T h D"]) -> Reduced:
    """Counts, centred sums, extremes and histograms of one chunk (sweep 1).

    Sums are taken of d = x - s with s near the chunk's mean, in blocks of 256 tokens: a common
    mean, however large, costs nothing. Against exact arithmetic, with u = 2^-24 and m blocks,

        |sum d - exact| <= (256 + m + 1) u sum|d|
        |sum d d^T - exact| <= (256 + m + 3) u sum|d||d|^T

    (Higham, section 4.2 for blocked sums, and u for rounding each d).
    """
    n, heads, dim = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    flat = x.reshape(n, heads, dim)
    # Any number near the mean will do, but it must be the number that is returned: a compiler may
    # fuse the mean's last product into the subtraction and use it unrounded. Rounding to 22 bits
    # is an operation of its own, which it may not skip.
    shift = jax.lax.reduce_precision(jnp.mean(flat, axis=0), exponent_bits=8, mantissa_bits=22)
    pad = -n % BLOCK
    d = jnp.pad(flat - shift[None], ((0, pad), (0, 0), (0, 0))).reshape(-1, BLOCK, heads, dim)
    second = jnp.einsum("mthd,mthe->mhde", d, d, precision=HIGHEST)
    channels = scatter(st.CHANNEL_BINS.index(flat).reshape(n, heads * dim), st.CHANNEL_BINS.size)
    norms = jnp.sqrt(jnp.sum(jnp.square(flat), axis=-1))
    return {
        "count": jnp.full((heads,), n, jnp.int32),
        "shift": shift,
        "sum": jnp.sum(jnp.sum(d, axis=1), axis=0),
        "second": jnp.sum(second, axis=0),
        "absmax": jnp.max(jnp.abs(flat), axis=0),
        "channels": channels.reshape(heads, dim, st.CHANNEL_BINS.size),
        "norms": scatter(st.NORM_BINS.index(norms), st.NORM_BINS.size),
    }


def codes(
    x: Float[Array, "B T h D"],
    center: Float[Array, "h D"],
    scale: Float[Array, "h"],
    rotation: Rotation,
) -> Reduced:
    """Histograms of the rotated, centred coordinates of one chunk (sweep 2).

    y = R (x - center); `vector` bins y / rms(y) (zero vectors: 0), `head` bins y / scale (a head
    of zero variance: 0).
    """
    n, heads, dim = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    y = rotation.apply(x.reshape(n, heads, dim) - center[None])
    norm = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1))
    by_vector = _divide(y, (norm / np.float32(np.sqrt(dim)))[..., None])
    by_head = _divide(y, scale[None, :, None])
    clipped = (jnp.abs(by_head) > st.CODE_BINS.limit).astype(jnp.int32)
    return {
        "centered_norms": scatter(st.NORM_BINS.index(norm), st.NORM_BINS.size),
        **_code_histogram("vector", by_vector),
        **_code_histogram("head", by_head),
        "head_clipped": jnp.sum(clipped, axis=(0, 2)),
    }


def _divide(y: Float[Array, "n h D"], by: Float[Array, "..."]) -> Float[Array, "n h D"]:
    by = jnp.broadcast_to(by, y.shape)
    return jnp.where(by > 0, y / jnp.where(by > 0, by, 1.0), 0.0)


def _code_histogram(name: str, u: Float[Array, "n h D"]) -> Reduced:
    index, offset = st.CODE_BINS.index(jnp.swapaxes(u, 1, 2).reshape(-1, u.shape[1]))
    return {
        f"{name}_counts": scatter(index, st.CODE_BINS.size),
        f"{name}_moments": scatter(index, st.CODE_BINS.size, offset),
    }


def to_host(reduced: dict[str, np.ndarray]) -> st.Arrays:
    """Device results of one chunk as host fields: wide types, and sums moved back from the shift.

    With s the shift, n tokens, a = sum d, A = sum d d^T:  sum x = a + n s,
    sum x x^T = A + a s^T + s a^T + n s s^T, in float64.
    """
    out = {
        name: np.asarray(value).astype(st.BY_NAME[name].dtype)
        for name, value in reduced.items()
        if name != "shift"
    }
    if "shift" in reduced:
        s, a = np.asarray(reduced["shift"]).astype(np.float64), out["sum"]
        n = out["count"].astype(np.float64)
        cross = a[:, :, None] * s[:, None, :]
        outer = s[:, :, None] * s[:, None, :]
        out["second"] = out["second"] + cross + cross.swapaxes(1, 2) + n[:, None, None] * outer
        out["sum"] = a + n[:, None] * s
    return out
