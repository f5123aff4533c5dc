"""Does each head need bits of its own, or do layers, or the whole model, do with one choice?

    python experiments/ablations/per_head_vs_uniform.py

The plan that `turboq plan --budget` writes at the same all-in bits with one size for all keys and
one for all values ("uniform"), for each layer's K and V ("per_kv"), or for every head: all else is
the default, so heads are stored together and what has its own size is the unit in a head's
place. Expected: each below the one before.
"""

from study import Arm, Bench, run

from turboq.plan.constraints import Granularity

# What chooses its own size, and what that is compared with.
GRANULARITIES: dict[Granularity, Granularity | None] = {
    "uniform": None,
    "per_kv": "uniform",
    "per_head": "per_kv",
}


def arms(bench: Bench) -> list[Arm]:
    return [
        bench.learned(
            f"{bits:g} {granularity}", bits, granularity=granularity, group=f"{bits:g}b",
            baseline=None if base is None else f"{bits:g} {base}",
        )
        for bits in (2.25, 3.25)
        for granularity, base in GRANULARITIES.items()
    ]  # fmt: skip


if __name__ == "__main__":
    run(__file__, __doc__, arms)
