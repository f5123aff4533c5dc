"""Fits `transform`: bases of the heads, segments at a size, gains and codebooks. NumPy.

    fits = fit_heads(seen, options)                 one basis and its measured costs per KV head
    head_rates(fits, options)                       the best segments of each at every size
    arrays_of(codec, fit, x)                        what a codec of such segments stores

`held_out_cost` is what such codecs cost on other tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from turboq.codecs.base import stack
from turboq.codecs.distortion_curves import distortion_curve
from turboq.codecs.fit_basis import (
    EMPHASIS,
    RIDGE,
    Basis,
    fit_basis,
    moments,
    sample_weights,
)
from turboq.codecs.measured_costs import excess, measured_costs, remains
from turboq.codecs.observed import Observed
from turboq.codecs.transform import MAX_SEGMENTS, Segments, Transform, unit_table
from turboq.codecs.water_filling import Rates, batched_rates
from turboq.numbers import window, window_gain
from turboq.numbers.codebook_fitting import lloyd

Arrays = dict[str, np.ndarray]

# Bits per channel at which the gains of a head's costs are taken, whatever the budget.
TYPICAL = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformOptions:
    """What `transform` codecs have in common when their segments are still free.

    free_synthesis: least squares on the codes found (`turboq.codecs.fit_synthesis`).

    The last four guard against over-fitting: `emphasis` of the moments (0 counts tokens alike, 1 by
    what they cost), `shrink_mean` towards zero and `shrink` of the covariance towards isotropic
    (0..1), `ridge` added to the metric, as a fraction of its mean eigenvalue.

    Raises:
      ValueError: a guard out of range.
    """

    quantizer: str = "scalar"
    states: int = 8
    free_start: bool = False
    codebook: str = "gaussian"
    gain: str = "none"
    gain_bits: int = 4
    free_synthesis: bool = False
    runs: int = MAX_SEGMENTS
    ridge: float = RIDGE
    shrink: float = 0.0
    shrink_mean: float = 0.0
    emphasis: float = EMPHASIS

    def __post_init__(self):
        for name in ("shrink", "shrink_mean", "emphasis"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 to 1")
        if not self.ridge >= 0:
            raise ValueError(f"{self.ridge=} must be 0 or more")

    @classmethod
    def of(cls, codec: Transform) -> TransformOptions:
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

    @property
    def samples(self) -> bool:
        """Whether a codec's arrays need the sample, beyond its fit."""
        return self.gain == "code" or self.codebook == "fitted"

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
    """One head before its segments are chosen: basis, costs and spreads [D, bits + 1].

    Costs are per token in units of the metric: nats where gradients were observed. `by_text` has
    the mean over the tokens of each text (NaN: none was sampled), `costs` that over all.
    """

    basis: Basis
    costs: Float[np.ndarray, "D b"]
    spreads: Float[np.ndarray, "D b"]
    by_text: Float[np.ndarray, "X D b"]

    def cost(self, segments: Segments) -> Float[np.ndarray, "X"]:
        """Cost per token of these segments, on each text."""
        dim = self.by_text.shape[1]
        return self.by_text[:, np.arange(dim), spent(segments, dim)].sum(axis=1)


def fit_heads(seen: Observed, options: TransformOptions | None = None) -> list[HeadFit]:
    """Joint basis and measured costs of every KV head.

    With gradients costs are nats per token, comparable between heads, layers and sides, and tokens
    count by what an error costs there. Without, tokens count alike.

    Raises:
      TurboqError: moments or the sample are missing, or fewer tokens than dimensions.
    """
    options = options or TransformOptions()
    seen.require(("moments", "sample"), "a transform's fit", fewest=max(8, seen.dim))
    mean, covariance = moments(seen, options.emphasis, shrink_mean=options.shrink_mean)
    weights = sample_weights(seen, options.ridge).astype(np.float32)
    tokens, out = np.bincount(seen.text)[:, None, None], []
    for h in range(seen.heads):  # a head at a time: its sums stay in the processor's cache
        basis = fit_basis(
            mean[h], covariance[h], seen.metric[h], ridge=options.ridge, shrink=options.shrink
        )
        y = basis.analysis.astype(np.float32) @ (seen.x[h] - mean[h].astype(np.float32)).T
        cost = basis.variances[:, None].astype(np.float32) * weights[h]
        if seen.g is not None:
            # What the gradient says of each coordinate by itself is exact but noisy: half and half.
            slope = basis.synthesis.T.astype(np.float32) @ seen.g[h].T
            cost = 0.5 * cost + 0.25 * np.square(slope)
        sums, spreads = measured_costs(y, cost, options.curve, seen.text)
        if options.gain != "none":
            gain = _gains(y, basis.variances, sums.sum(axis=0), options)
            # An error of y / gain is as much smaller.
            sums, spreads = measured_costs(
                y / gain, cost * np.square(gain), options.curve, seen.text
            )
        by_text = np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)
        out.append(HeadFit(basis, sums.sum(axis=0) / y.shape[1], spreads, by_text))
    return out


