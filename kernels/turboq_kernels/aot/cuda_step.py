"""Compiles a whole decode step of one layer for an H100 on a machine without one; its launches.

    python -m turboq_kernels.aot.cuda_step                        # rows of all, as JSON
    python -m turboq_kernels.aot.cuda_step levels=turboquant_mse

As `turboq_kernels.aot.cuda`; the programs are those of `turboq_kernels.aot.step`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental import serialize_executable

from turboq_kernels.aot import compilers, cubin, cuda, step
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import missing as missing
from turboq_kernels.aot.step import Configuration

CONFIGURATIONS = step.configurations(cuda.TARGET, ("turboquant_mse", "per_head", *step.COLUMNS))


def program(c: Configuration) -> Program:
    """By the Triton kernels."""
    return step.program(c, "triton")


def row(c: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    executable = cuda.compile_for(program(c), c.target)
    payload, *_ = serialize_executable.serialize(executable)
    spills = {
        name: cost.spill_bytes
        for name, cost in sorted(cubin.costs(payload).items()) if name.startswith("turboq_")
    }  # fmt: skip
    return step.row(c, executable) | {"spills": spills}


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.cuda_step", "cuda", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
