"""Does the QJL residual (turboquant_prod) help keys at equal bits, with Gaussian or orthogonal S?

    python experiments/ablations/qjl.py

Keys only (values exact), b - 1 bits and one sign against b bits and against b - 1 bits alone. The
residual stores a second norm: bits per channel are in the table. Expected: it loses to plain
b - 1 bits with Gaussian S and to plain b bits with orthogonal S.
"""

from study import Arm, Bench, run

from turboq.codecs import Exact, TurboQuantMSE, TurboQuantProd
from turboq.plan.rules import sides


def arms(bench: Bench) -> list[Arm]:
    exact = Exact(dim=bench.dim)
    out = [
        bench.arm(
            f"mse {bits}b",
            sides(k=TurboQuantMSE(dim=bench.dim, bits=bits, seed=bench.seed), v=exact),
            group="mse", baseline=None if bits == 4 else f"mse {bits + 1}b",
        )
        for bits in (4, 3, 2)
    ]  # fmt: skip
    for bits in (3, 4):
        for sketch in ("gaussian", "orthogonal"):
            codec = TurboQuantProd(dim=bench.dim, bits=bits, seed=bench.seed, sketch=sketch)
            out.append(
                bench.arm(
                    f"prod {bits - 1}+1b {sketch}", sides(k=codec, v=exact), group=sketch,
                    baseline=f"mse {bits}b",
                )
            )  # fmt: skip
    return out


if __name__ == "__main__":
    run(__file__, __doc__, arms)
