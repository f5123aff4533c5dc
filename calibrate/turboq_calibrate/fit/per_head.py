"""Arrays of `per_head` codecs from statistics: mean, scale and codebook of every KV head."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from turboq.codecs.per_head import PerHead
from turboq.errors import TurboqError
from turboq.numbers.codebook import fit_histogram, lloyd_max
from turboq.numbers.distortion import rule_error
from turboq_calibrate.observe.statistics import CODE_BINS, SideStatistics

MIN_PER_LEVEL = 16  # coordinates per codebook level below which a codebook is noise


def fit_side(side: SideStatistics, codec: PerHead) -> dict[str, np.ndarray]:
    """Arrays of all heads of one side, float32, with a leading head axis.

        mean = E[x];   codebook = argmin_c sum over bins of n (m - nearest_c(m))^2

    Bins are those of y / rms(y) (scale="vector") or of y / scale (scale="head", which also gets
    scale = sqrt(E|x - mean|^2 / D)), y = R (x - mean): n counts and m means of the histogram. A
    head that never varies has scale 0 and the Gaussian codebook.

    Raises:
      TurboqError: the codec's dim or rotation is not that of the statistics, or a head was not seen
        often enough.
    """
    counts, means = _histogram(side, codec)
    _check_enough(counts, codec)
    constant = side.arrays["scale"] == 0
    gaussian = lloyd_max("gaussian", codec.bits)
    books = [
        gaussian if flat else fit_histogram(n, m, 2**codec.bits)
        for n, m, flat in zip(counts, means, constant, strict=True)
    ]
    arrays = {
        "mean": side.arrays["center"].astype(np.float32),
        "codebook": np.stack(books).astype(np.float32),
    }
    if codec.scale == "head":
        arrays["scale"] = side.arrays["scale"].astype(np.float32)
    return arrays


def predicted_distortion(
    side: SideStatistics, codec: PerHead, arrays: dict[str, np.ndarray]
) -> Float[np.ndarray, "K"]:
    """E|x_hat - x|^2 / E|x - mean|^2 of every head on the calibration tokens, from the histograms.

    For scale="head" exact up to the bins; for scale="vector" every vector counts alike
    (E[|x_hat - x|^2 / |x - mean|^2]), and scale rules other than raw use their large-D closed form.
    Zero for a head that never varies.
    """
    counts, means = _histogram(side, codec)
    book = arrays["codebook"].astype(np.float64)
    thresholds = (book[:, 1:] + book[:, :-1]) / 2
    error = np.empty(side.heads)
    for head, (n, m) in enumerate(zip(counts, means, strict=True)):
        nearest = book[head][np.searchsorted(thresholds[head], m)]
        # Values are uniform within a bin, to first order.
        within = CODE_BINS.step**2 * (1 + m * m) / 12
        energy = np.sum(n * m * m)
        d = np.sum(n * ((m - nearest) ** 2 + within)) / energy if energy > 0 else 0.0
        error[head] = rule_error(codec.scale_rule, d) if codec.scale == "vector" else d
    return np.where(side.arrays["scale"] > 0, error, 0.0)


def _histogram(side: SideStatistics, codec: PerHead) -> tuple[np.ndarray, np.ndarray]:
    if codec.dim != side.dim:
        raise TurboqError(f"{codec.dim=} but the statistics have head dim {side.dim}")
    if codec.turn != side.rotation:
        raise TurboqError(
            f"the codec's {codec.turn} is not the statistics' {side.rotation}: capture again with "
            f"that rotation and seed, or use theirs"
        )
    name = codec.scale
    counts, moments = side.arrays[f"{name}_counts"], side.arrays[f"{name}_moments"]
    return counts, CODE_BINS.means(counts, moments)


def _check_enough(counts: np.ndarray, codec: PerHead) -> None:
    seen = counts.sum(axis=1)
    if np.any(seen == 0):
        raise TurboqError(
            f"KV heads {np.flatnonzero(seen == 0).tolist()} were never seen: capture more text"
        )
    needed = MIN_PER_LEVEL * 2**codec.bits
    if seen.min() < needed:
        raise TurboqError(
            f"{seen.min()} coordinates per head are too few for {codec.bits} bits, which need "
            f"{needed}: capture more text or use fewer bits"
        )
