"""What does removing each head's fixed mean buy, for K and for V?

    python experiments/ablations/key_mean.py

3 bits per coordinate, 3.25 bits per channel in every arm; only the mean of `per_head` is switched.
Expected: the key mean earns nearly all of it, the value mean little.
"""

import numpy as np
from study import Arm, Bench, run

from turboq.codecs import PerHead


def arms(bench: Bench) -> list[Arm]:
    codec = PerHead(dim=bench.dim, bits=3, seed=bench.seed)

    def keep(sides: str):
        def change(side: str, array: str, values: np.ndarray) -> np.ndarray:
            return values if array != "mean" or side in sides else np.zeros_like(values)

        return change

    return [
        bench.arm("no mean", codec, change=keep("")),
        bench.arm("K mean", codec, change=keep("k"), baseline="no mean"),
        bench.arm("V mean", codec, change=keep("v"), baseline="no mean"),
        bench.arm("both means", codec, change=keep("kv"), baseline="K mean"),
    ]


if __name__ == "__main__":
    run(__file__, __doc__, arms)
