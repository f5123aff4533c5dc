"""Which rotation: none, Walsh without signs, Hadamard with random signs, or Haar?

    python experiments/ablations/rotation_kinds.py

3 bits with and without the head's mean removed (`per_head` with the Gaussian-like fitted codebook,
`turboquant_mse` with the sphere's). Expected: no rotation far worst, signs matter where the mean
stays, Haar and signed Hadamard equal.
"""

from study import Arm, Bench, run

from turboq.codecs import PerHead, TurboQuantMSE

KINDS = ("hadamard", "identity", "walsh", "haar")


def arms(bench: Bench) -> list[Arm]:
    out = []
    for label, codec in (("mean kept", TurboQuantMSE), ("mean removed", PerHead)):
        for kind in KINDS:
            out.append(
                bench.arm(
                    f"{label}, {kind}",
                    codec(dim=bench.dim, bits=3, seed=bench.seed, rotation=kind),
                    group=label,
                    baseline=None if kind == "hadamard" else f"{label}, hadamard",
                )
            )
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
