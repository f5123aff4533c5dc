"""Where do bits belong: keys or values?

    python experiments/ablations/k_vs_v_bits.py

Splits of the same bytes between K and V, means kept (`turboquant_mse`) and removed (`per_head`).
Expected: K first by a wide margin; less so once the key mean is gone.
"""

from study import Arm, Bench, run

from turboq.codecs import PerHead, TurboQuantMSE
from turboq.plan.rules import sides

SPLITS = ((3, 3), (4, 2), (2, 4), (3, 2), (2, 3))


def arms(bench: Bench) -> list[Arm]:
    out = []
    for label, codec in (("mse", TurboQuantMSE), ("per_head", PerHead)):
        for k_bits, v_bits in SPLITS:
            name = f"{label} K{k_bits} V{v_bits}"
            baseline = {(4, 2): "K3 V3", (2, 4): "K3 V3", (2, 3): "K3 V2"}.get((k_bits, v_bits))
            rule = sides(
                k=codec(dim=bench.dim, bits=k_bits, seed=bench.seed),
                v=codec(dim=bench.dim, bits=v_bits, seed=bench.seed),
            )
            base = None if baseline is None else f"{label} {baseline}"
            out.append(bench.arm(name, rule, group=label, baseline=base))
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
