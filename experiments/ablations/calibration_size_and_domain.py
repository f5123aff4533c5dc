"""How much calibration text is enough, and does its domain matter?

    python experiments/ablations/calibration_size_and_domain.py

`per_head` and `transform` at about 3 bits, fitted on 1, 2, 4 and 8 windows of Python documentation
or of source code, measured on both domains. Expected: means from one window nearly suffice;
`transform`, which learns a covariance, needs more and loses more across domains.
"""

from study import Arm, Bench, run

from turboq.codecs import PerHead

DOMAINS = ("topics:calibration", "source:calibration")


def arms(bench: Bench) -> list[Arm]:
    codec = PerHead(dim=bench.dim, bits=3, seed=bench.seed)
    out, base = [], "per_head topics 8"
    for domain in DOMAINS:
        for windows in (8, 4, 2, 1):
            name = f"per_head {domain.split(':')[0]} {windows}"
            out.append(
                bench.arm(
                    name, codec, group=domain, baseline=None if name == base else base,
                    text=domain, windows=windows,
                )
            )  # fmt: skip
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
