"""Compiles the kernel that decodes keys for an H100 on a machine without one, and counts its cost.

    python -m turboq_kernels.aot.cuda_decoded                # rows of all configurations, as JSON
    python -m turboq_kernels.aot.cuda_decoded cache=before   # those that match

As `turboq_kernels.aot.cuda_columns`; `cache` is "before" (keys before RoPE) or positions of a
block.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.cache.layer import KVLayer, TokenPolicy
from turboq.numbers.rope import Rope
from turboq_kernels.aot import compilers, cuda
from turboq_kernels.aot import tpu_columns as shared
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import TARGET
from turboq_kernels.aot.cuda import missing as missing
from turboq_kernels.aot.tpu_columns import BATCH, HEADS, Configuration
from turboq_kernels.columns import triton, triton_decoded

KERNEL = "turboq_logits"
CONFIGURATIONS = (
    Configuration(target=TARGET, bits=2, cache="before", joined=2),
    Configuration(target=TARGET, bits=2, cache="64", joined=2),
    Configuration(target=TARGET, bits=2, cache="before", joined=2, group=8),
    *(Configuration(target=TARGET, bits=3, cache="before", dim=dim) for dim in (64, 128)),
)


def program(c: Configuration) -> Program:
    """The logits of a layer, and what their kernel takes."""
    block = 1 if c.cache == "before" else int(c.cache)
    rope = Rope(dim=c.dim, theta=1e4)
    layer = KVLayer(groups=(), policy=TokenPolicy(), rope=rope, rope_block=block)
    shapes = shared.arguments(dataclasses.replace(c, cache=str(block)))
    words, made, starts, ends = shapes[1:5]
    rows = jax.ShapeDtypeStruct((BATCH, HEADS * c.group * c.tokens, c.dim), jnp.float32)
    own = jax.eval_shape(
        lambda made: triton_decoded.prepare(made, rope, pool_lanes=words.shape[-1]), made
    )

    def run(rows, words, made, starts, ends):
        return triton_decoded.logits(rows, words, made, layer, None, starts, ends)

    return Program(run, (rows, words, dataclasses.replace(made, decoded=own), starts, ends))


def row(configuration: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`: all a program does, for K alone."""
    c = configuration
    cost = cuda.compiled_costs(program(c), c.target)[KERNEL]
    run = (triton.APART if c.joined == 1 else triton.JOINED).run
    units = 1 if c.joined == 1 else 2 * c.joined
    steps = units * -(-c.bits * c.dim // run)
    instructions = cost.instructions + (steps - 1) * cost.loop_instructions
    elements = triton_decoded.TILE * c.dim // (32 * triton_decoded.WARPS)
    return {"op": "logits"} | dataclasses.asdict(c) | {
        "instructions_per_element": round(instructions / elements, 3),
        "loop_instructions": cost.loop_instructions, "loop_lanes": run, **cost.columns(),
    }  # fmt: skip


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda_columns.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.cuda_decoded", "cuda", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
