"""How much calibration text is enough, and does its domain matter?

    python experiments/ablations/calibration_size_and_domain.py

`per_head` and `transform` at 3.25 bits per channel, fitted on 1, 2 and 8 windows of Python
documentation or of source code, measured on both domains. Expected: means from one window nearly
suffice; `transform`, which learns a covariance, needs more and loses more across domains.
"""

from study import Arm, Bench, run

from turboq.codecs import PerHead

DOMAINS = ("topics:calibration", "source:calibration")


def arms(bench: Bench) -> list[Arm]:
    codec = PerHead(dim=bench.dim, bits=3, seed=bench.seed)
    out = []
    for domain in DOMAINS:
        short = domain.split(":")[0]
        for windows in (8, 2, 1):
            base = None if (domain, windows) == (DOMAINS[0], 8) else "topics 8"
            out.append(
                bench.arm(
                    f"per_head {short} {windows}", codec, group=f"per_head {short}",
                    baseline=base and f"per_head {base}", texts=(domain,),
                    windows=windows,
                )
            )  # fmt: skip
            plan, arrays = bench.learned(3.25, texts=(domain,), windows=windows)
            out.append(
                Arm(
                    name=f"transform {short} {windows}", plan=plan, arrays=arrays,
                    group=f"transform {short}", baseline=base and f"transform {base}",
                )
            )  # fmt: skip
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
