"""Compiles a whole decode step of one layer for TPU generations that are not here; its launches.

    python -m turboq_kernels.aot.tpu_step                        # rows of all, as JSON
    python -m turboq_kernels.aot.tpu_step target=v5e

As `turboq_kernels.aot.tpu`; the programs are those of `turboq_kernels.aot.step`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from turboq_kernels.aot import compilers, step, tpu
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.step import Configuration
from turboq_kernels.aot.tpu import missing as missing

CONFIGURATIONS = step.configurations("v5e", (*step.CODECS, step.DEFAULT))


def program(c: Configuration) -> Program:
    """By the Mosaic kernels."""
    return step.program(c, "mosaic_tpu")


def row(c: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    return step.row(c, tpu.compile_for(c.target, program(c)))


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.tpu.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.tpu_step", "tpu", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
