"""From samples of a layer to `rope_block` and `hadamard_per_head` codecs, one fit per KV head."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from turboq.codecs.fit_hadamard import fit_hadamard
from turboq.codecs.fit_rope_block import block_moments, choose_segments, fit_rope_block
from turboq.codecs.fit_transform import token_weights
from turboq.codecs.hadamard_per_head import HadamardPerHead
from turboq.codecs.rope_block import RopeBlock
from turboq_calibrate.fit.transform import Arrays, Options, stack
from turboq_calibrate.observe.gradients import LayerGradients
from turboq_calibrate.observe.samples import LayerSamples


def rope_block_at(
    samples: LayerSamples,
    side: str,
    bits_per_vector: int,
    *,
    gradients: LayerGradients | None = None,
    layout: str = "half",
    rope_dim: int = 0,
    **options,
) -> list[tuple[RopeBlock, Arrays]]:
    """Every KV head's own best `rope_block` within `bits_per_vector` stored bits: (codec, arrays).

    The metric is that of `learned.fit_heads`: Fisher information with `gradients`, else the
    queries' second moment for K and 1 for V. `options` are those of `learned.Options`.

    Raises:
      ValueError: the size is below the smallest, or an option makes no sense.
    """
    chosen, out = Options(**options), []
    for x, metric, weights in _heads(samples, side, gradients, chosen):
        _, v, w = block_moments(
            x, metric, layout=layout, rope_dim=rope_dim, weights=weights, ridge=chosen.ridge
        )
        segments = choose_segments(
            v * w,
            bits_per_vector - chosen.overhead(x.shape[1]),
            quantizer=chosen.quantizer,
            states=chosen.states,
            runs=chosen.runs,
        )
        codec = RopeBlock(
            dim=x.shape[1],
            segments=segments,
            quantizer=chosen.quantizer,
            states=chosen.states,
            free_start=chosen.free_start,
            codebook=chosen.codebook,
            gain=chosen.gain,
            gain_bits=chosen.gain_bits,
            layout=layout,
            rope_dim=rope_dim,
        )
        arrays = fit_rope_block(codec, x, metric, weights=weights, ridge=chosen.ridge)
        out.append((codec, arrays))
    return out


def fit_blocks(
    codec: RopeBlock | HadamardPerHead,
    samples: LayerSamples,
    side: str,
    *,
    gradients: LayerGradients | None = None,
    **search,
) -> Arrays:
    """Arrays [K, ...] of one codec for all KV heads of a side; `search` as in `fit_hadamard`."""
    out = []
    for x, metric, weights in _heads(samples, side, gradients, Options()):
        if isinstance(codec, RopeBlock):
            out.append(fit_rope_block(codec, x, metric, weights=weights))
        else:
            out.append(fit_hadamard(codec, x, metric, weights=weights, **search))
    return stack(out)


def _heads(samples, side, gradients, options: Options):
    """(vectors, metric, token weights) of every head, weights mixed as for the covariance."""
    x: Float[np.ndarray, "K N D"] = samples.k if side == "k" else samples.v
    eye = np.eye(x.shape[-1])
    for h in range(len(x)):
        weights = None
        if gradients is not None:
            metric = gradients.metric(side)[h]
            g = (gradients.k if side == "k" else gradients.v)[h]
            cost = token_weights(g, metric, ridge=options.ridge)
            weights = (1 - options.emphasis) + options.emphasis * cost
        else:
            metric = samples.q_moment[h] if side == "k" else eye
        yield x[h], metric, weights
