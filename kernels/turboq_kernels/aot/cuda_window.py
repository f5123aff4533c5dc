"""Compiles the search of window codes for an H100 on a machine without one, and counts its cost.

    python -m turboq_kernels.aot.cuda_window             # rows of all configurations, as JSON
    python -m turboq_kernels.aot.cuda_window states=64   # those that match

As `turboq_kernels.aot.cuda`. `instructions_per_state` are those of all threads for one coordinate
of one gain tried, by the states: two branches, one of which is taken.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.numbers import window, window_gain
from turboq_kernels import columns
from turboq_kernels.aot import compilers, cuda, step
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import TARGET
from turboq_kernels.aot.cuda import missing as missing
from turboq_kernels.encode import triton_window

GAINS = 16
CODES, POOL = "codes", "one pool"
KERNELS = {CODES: "turboq_window", POOL: "turboq_append"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: the codes of one token of 8 sequences, 8 KV heads, or its way into a pool.

    `states` of the code; `cache` "codes" or "one pool" (K and V, sinks and recent tokens).
    """

    target: str = TARGET
    states: int
    dim: int = 128
    cache: str = CODES


CONFIGURATIONS = (
    *(Configuration(states=states) for states in window.MEMORY),
    Configuration(states=64, cache=POOL),
)


def program(c: Configuration) -> Program:
    """The search alone, or `columns.write`."""
    if c.cache == POOL:
        of_step = step.Configuration(target=c.target, levels=step.COLUMNS[0], dim=c.dim)
        (state, words), _ = step.column_arguments(of_step, "triton", states=c.states)
        x = jax.ShapeDtypeStruct((step.BATCH, 1, step.HEADS, c.dim), jnp.bfloat16)

        def write(held, k, v):
            state, words = held
            return columns.write(state, words, k, v, implementation="triton")

        return Program(write, ((state, words), x, x), donated=(0,))

    def struct(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    of_coordinates = struct(step.HEADS, c.dim)
    taps = struct(step.HEADS, c.dim, window.MEMORY[c.states] + 1)
    code = window.Rows(step=of_coordinates, last=of_coordinates, taps=taps)
    y = struct(step.BATCH, step.HEADS, 1, c.dim)
    return Program(triton_window.encode, (code, y, struct(step.HEADS, GAINS), of_coordinates))


def row(configuration: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    c = configuration
    cost = cuda.compiled_costs(program(c), c.target)[KERNELS[c.cache]]
    search = triton_window.search_of(
        window.MEMORY[c.states], window_gain.TRIES, c.dim, interpret=False
    )  # fmt: skip
    searched = search.unrolled * c.states * search.tries
    return {"op": "window"} | dataclasses.asdict(c) | {
        "instructions_per_state": round(
            cost.loop_instructions * 32 * search.warps / searched, 1
        ),
        "instructions": cost.instructions,
        **cost.columns(),
    }  # fmt: skip


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.cuda_window", "cuda", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
