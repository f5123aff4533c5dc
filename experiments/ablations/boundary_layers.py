"""Do the first and last layers deserve more bits, at equal bytes?

    python experiments/ablations/boundary_layers.py

Four layers at 5 bits, paid for by eight layers (evenly spread over the rest) at 2, the others at 3:
exactly the bytes of 3 bits everywhere. The four are the first and last two (vLLM's rule), the first
four, the last four or four in the middle. Expected: no rule of thumb; layers must be measured.
"""

import numpy as np
from study import Arm, Bench, run

from turboq.codecs import PerHead
from turboq.errors import TurboqError


def arms(bench: Bench) -> list[Arm]:
    layers = [layer.index for layer in bench.geometry.cache_layers]
    count = len(layers)
    if count < 12:
        raise TurboqError(f"{bench.geometry.name} has {count} layers: this study needs 12")
    codec = {b: PerHead(dim=bench.dim, bits=b, seed=bench.seed) for b in (2, 3, 5)}
    middle = count // 2
    rich = {
        "first and last two": [*layers[:2], *layers[-2:]],
        "first four": layers[:4],
        "last four": layers[-4:],
        "middle four": layers[middle - 2 : middle + 2],
    }
    base = "3b everywhere"
    out = [bench.arm(base, codec[3])]
    for name, chosen in rich.items():
        rest = [i for i in layers if i not in chosen]
        poor = {rest[int(i)] for i in np.linspace(0, len(rest) - 1, 8).round()}
        bits = {i: 5 if i in chosen else 2 if i in poor else 3 for i in layers}

        def rule(layer: int, side: str, head: int, bits=bits):
            return codec[bits[layer]]

        out.append(bench.arm(f"5b {name}", rule, baseline=base))
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
