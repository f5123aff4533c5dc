"""How much calibration text is enough, and does its domain matter?

    python experiments/ablations/calibration_size_and_domain.py

`per_head` and learned plans at 3.25 bits per channel, fitted on 1, 2 and 8 windows of 512 tokens of
Python documentation or of source code, measured on both domains. Expected: means from one window
nearly suffice; learned plans, which fit a covariance, need more and lose more across domains.
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
            first = (domain, windows) == (DOMAINS[0], 8)
            seen = bench.of_text(domain, windows)
            for kind in ("per_head", "learned"):
                name = f"{kind} {short} {windows}"
                base = None if first else f"{kind} topics 8"
                group = f"{kind} {short}"
                out.append(
                    bench.arm(name, codec, statistics=seen, group=group, baseline=base)
                    if kind == "per_head"
                    else bench.learned(name, 3.25, statistics=seen, group=group, baseline=base)
                )
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