def _gains(
    y: Float[np.ndarray, "D N"],
    variances: Float[np.ndarray, "D"],
    costs: Float[np.ndarray, "D b"],
    options: TransformOptions,
) -> Float[np.ndarray, "N"]:
    """About the gains that codecs of `TYPICAL` bits per channel would store, float32; none is 0."""
    if options.quantizer == "window" and options.gain == "code":
        low, high, wanted = 0.0, float(costs.max()), TYPICAL * len(costs)
        bits = np.zeros(len(costs), np.int64)
        for _ in range(40):  # the price of a bit at which so many are bought
            price = 0.5 * (low + high)
            bits = np.argmin(costs + price * np.arange(costs.shape[1]), axis=1)
            low, high = (price, high) if bits.sum() > wanted else (low, price)
        segments = tuple((1, int(b)) for b in -np.sort(-bits) if b)
        own, weights = y[: len(segments)].T, variances[: len(segments)].astype(np.float32)
        found = window_gain.best_gain(window.rows(options.states, segments), own, weights)
    else:
        found = np.sqrt(np.mean(np.square(y), axis=0))
    if options.gain == "code":
        gains = fit_gains(found, 2**options.gain_bits)
        found = nearest_gain(gains, found)
    return np.where(found > 0, found, 1.0).astype(np.float32)


def head_rates(fits: list[HeadFit], options: TransformOptions) -> list[Rates]:
    """The best segments of each head at every size; sizes without `options.overhead`."""
    return batched_rates(np.stack([f.costs for f in fits]), runs=options.runs)


def fit_observed(codec: Transform, seen: Observed) -> Arrays:
    """`Codec.fit` of a codec whose segments are given."""
    fits = fit_heads(seen, TransformOptions.of(codec))
    return stack([arrays_of(codec, f, x) for f, x in zip(fits, seen.x, strict=True)])


def held_out_cost(
    fits: list[HeadFit], seen: Observed, bits_per_channel: float, options: TransformOptions
) -> float:
    """Cost per token on the sample of `seen`, all heads, of the best segments at that size.

        sum over heads of E[w e^T M e] / 2 + E[(g . e)^2] / 4,   e = x - x_hat

    nats, with M the metric and w the token weights of `seen`; without gradients E[e^T M e]. Errors
    of a trellis are taken to be those of Lloyd-Max, scaled to its curve; gains are about those
    that are stored.

    Raises:
      ValueError: the size is below the smallest.
    """
    size = int(bits_per_channel * seen.dim + 1e-6) - options.overhead(seen.dim)
    weights = sample_weights(seen, options.ridge)
    more = np.sqrt(excess(options.curve))
    total = 0.0
    for h, (fit, table) in enumerate(zip(fits, head_rates(fits, options), strict=True)):
        bits = spent(table.segments[table.at(size)], seen.dim)
        basis, spreads = fit.basis, fit.spreads[np.arange(seen.dim), bits]
        y = basis.analysis.astype(np.float32) @ (seen.x[h] - basis.mean.astype(np.float32)).T
        gain = np.ones(y.shape[1], np.float32)
        if options.gain != "none":
            gain = _gains(y, basis.variances, fit.costs, options)
        left = remains(y / gain, bits, spreads) * more[bits, None] * gain
        e = (basis.synthesis @ left).T
        quadratic = np.sum((e @ seen.metric[h]) * e, axis=1)
        if seen.g is None:
            total += np.mean(quadratic)
        else:
            slope = np.sum(seen.g[h] * e, axis=1)
            total += 0.5 * np.mean(weights[h] * quadratic) + 0.25 * np.mean(np.square(slope))
    return float(total)


