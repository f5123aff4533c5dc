"""Compiles the column kernel for an H100 on a machine without one, and counts its cost.

    python -m turboq_kernels.aot.cuda_columns          # rows of all configurations, as JSON
    python -m turboq_kernels.aot.cuda_columns bits=3   # those that match

As `turboq_kernels.aot.cuda`; configurations are those of `turboq_kernels.aot.tpu_columns`, their
heads of equal bits: the widest head's lanes decide what a program does for every head.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from turboq.numbers.packing import PAGE
from turboq_kernels.aot import compilers, cuda
from turboq_kernels.aot import tpu_columns as shared
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import TARGET
from turboq_kernels.aot.cuda import missing as missing
from turboq_kernels.aot.tpu_columns import Configuration
from turboq_kernels.columns import triton

KERNEL = "turboq_columns"
CONFIGURATIONS = (
    *(Configuration(target=TARGET, bits=bits) for bits in (2, 3)),
    Configuration(target=TARGET, bits=3, cache="after"),
    Configuration(target=TARGET, bits=3, group=8),
    Configuration(target=TARGET, bits=2, joined=2),
)


def program(c: Configuration) -> Program:
    """A call over a layer."""

    def run(*shapes):
        return triton.attend(*shapes, scale=c.dim**-0.5, softcap=None)

    return Program(run, shared.arguments(c))


def row(configuration: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    c = configuration
    cost = cuda.compiled_costs(program(c), c.target)[KERNEL]
    tuned = triton.APART if c.joined == 1 else triton.JOINED
    elements = c.joined * PAGE * 2 * c.dim // (32 * tuned.num_warps)
    return {"op": "columns"} | dataclasses.asdict(c) | {
        "instructions_per_element": round(cost.loop_instructions / elements, 3),
        **cost.columns(),
    }  # fmt: skip


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Costs of the configurations, one by one, compiled in one process.

    Args:
      only: conditions like "bits=3" that a row must all meet.

    Raises:
      RuntimeError: the compiler is missing or failed.
      ValueError: no configuration meets the conditions.
    """
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.cuda_columns", "cuda", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
