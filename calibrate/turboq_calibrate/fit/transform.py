"""From samples of a layer to `transform` codecs: fixed segments, or the best ones at a size."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from turboq.codecs.fit_transform import (
    Basis,
    fit_arrays,
    fit_basis,
    measured_costs,
    token_weights,
    weighted_moments,
)
from turboq.codecs.transform import MAX_SEGMENTS, Segments, Transform
from turboq.codecs.water_filling import Rates, cost_rates, distortion_curve
from turboq_calibrate.observe.gradients import GradientSamples, LayerGradients
from turboq_calibrate.observe.samples import LayerSamples

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `transform` codecs have in common when their segments are still free."""

    quantizer: str = "scalar"
    states: int = 8
    free_start: bool = False
    codebook: str = "gaussian"
    gain: str = "none"
    gain_bits: int = 4
    runs: int = MAX_SEGMENTS
    ridge: float = 1e-2
    shrink: float = 0.0
    emphasis: float = 0.5  # of the covariance: 0 counts tokens alike, 1 by what they cost

    @classmethod
    def of(cls, codec: Transform) -> Options:
        """The options of a codec whose segments are given."""
        names = ("quantizer", "states", "free_start", "codebook", "gain", "gain_bits")
        return cls(**{name: getattr(codec, name) for name in names})

    def codec(self, dim: int, segments: Segments) -> Transform:
        """The codec of these segments."""
        return Transform(
            dim=dim,
            segments=segments,
            quantizer=self.quantizer,
            states=self.states,
            free_start=self.free_start,
            codebook=self.codebook,
            gain=self.gain,
            gain_bits=self.gain_bits,
        )

    def overhead(self, dim: int) -> int:
        """Stored bits per vector beside the codes: gain and start state."""
        segments = ((8, 1),)
        return self.codec(dim, segments).bits_per_vector - 8

    @property
    def curve(self) -> np.ndarray:
        """Distortion curve of the quantizer."""
        return distortion_curve(self.quantizer, self.states, self.free_start)


@dataclasses.dataclass(frozen=True)
class HeadFit:
    """One head before its segments are chosen: basis, costs and spreads [D, bits + 1]."""

    basis: Basis
    costs: Float[np.ndarray, "D b"]
    spreads: Float[np.ndarray, "D b"]


def fit_heads(
    samples: LayerSamples,
    side: str,
    options: Options | None = None,
    *,
    gradients: LayerGradients | None = None,
    metric: Float[np.ndarray, "K D D"] | None = None,
) -> list[HeadFit]:
    """Joint basis and measured costs of every KV head of one side of a layer.

    With `gradients` (`fisher.collect_gradients` on the same windows; those of `GradientSamples` are
    found) costs are nats per token, comparable between heads, layers and sides, and tokens count by
    what an error costs there.
    Without, `metric` defaults to the queries' second moment for K and to 1 for V, tokens alike.
    """
    options = options or Options()
    x = samples.k if side == "k" else samples.v
    if gradients is None and isinstance(samples, GradientSamples):
        gradients = samples.gradients
    if metric is None and gradients is not None:
        metric = gradients.metric(side)
    elif metric is None:
        eye = np.broadcast_to(np.eye(x.shape[-1]), (len(x), x.shape[-1], x.shape[-1]))
        metric = samples.q_moment if side == "k" else eye
    g = None if gradients is None else (gradients.k if side == "k" else gradients.v)
    return [
        _fit_head(head, m, None if g is None else g[i], options)
        for i, (head, m) in enumerate(zip(x, metric, strict=True))
    ]


def _fit_head(x, metric, g, options: Options) -> HeadFit:
    weights = np.ones(len(x)) if g is None else token_weights(g, metric, ridge=options.ridge)
    emphasis = options.emphasis
    mean, covariance = weighted_moments(x, (1 - emphasis) + emphasis * weights)
    basis = fit_basis(mean, covariance, metric, ridge=options.ridge, shrink=options.shrink)
    at, count = _subset(weights)
    y = (x[at] - mean.astype(np.float32)) @ basis.analysis.T.astype(np.float32)
    cost = weights[at, None] * basis.variances[None, :]
    if g is not None:
        # What the gradient says of each coordinate by itself is exact but noisy: half and half.
        cost = 0.5 * cost + 0.25 * np.square(g[at] @ basis.synthesis.astype(np.float32))
    costs, spreads = measured_costs(y, cost * (count / len(x))[:, None], options.curve)
    return HeadFit(basis, costs, spreads)


