"""Fits `rope_block`: order, scales and runs from what errors of each RoPE block cost. NumPy.

With w_i the metric (query energy, or Fisher information) and v_i the variance of block i, each the
mean over its two channels, a block at b bits costs s_i d(b) per channel, with s_i = w_i v_i and d
the measured curve of the quantizer: blocks are ordered by s_i, and the codec's runs take them as
they fall.

Within a run, all coordinates have the same error d after its Hadamard rotation, so block i costs

    w_i c_i^2 d mean_j(v_j / c_j^2)     least, over blocks, at c_i = (v_i / w_i)^1/4

by Cauchy and Schwarz: halfway between whitening and weighting, and at d mean(sqrt s)^2 per channel
instead of d mean(s). Scales are these, times one factor per run that makes its mean variance 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from turboq.codecs.base import stack
from turboq.codecs.fit_basis import RIDGE, Basis, moments
from turboq.codecs.fit_transform import fit_arrays
from turboq.codecs.observed import Observed
from turboq.codecs.rope_block import RopeBlock, block_channels
from turboq.errors import TurboqError

Arrays = dict[str, np.ndarray]


def fit_observed(codec: RopeBlock, seen: Observed) -> Arrays:
    """`Codec.fit`; heads have their own order and scales, and share the segments.

    Raises:
      TurboqError: the vectors turn in other blocks than the codec's.
    """
    theirs = (seen.rope_layout, seen.rope_dim or seen.dim)
    if seen.rope_layout != "none" and theirs != (codec.layout, codec.rope_dim or codec.dim):
        raise TurboqError(
            f"codec {codec.name!r} has {codec.layout=} and {codec.rope_dim=}, but these keys turn "
            f"with layout={seen.rope_layout!r} and rope_dim={seen.rope_dim or 0}"
        )
    mean, covariance = moments(seen)
    heads = zip(mean, covariance, seen.metric, seen.x, strict=True)
    return stack([fit_rope_block(codec, *head) for head in heads])


def block_moments(
    covariance: Float[np.ndarray, "D D"],
    metric: Float[np.ndarray, "D D"],
    *,
    layout: str = "half",
    rope_dim: int = 0,
    ridge: float = RIDGE,
) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
    """Variance v and metric w of each block, float64 and positive.

    `ridge` adds that fraction of the mean of w.

    Raises:
      ValueError: covariance or metric not finite or of other shapes.
    """
    c, metric = np.asarray(covariance, np.float64), np.asarray(metric, np.float64)
    if c.ndim != 2 or c.shape != (len(c),) * 2 or c.shape != metric.shape:
        raise ValueError(f"{c.shape=} and {metric.shape=} must be [D, D]")
    if not (np.all(np.isfinite(c)) and np.all(np.isfinite(metric))):
        raise ValueError("covariance and metric must be finite: NaN or Inf found")
    pairs = block_channels(len(c), layout, rope_dim)
    v, w = (np.diagonal(m)[pairs].mean(axis=1) for m in (c, metric))
    v = np.maximum(v, 1e-12 * max(v.max(), 1e-30))
    return v, np.maximum(w + ridge * w.mean(), 1e-30)


def fit_rope_block(
    codec: RopeBlock,
    mean: Float[np.ndarray, "D"],
    covariance: Float[np.ndarray, "D D"],
    metric: Float[np.ndarray, "D D"],
    x: Float[np.ndarray, "N D"] | None = None,
    *,
    ridge: float = RIDGE,
) -> Arrays:
    """Arrays of one head, float32; `x` is needed for gains and fitted codebooks.

    Raises:
      ValueError: covariance or metric not finite or of other shapes, or samples that are missing.
    """
    v, w = block_moments(
        covariance, metric, layout=codec.layout, rope_dim=codec.rope_dim, ridge=ridge
    )
    order = np.argsort(-(v * w), kind="stable")
    scale, start = (v / w) ** 0.25, 0
    cost = np.ones(codec.dim)
    for width, _ in codec.segments:
        run = order[start // 2 : (start + width) // 2]
        scale[run] *= np.sqrt(np.mean(v[run] / scale[run] ** 2))
        cost[start : start + width] = np.mean(w[run] * scale[run] ** 2)
        start += width
    arrays = {"place": np.argsort(order).astype(np.float32), "scale": scale.astype(np.float32)}
    analysis, synthesis = matrices(codec, arrays)
    rest = ((0, codec.dim - codec.coded), (0, 0))
    full = Basis(
        mean=mean,
        analysis=np.pad(analysis, rest),
        synthesis=np.pad(synthesis.T, rest).T,
        variances=cost,
    )
    fitted = fit_arrays(codec, full, x)
    kept = {name: fitted[name] for name in codec.array_shapes if name in fitted}
    return kept | arrays


def matrices(
    codec: RopeBlock, arrays: dict[str, np.ndarray]
) -> tuple[Float[np.ndarray, "C D"], Float[np.ndarray, "D C"]]:
    """A and S of one head, float64: what `transform` stores as analysis and synthesis."""
    order = np.argsort(arrays["place"])
    channels = codec.blocks[order].reshape(-1)[: codec.coded]
    scale = np.repeat(arrays["scale"].astype(np.float64)[order], 2)[: codec.coded]
    analysis, synthesis = np.zeros((codec.coded, codec.dim)), np.zeros((codec.dim, codec.coded))
    analysis[:, channels] = codec.turn / scale
    synthesis[channels] = codec.turn.T * scale[:, None]
    return analysis, synthesis