def spent(segments: Segments, dim: int) -> Int[np.ndarray, "D"]:
    """Bits of each coordinate, 0 where it is dropped."""
    bits = np.repeat([b for _, b in segments], [width for width, _ in segments])
    return np.pad(bits, (0, dim - len(bits)))


def arrays_of(codec: Transform, fit: HeadFit, x: Float[np.ndarray, "N D"] | None) -> Arrays:
    """Arrays of one head at these segments; `x` is needed for gains and fitted codebooks."""
    return fit_arrays(codec, fit.basis, x, spreads=fit.spreads)


def fit_arrays(
    codec: Transform,
    basis: Basis,
    samples: Float[np.ndarray, "N D"] | None = None,
    *,
    spreads: Float[np.ndarray, "D b"] | None = None,
) -> Arrays:
    """Arrays of one head, float32. `samples` of x are needed for gains and fitted codebooks.

    `spreads` of `measured_costs` stretch each coordinate by what is best at its bits.

    Raises:
      ValueError: samples are needed and missing.
    """
    coded = codec.coded
    stretch = np.ones(coded)
    if spreads is not None:
        stretch = spreads[np.arange(coded), spent(codec.segments, coded)]
    arrays = {
        "mean": basis.mean,
        "analysis": basis.analysis[:coded] / stretch[:, None],
        "synthesis": basis.synthesis[:, :coded] * stretch,
    }
    if codec.quantizer == "window":
        cost = basis.variances[:coded] * np.square(stretch)
        arrays["weights"] = cost / max(cost.mean(), 1e-300)
    if codec.gain == "code" or codec.codebook == "fitted":
        if samples is None:
            raise ValueError(f"{codec.gain=} and {codec.codebook=} need samples to fit")
        y = (np.asarray(samples, np.float64) - basis.mean) @ arrays["analysis"].T
        if codec.gain == "code":
            best = vector_gains(codec, y, arrays)
            arrays["gains"] = fit_gains(best, 2**codec.gain_bits)
            y = y / nearest_gain(arrays["gains"], best)[:, None]
        if codec.codebook == "fitted":
            arrays |= fit_codebooks(codec, y)
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def vector_gains(
    codec: Transform, y: Float[np.ndarray, "N C"], arrays: Arrays
) -> Float[np.ndarray, "N"]:
    """The gain that suits each vector, before it is one of a few."""
    if codec.quantizer == "window":
        return window_gain.best_gain(codec.rows, y, arrays["weights"])
    return np.sqrt(np.mean(y * y, axis=-1))


def nearest_gain(
    gains: Float[np.ndarray, "G"], best: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """The nearest of ascending gains on a logarithmic scale."""
    return gains[np.searchsorted(np.sqrt(gains[1:] * gains[:-1]), best)]


def fit_gains(best: Float[np.ndarray, "N"], levels: int) -> np.ndarray:
    """Gains [levels], ascending: equal steps of the logarithm from the 0.5 to the 99.9 percentile.

    Room of half a step on the upper side is for text unlike the calibration's.
    """
    best = best[best > 0]
    if not len(best):
        return np.geomspace(0.5, 2.0, levels)
    low, high = np.quantile(best, [0.005, 0.999])
    low, high = min(low, 0.9 * high), high
    return np.geomspace(low, high * (high / low) ** (0.5 / max(levels - 1, 1)), levels)


def fit_codebooks(codec: Transform, u: Float[np.ndarray, "N C"]) -> Arrays:
    """codebook{i} of each segment: Lloyd's iteration from the Gaussian points on coordinates u."""
    books, start = {}, 0
    for i, (width, bits) in enumerate(codec.segments):
        table = unit_table(codec, bits)
        if codec.quantizer == "scalar":
            x = np.sort(u[:, start : start + width].reshape(-1))
            table = lloyd(x, table, 50)
        books[f"codebook{i}"] = table
        start += width
    return books
