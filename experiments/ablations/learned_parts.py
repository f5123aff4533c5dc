"""Which part of a learned plan earns what? One switch each, at 2.25 and 3.25 bits.

    python experiments/ablations/learned_parts.py --windows=3 --text=topics:heldout --text=novel.txt

The plan that `turboq plan --budget` writes by default (heads stored together, keys before RoPE,
window codes of 64 states, a stored gain of 4 bits, Fisher-weighted, bits per unit), and the same
with one thing changed. Keys after RoPE and plans without gradients store heads apart: they are
compared with heads apart. Without gradients keys are weighed by the queries that read them, values
and tokens alike, and bits are shared by the squared errors of logits and values. "free M" regresses
what bits stand for on the codes found, unit by unit, where unseen calibration text agrees.
Expected: keys after RoPE worst, heads apart and one size for all next, the gain least.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import flags
from study import Arm, Bench, run

from turboq.codecs.observed import Observed
from turboq_calibrate.choose.plan_within import LEARNED
from turboq_calibrate.observe.layer_statistics import LayerStatistics
from turboq_calibrate.observe.statistics_files import Statistics

BUDGETS = (2.25, 3.25)
BITS = flags.DEFINE_multi_float("bits", BUDGETS, "Bits per channel of the plans compared.")

NO_GAIN = dataclasses.replace(LEARNED, gain="none")
FREE = dataclasses.replace(LEARNED, free_synthesis=True)
# What is changed of `Wanted`; the baseline has nothing changed.
SWITCHES: dict[str, dict] = {
    "one size per layer's K or V": {"granularity": "per_kv"},
    "one size for K, one for V": {"granularity": "uniform"},
    "heads apart": {"joint": 0},
    "keys block:16": {"k_rope": "block:16"},
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


def arms(bench: Bench, budgets: Sequence[float] = BUDGETS) -> list[Arm]:
    blind = WithoutGradients(bench.statistics)
    out = []
    for bits in budgets:
        group, base = f"{bits:g}b", f"{bits:g} learned"
        apart = {"group": group, "baseline": f"{bits:g} heads apart", "joint": 0}
        out.append(bench.learned(base, bits, group=group))
        out += [
            bench.learned(f"{bits:g} {name}", bits, group=group, baseline=base, **switch)
            for name, switch in SWITCHES.items()
        ]
        out += [
            bench.learned(f"{bits:g} heads apart, keys after RoPE", bits, k_rope="after", **apart),
            bench.learned(f"{bits:g} heads apart, no gradients", bits, statistics=blind, **apart),
        ]
    return out


if __name__ == "__main__":
    run(__file__, __doc__, lambda bench: arms(bench, BITS.value))
