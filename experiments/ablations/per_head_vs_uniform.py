"""Does each head need bits of its own, or do layers, or the whole model, do with one choice?

    python experiments/ablations/per_head_vs_uniform.py

`transform` codecs of one family (trellis, joint basis of every head) at the same all-in bits: one
size for all keys and one for all values ("uniform"), for each layer's K and V ("per_kv"), or for
every head. Fitted on both calibration domains. Expected: per head below per layer below uniform,
most at few bits.
"""

from study import Arm, Bench, run

from turboq.plan.constraints import Granularity

TEXTS = ("topics:calibration", "source:calibration")
# What chooses its own size, and what that is compared with.
GRANULARITIES: dict[Granularity, Granularity | None] = {
    "uniform": None,
    "per_kv": "uniform",
    "per_head": "per_kv",
}


def arms(bench: Bench) -> list[Arm]:
    out = []
    for bits in (2.25, 3.25):
        for granularity, base in GRANULARITIES.items():
            plan, arrays = bench.learned(bits, granularity=granularity, texts=TEXTS)
            out.append(
                Arm(
                    name=f"{bits:g} {granularity}", plan=plan, arrays=arrays, group=f"{bits:g}b",
                    baseline=None if base is None else f"{bits:g} {base}",
                )
            )  # fmt: skip
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
