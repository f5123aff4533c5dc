"""Does each head need bits of its own, or do layers, or the whole model, do with one choice?

    python experiments/ablations/per_head_vs_uniform.py

`transform` codecs of one family (trellis, joint basis of every head) at the same all-in bits: the
segments of all keys and all values alike ("uniform"), of the heads of a layer's K or V
("per_layer"), or of every head. Fitted on both calibration domains. Expected: per head below per
layer below uniform, most at few bits.
"""

from study import POLICY, Arm, Bench, run

from turboq_calibrate.fit.learned_plans import GRANULARITIES, learned_plan
from turboq_calibrate.fit.transform import Options, fit_heads

TEXTS = ["topics:calibration", "source:calibration"]
BASELINE = {"per_layer": "uniform", "per_head": "per_layer"}


def arms(bench: Bench) -> list[Arm]:
    samples = bench.gradient_samples(TEXTS, 8)
    options = Options(quantizer="trellis")
    layers = [layer.index for layer in bench.geometry.cache_layers]
    fits = {(i, side): fit_heads(samples[i], side, options) for i in layers for side in ("k", "v")}
    out = []
    for bits in (2.25, 3.25):
        for granularity in GRANULARITIES:
            plan, arrays = learned_plan(
                bench.geometry, fits, options, bits, granularity=granularity, policy=POLICY
            )
            base = BASELINE.get(granularity)
            out.append(
                Arm(
                    name=f"{bits:g} {granularity}", plan=plan, arrays=arrays, group=f"{bits:g}b",
                    baseline=None if base is None else f"{bits:g} {base}",
                )
            )  # fmt: skip
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
