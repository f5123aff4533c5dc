"""Against over-fitting: how far learned transforms are pulled towards something safe.

A basis that is fitted to one kind of text drops directions that another needs. So every strength
of shrinkage is tried the way it will be used: fitted to all calibration texts but one, its cost
measured on the one left out, summed over texts, sides and some layers. The strongest within
`TOLERANCE` of the least total wins: text of a new kind is further away than the texts are from each
other, and near the optimum the cost is flat (Breiman et al. 1984, the one-standard-error rule).

Not asked where the model's own text is among the texts: what half of two texts cannot say of the
other half is then no measure of unseen text (LOG, 2026-11-29).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from turboq.codecs.fit_transform import TransformOptions, fit_heads, held_out_cost
from turboq.codecs.observed import Observed, subset
from turboq.plan.build import Side
from turboq_calibrate.run.progress import Progress

SHRINK = (0.0, 0.2, 0.4, 0.6)  # of the covariance towards an isotropic one
LAYERS = 6  # that are tried, evenly spread
TOLERANCE = 0.05  # of the least cost
TOKENS = 1024  # sampled tokens of each text that are used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded:
    """The options that were chosen, and what every strength cost on texts left out (nats)."""

    options: TransformOptions
    held_out: dict[float, float]


def guard(
    observed: Callable[[int, Side], Observed],
    layers: Sequence[int],
    options: TransformOptions,
    bits_per_channel: float,
    *,
    strengths: Sequence[float] = SHRINK,
    progress: bool = False,
) -> Guarded:
    """`options` with the strongest shrinkage that costs about the least on texts left out.

    With one text there is nothing to leave out: the options stay as they are.
    """
    few = [layers[i * len(layers) // LAYERS] for i in range(LAYERS)] if layers else []
    few = list(dict.fromkeys(few))
    totals = dict.fromkeys(strengths, 0.0)
    tried = False
    with Progress(2 * len(few), label="guard", unit="sides", enabled=progress) as bar:
        for layer in few:
            for side in ("k", "v"):
                for rest, left_out in _splits(observed(layer, side)):
                    tried = True
                    for shrink in strengths:
                        own = dataclasses.replace(options, shrink=shrink)
                        fits = fit_heads(rest, own)
                        totals[shrink] += held_out_cost(fits, left_out, bits_per_channel, own)
                bar.advance(1)
    if not tried:
        return Guarded(options=options, held_out={})
    least = min(totals.values())
    best = max(s for s, total in totals.items() if total <= (1 + TOLERANCE) * least)
    return Guarded(options=dataclasses.replace(options, shrink=best), held_out=totals)


def _splits(seen: Observed):
    """(all texts but one, that one), for every text; few tokens of each."""
    texts = np.unique(seen.text)
    if len(texts) < 2:
        return
    few = np.zeros(len(seen.text), bool)
    for text in texts:
        own = np.flatnonzero(seen.text == text)
        few[own[np.arange(min(TOKENS, len(own))) * len(own) // min(TOKENS, len(own))]] = True
    for text in texts:
        yield subset(seen, few & (seen.text != text)), subset(seen, few & (seen.text == text))
