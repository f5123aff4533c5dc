"""Where should codebooks come from: the Gaussian, the sphere, the head's own data, another domain?

    python experiments/ablations/codebook_source.py

`per_head` with its mean removed at 2 and 3 bits; only the codebook is replaced. "other domain" is
fitted on source code instead of the default calibration text (means stay). Expected: no difference
beyond the noise, because rotated, centred coordinates are nearly Gaussian.
"""

import functools

import numpy as np
from study import Arm, Bench, run

from turboq.codecs import PerHead
from turboq.numbers.codebook import lloyd_max


def arms(bench: Bench) -> list[Arm]:
    out, elsewhere = [], bench.of_text("source:calibration", 8)
    for bits in (2, 3):
        codec = PerHead(dim=bench.dim, bits=bits, seed=bench.seed)

        def fixed(source: str, bits: int, side: str, array: str, values: np.ndarray):
            if array != "codebook":
                return values
            book = lloyd_max(source, bits, bench.dim if source == "sphere" else None)
            return np.broadcast_to(book.astype(np.float32), values.shape).copy()

        base = f"{bits}b gaussian"
        for source in ("gaussian", "sphere"):
            change = functools.partial(fixed, source, bits)
            baseline = None if source == "gaussian" else base
            out.append(
                bench.arm(f"{bits}b {source}", codec, change=change, group=f"{bits}b",
                          baseline=baseline)
            )  # fmt: skip
        own = bench.arm(f"{bits}b own data", codec, group=f"{bits}b", baseline=base)
        other = bench.arm("other", codec, statistics=elsewhere)
        mixed = {n: (other.arrays if n.endswith("codebook") else own.arrays)[n] for n in own.arrays}
        name = f"{bits}b other domain"
        out += [
            own,
            Arm(name=name, plan=own.plan, arrays=mixed, group=f"{bits}b", baseline=base),
        ]
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