def _subset(weights: np.ndarray, most: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` tokens, the heaviest half of them all there; and how many each stands for."""
    n = len(weights)
    if n <= most:
        return np.arange(n), np.ones(n)
    order = np.argsort(-weights, kind="stable")
    top, rest = order[: most // 2], np.sort(order[most // 2 :])
    rest = rest[np.arange(most // 2) * len(rest) // (most // 2)]
    share = (n - most // 2) / (most // 2)
    return np.concatenate([top, rest]), np.repeat([1.0, share], most // 2)


def head_rates(fits: list[HeadFit], options: Options) -> list[Rates]:
    """The best segments of each head at every size; sizes without `options.overhead`."""
    return [cost_rates(f.costs, runs=options.runs) for f in fits]


def fit_transform(
    codec: Transform | Options,
    samples: LayerSamples,
    side: str,
    *,
    bits_per_vector: int | None = None,
    metric: Float[np.ndarray, "K D D"] | None = None,
    gradients: LayerGradients | None = None,
    fits: list[HeadFit] | None = None,
) -> tuple[Transform, Arrays]:
    """One codec for all KV heads of one side of a layer, and its arrays [K, ...].

    Given `Options` instead of a codec, the segments are those that minimise the heads' summed
    cost at `bits_per_vector` stored bits. `fits` of an earlier `fit_heads` save their repetition.

    Raises:
      ValueError: options without a size, or a size below the smallest.
    """
    options = codec if isinstance(codec, Options) else Options.of(codec)
    fits = fits or fit_heads(samples, side, options, gradients=gradients, metric=metric)
    if isinstance(codec, Options):
        if bits_per_vector is None:
            raise ValueError("options need bits_per_vector, how many bits to store")
        dim = len(fits[0].basis.mean)
        table = cost_rates(np.sum([f.costs for f in fits], axis=0), runs=options.runs)
        segments = table.segments[table.at(bits_per_vector - options.overhead(dim))]
        codec = options.codec(dim, segments)
    x = samples.k if side == "k" else samples.v
    return codec, stack([arrays_of(codec, f, h) for f, h in zip(fits, x, strict=True)])


def transform_at(
    samples: LayerSamples,
    side: str,
    bits_per_vector: int,
    *,
    metric: Float[np.ndarray, "K D D"] | None = None,
    gradients: LayerGradients | None = None,
    fits: list[HeadFit] | None = None,
    **options,
) -> list[tuple[Transform, Arrays]]:
    """Every KV head's own best `transform` within `bits_per_vector` stored bits: (codec, arrays).

    `options` are those of `Options`; `fits` of an earlier `fit_heads` save their repetition.

    Raises:
      ValueError: the size is below the smallest, or an option makes no sense.
    """
    chosen = Options(**options)
    fits = fits or fit_heads(samples, side, chosen, gradients=gradients, metric=metric)
    x = samples.k if side == "k" else samples.v
    dim = x.shape[-1]
    out = []
    for fit, table, head in zip(fits, head_rates(fits, chosen), x, strict=True):
        at = table.at(bits_per_vector - chosen.overhead(dim))
        codec = chosen.codec(dim, table.segments[at])
        out.append((codec, arrays_of(codec, fit, head)))
    return out


def arrays_of(codec: Transform, fit: HeadFit, x: Float[np.ndarray, "N D"] | None) -> Arrays:
    """Arrays of one head at these segments."""
    return fit_arrays(codec, fit.basis, x, spreads=fit.spreads)


def stack(heads: list[Arrays]) -> Arrays:
    """Arrays of single heads with a leading head axis."""
    return {name: np.stack([h[name] for h in heads]) for name in heads[0]}
