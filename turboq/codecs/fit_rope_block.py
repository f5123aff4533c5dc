"""Fits `rope_block`: order, scales and runs from what errors of each RoPE block cost. NumPy.

With w_i the metric (query energy, or Fisher information) and v_i the variance of block i, each the
mean over its two channels, a block at b bits costs s_i d(b) per channel, with s_i = w_i v_i and d
the measured curve of the quantizer: blocks are ordered by s_i, and `choose_segments` cuts the order
into runs by dynamic programming (`turboq.codecs.water_filling`).

Within a run, all coordinates have the same error d after its Hadamard rotation, so block i costs

    w_i c_i^2 d mean_j(v_j / c_j^2)     least, over blocks, at c_i = (v_i / w_i)^1/4

by Cauchy and Schwarz: halfway between whitening and weighting, and at d mean(sqrt s)^2 per channel
instead of d mean(s). Scales are these, times one factor per run that makes its mean variance 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from turboq.codecs.fit_transform import Basis, fit_arrays, weighted_moments
from turboq.codecs.rope_block import RopeBlock, block_channels
from turboq.codecs.transform import MAX_SEGMENTS, Segments
from turboq.codecs.water_filling import distortion_curve, rates


def block_moments(
    x: Float[np.ndarray, "N D"],
    metric: Float[np.ndarray, "D D"],
    *,
    layout: str = "half",
    rope_dim: int = 0,
    weights: Float[np.ndarray, "N"] | None = None,
    ridge: float = 1e-2,
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
    """Mean [D], and of each block the variance v and the metric w, float64 and positive.

    `weights` [N] of mean 1 count tokens; `ridge` adds that fraction of the mean of w.

    Raises:
      ValueError: x or metric not finite or of other shapes.
    """
    x, metric = np.asarray(x), np.asarray(metric, np.float64)
    if x.ndim != 2 or not len(x) or metric.shape != (x.shape[1],) * 2:
        raise ValueError(f"{x.shape=} must be [N, D] with N > 0 and {metric.shape=} [D, D]")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(metric))):
        raise ValueError("x and metric must be finite: NaN or Inf found")
    mean, covariance = weighted_moments(x, weights)
    pairs = block_channels(x.shape[1], layout, rope_dim)
    v, w = (np.diagonal(m)[pairs].mean(axis=1) for m in (covariance, metric))
    v = np.maximum(v, 1e-12 * max(v.max(), 1e-30))
    return mean, v, np.maximum(w + ridge * w.mean(), 1e-30)


def choose_segments(
    scores: Float[np.ndarray, "H"],
    bits_per_vector: int,
    *,
    quantizer: str = "scalar",
    states: int = 8,
    runs: int = MAX_SEGMENTS,
) -> Segments:
    """The runs of least sum of s_i d(b_i) whose codes take at most `bits_per_vector` bits.

    Raises:
      ValueError: not even 8 coordinates of one bit fit.
    """
    s = np.repeat(np.sort(np.asarray(scores, np.float64))[::-1], 2)
    table = rates(s, distortion_curve(quantizer, states), runs=runs)
    return table.segments[table.at(bits_per_vector)]


def fit_rope_block(
    codec: RopeBlock,
    x: Float[np.ndarray, "N D"],
    metric: Float[np.ndarray, "D D"] | None = None,
    *,
    weights: Float[np.ndarray, "N"] | None = None,
    ridge: float = 1e-2,
) -> dict[str, np.ndarray]:
    """Arrays of one head, float32, from vectors x and what errors cost (None: all alike).

    Raises:
      ValueError: x or metric not finite or of other shapes.
    """
    metric = np.eye(codec.dim) if metric is None else metric
    mean, v, w = block_moments(
        x, metric, layout=codec.layout, rope_dim=codec.rope_dim, weights=weights, ridge=ridge
    )
    order = np.argsort(-(v * w), kind="stable")
    scale, start = (v / w) ** 0.25, 0
    for width, _ in codec.segments:
        run = order[start // 2 : (start + width) // 2]
        scale[run] *= np.sqrt(np.mean(v[run] / scale[run] ** 2))
        start += width
    arrays = {"place": np.argsort(order).astype(np.float32), "scale": scale.astype(np.float32)}
    analysis, synthesis = matrices(codec, arrays)
    rest = ((0, codec.dim - codec.coded), (0, 0))
    full = Basis(
        mean=mean,
        analysis=np.pad(analysis, rest),
        synthesis=np.pad(synthesis.T, rest).T,
        variances=np.ones(codec.dim),
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
