"""Cases of the Pallas-Triton decode kernel, run in interpret mode."""

import dataclasses

import jax.numpy as jnp
import kernel_cases as cases

from turboq_kernels.decode import triton

SMALL = triton.Tuning(tile_rows=2, num_warps=4, num_stages=1, residency=1)


def make(name, *, dim=32, heads=1, **options):
    """A case whose level tables are bfloat16 numbers, which is all that the kernel rounds."""
    case = cases.make(name, dim=dim, heads=heads, **options)

    def rounded(side):
        tables = tuple(
            None if t is None else t.astype(jnp.bfloat16).astype(jnp.float32) for t in side.tables
        )
        return dataclasses.replace(side, tables=tables)

    return case.replace(k=rounded(case.k), v=rounded(case.v))


def run(case, *, tuned=SMALL, splits=1, bias=None, scale=1.0, softcap=None):
    return triton.decode(
        case.q, case.k, case.v, case.pages, case.starts, case.ends,
        **{"bias": bias, "scale": scale, "softcap": softcap} | case.options,
        splits=splits, interpret=True, tuned=tuned,
    )  # fmt: skip
