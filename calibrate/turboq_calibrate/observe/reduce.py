"""One chunk of a side to the statistics it adds: jitted, all heads and tokens at once.

The device works in float32 and int32; `to_host` turns a chunk's results into the float64 and int64
fields of `statistics.FIELDS`, which are then merged by that table.

Sums are taken of d = x - s with s near the chunk's mean, in blocks of 256 tokens: a common mean,
however large, costs nothing. Against exact arithmetic, with u = 2^-24, m blocks and weights w,

    |sum w d - exact|     <= (256 + m + 2) u sum w|d|
    |sum w d d^T - exact| <= (256 + m + 4) u sum w|d||d|^T

(Higham, section 4.2 for blocked sums, u for rounding each d and each product; one less with w = 1).
Weights |g|^2 are themselves rounded, each to (D + 1) u of itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.histogram import scatter

HIGHEST = jax.lax.Precision.HIGHEST
BLOCK = 256  # tokens summed in one float32 run

Reduced = dict[str, Array]


def side(name: str, x: Float[Array, "B T h D"], g: Float[Array, "B T h D"] | None) -> Reduced:
    """Everything that the table keeps of side `name`; g: the gradients at x, where it has any."""
    flat = x.reshape(-1, *x.shape[2:])
    found = sums(flat)
    if "histograms" in st.SIDES[name]:
        found |= histograms(flat)
    if "gradients" in st.SIDES[name]:
        if g is None:
            raise ValueError(f"side {name!r} needs gradients")
        found |= gradients(flat, g.reshape(flat.shape))
    return found


def sums(x: Float[Array, "n h D"]) -> Reduced:
    """Count, and sums of d and d d^T around a shift near the mean."""
    shift = _rounded(jnp.mean(x, axis=0))
    d = _blocks(x - shift[None])
    return {
        "count": jnp.full((x.shape[1],), x.shape[0], jnp.int32),
        "shift": shift,
        "sum": _total(d),
        "second": _outer(d, d),
    }


def histograms(x: Float[Array, "n h D"]) -> Reduced:
    """Extremes and histograms of channels and norms."""
    n, heads, dim = x.shape
    channels = scatter(st.CHANNEL_BINS.index(x).reshape(n, heads * dim), st.CHANNEL_BINS.size)
    norms = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
    return {
        "absmax": jnp.max(jnp.abs(x), axis=0),
        "channels": channels.reshape(heads, dim, st.CHANNEL_BINS.size),
        "norms": scatter(st.NORM_BINS.index(norms), st.NORM_BINS.size),
    }


def gradients(x: Float[Array, "n h D"], g: Float[Array, "n h D"]) -> Reduced:
    """Sums of g g^T, w = |g|^2, w d and w d d^T around a shift near the mean weighted by w."""
    weight = jnp.sum(jnp.square(g), axis=-1, keepdims=True)
    energy = jnp.sum(weight, axis=0)
    shift = _rounded(jnp.sum(weight * x, axis=0) / jnp.where(energy > 0, energy, 1.0))
    d, weights, slopes = _blocks(x - shift[None]), _blocks(weight), _blocks(g)
    return {
        "fisher": _outer(slopes, slopes),
        "energy": _total(weights)[:, 0],
        "weighted_shift": shift,
        "weighted_sum": _total(weights * d),
        "weighted_second": _outer(weights * d, d),
    }


def _rounded(shift: Float[Array, "h D"]) -> Float[Array, "h D"]:
    # Any number near the mean will do, but it must be the number that is returned: a compiler may
    # fuse the mean's last product into the subtraction and use it unrounded. Rounding to 22 bits
    # is an operation of its own, which it may not skip.
    return jax.lax.reduce_precision(shift, exponent_bits=8, mantissa_bits=22)


def _blocks(x: Float[Array, "n h D"]) -> Float[Array, "m b h D"]:
    pad = -x.shape[0] % BLOCK
    return jnp.pad(x, ((0, pad), (0, 0), (0, 0))).reshape(-1, BLOCK, *x.shape[1:])


def _total(x: Float[Array, "m b h D"]) -> Float[Array, "h D"]:
    return jnp.sum(jnp.sum(x, axis=1), axis=0)


def _outer(x: Float[Array, "m b h D"], y: Float[Array, "m b h D"]) -> Float[Array, "h D D"]:
    return jnp.sum(jnp.einsum("mbhd,mbhe->mhde", x, y, precision=HIGHEST), axis=0)


def to_host(reduced: dict[str, np.ndarray]) -> st.Arrays:
    """Device results of one chunk as host fields: wide types, and sums moved back from the shifts.

    With s the shift, W the sum of weights (or tokens), a = sum w d, A = sum w d d^T:
    sum w x = a + W s,  sum w x x^T = A + a s^T + s a^T + W s s^T, in float64.
    """
    out = {
        name: np.asarray(value).astype(st.BY_NAME[name].dtype)
        for name, value in reduced.items()
        if not name.endswith("shift")
    }
    _move(out, reduced["shift"], "count", "sum", "second")
    if "weighted_shift" in reduced:
        _move(out, reduced["weighted_shift"], "energy", "weighted_sum", "weighted_second")
    return out


def _move(out: st.Arrays, shift: np.ndarray, weight: str, first: str, second: str) -> None:
    s, a, w = np.asarray(shift).astype(np.float64), out[first], out[weight].astype(np.float64)
    cross = a[:, :, None] * s[:, None, :]
    outer = s[:, :, None] * s[:, None, :]
    out[second] = out[second] + cross + cross.swapaxes(1, 2) + w[:, None, None] * outer
    out[first] = a + w[:, None] * s
