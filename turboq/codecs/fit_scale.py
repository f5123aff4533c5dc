"""Static scales of FP8 and NVFP4 from samples: absmax, percentile, or least squared error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs.base import Codec
from turboq.codecs.fp8 import FP8
from turboq.codecs.nvfp4 import NVFP4

METHODS = ("absmax", "percentile", "mse")
# Ratios to the absmax scale that "mse" tries: down to 2**-6 in steps of 2**(-1/16). A floating-
# point format has the same relative steps after every halving, so what a smaller scale buys is
# fewer subnormals and a better place of the steps, and what it costs is saturation.
RATIOS = 2.0 ** (-np.arange(97) / 16)


def fit_scale(
    codec: Codec, samples: np.ndarray, method: str = "absmax", percentile: float = 99.99
) -> dict[str, np.ndarray]:
    """The array `scale` [K], float32, of a static codec from samples [K, n, D].

        absmax      max |x| / range: nothing saturates
        percentile  the `percentile` of |x| / range: the rest above saturates
        mse         of `RATIOS` times the absmax scale, the one with the least mean squared error

    `range` is the largest |x| / scale that does not saturate. With FP8(scale="tensor") all heads
    are pooled and share one value. A head whose samples are all zero gets scale 1.

    Raises:
      TypeError: `codec` has no static scale.
      ValueError: unknown method, percentile not in (0, 100], samples not finite or of wrong shape.
    """
    if not (isinstance(codec, FP8 | NVFP4) and codec.array_shapes):
        raise TypeError(f"{codec} has no static scale: fit FP8(scale='tensor'|'head') or NVFP4")
    if method not in METHODS:
        raise ValueError(f"{method=} must be one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"{percentile=} must be above 0 and at most 100")
    x = np.asarray(samples, np.float32)
    if x.ndim != 3 or x.shape[-1] != codec.dim or not x.size:
        raise ValueError(f"samples of shape {list(x.shape)} must be [K, n, D] with D={codec.dim}")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"{int(np.sum(~np.isfinite(x)))} samples are not finite")
    heads = len(x)
    pooled = isinstance(codec, FP8) and codec.scale == "tensor"
    x = x.reshape(1, -1, codec.dim) if pooled else x
    size = np.abs(x).reshape(len(x), -1).astype(np.float64)
    if method == "percentile":
        peak = np.percentile(size, percentile, axis=1)
        peak = np.where(peak > 0, peak, size.max(axis=1))  # mostly zeros: keep what there is
    else:
        peak = size.max(axis=1)
    scale = np.where(peak > 0, peak / codec.range, 1.0)
    # A scale below float32's normal numbers would flush to zero and divide by it.
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
    if method == "mse":
        candidates = scale[:, None] * RATIOS.astype(np.float32)[None, :]
        candidates = np.maximum(candidates, np.finfo(np.float32).tiny)
        error = np.asarray(_errors(codec, jnp.asarray(x), jnp.asarray(candidates)))
        scale = candidates[np.arange(len(x)), np.argmin(error, axis=1)]
    return {"scale": np.repeat(scale, heads) if pooled else scale}


@functools.partial(jax.jit, static_argnames="codec")
def _errors(
    codec: Codec, x: Float[Array, "K n D"], candidates: Float[Array, "K R"]
) -> Float[Array, "K R"]:
    """Mean squared error of every head under every candidate, one candidate at a time."""

    def one_head(pair):
        head, scales = pair

        def one(scale):
            arrays = {"scale": scale}
            return jnp.mean((codec.decode(arrays, codec.encode(arrays, head)) - head) ** 2)

        return jax.lax.map(one, scales)

    return jax.lax.map(one_head, (x, candidates))
