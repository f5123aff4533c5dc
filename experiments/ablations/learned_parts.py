"""Which part of a learned plan earns what? One switch each, at 2.25 and 3.25 bits.

    python experiments/ablations/learned_parts.py --length=1024 --windows=2 --text=topics:heldout \\
        --text=novel.txt

The plan that `turboq plan --budget` writes by default (keys before RoPE, window codes of 64 states,
a stored gain of 4 bits, Fisher-weighted, bits per head), and the same with one thing changed.
Without gradients keys are weighed by the queries that read them, values and tokens alike, and bits
are shared by the squared errors of logits and values: once per head, once in one size for all keys
and one for all values. "free M" regresses what bits stand for on the codes found, head by head,
where unseen calibration text agrees.
Expected: keys after RoPE and no gradients far worst, bits per head next, the gain least.
"""

import dataclasses

import numpy as np
from absl import flags
from study import Arm, Bench, run

from turboq.codecs.observed import Observed
from turboq_calibrate.choose.plan_within import LEARNED
from turboq_calibrate.observe.layer_statistics import LayerStatistics
from turboq_calibrate.observe.statistics_files import Statistics

BITS = flags.DEFINE_multi_float("bits", [2.25, 3.25], "Bits per channel of the plans compared.")

NO_GAIN = dataclasses.replace(LEARNED, gain="none")
FREE = dataclasses.replace(LEARNED, free_synthesis=True)
# What is changed of `Wanted`; the baseline has nothing changed.
SWITCHES: dict[str, dict] = {
    "keys after RoPE": {"k_rope": "after"},
    "keys block:64": {"k_rope": "block:64"},
    "keys block:256": {"k_rope": "block:256"},
    "scalar codes": {"candidates": ("transform",)},
    "trellis codes": {"candidates": ("trellis",)},
    "no stored gain": {"options": NO_GAIN},
    "free M": {"options": FREE},
}


class WithoutGradients(Statistics):
    """The same tokens, of which no gradient is known."""

    def __init__(self, seen: Statistics):
        super().__init__(seen.folder, seen.manifest)
        self.seen = seen

    def __getitem__(self, index: int) -> LayerStatistics:
        layer = self.seen[index]
        return _Layer(**{x.name: getattr(layer, x.name) for x in dataclasses.fields(layer)})


class _Layer(LayerStatistics):
    def observed(self, side, rope="after") -> Observed:
        seen = super().observed(side, rope)
        eye = np.broadcast_to(np.eye(seen.dim), seen.metric.shape)
        metric = eye if seen.queries is None else seen.queries
        return dataclasses.replace(
            seen, g=None, metric=metric, weighted_mean=seen.mean,
            weighted_covariance=seen.covariance,
        )  # fmt: skip


def arms(bench: Bench) -> list[Arm]:
    blind = WithoutGradients(bench.statistics)
    out = []
    for bits in BITS.value:
        group, base = f"{bits:g}b", f"{bits:g} learned"
        uniform = f"{bits:g} one size for K, one for V"
        out += [
            bench.learned(base, bits, group=group),
            bench.learned(f"{bits:g} one size per layer's K or V", bits, granularity="per_kv",
                          group=group, baseline=base),
            bench.learned(uniform, bits, granularity="uniform", group=group, baseline=base),
            bench.learned(f"{bits:g} no gradients", bits, statistics=blind, group=group,
                          baseline=base),
            bench.learned(f"{bits:g} no gradients, one size", bits, statistics=blind,
                          granularity="uniform", group=group, baseline=uniform),
        ]  # fmt: skip
        out += [
            bench.learned(f"{bits:g} {name}", bits, group=group, baseline=base, **switch)
            for name, switch in SWITCHES.items()
        ]
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
