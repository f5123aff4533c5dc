"""Which rule for the stored scale: raw, matched norm, unbiased or least squares?

    python experiments/ablations/scale_rules.py

`turboquant_mse` at 2, 3 and 4 bits, equal bytes within a bit width. Expected: below the noise at
4 bits; at 2 bits `matched` and `unbiased` differ from `raw` by what D and D / (1 - D) say.
"""

from study import Arm, Bench, run

from turboq.codecs import TurboQuantMSE
from turboq.numbers.scale import RULES


def arms(bench: Bench) -> list[Arm]:
    return [
        bench.arm(
            f"{bits}b {rule}",
            TurboQuantMSE(dim=bench.dim, bits=bits, seed=bench.seed, scale_rule=rule),
            group=f"{bits}b",
            baseline=None if rule == "raw" else f"{bits}b raw",
        )
        for bits in (2, 3, 4)
        for rule in RULES
    ]


if __name__ == "__main__":
    run(__file__, __doc__, arms)
