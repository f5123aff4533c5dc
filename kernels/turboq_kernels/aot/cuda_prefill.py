"""Compiles the prefill kernels for an H100 on a machine without a GPU or driver: static costs.

    python -m turboq_kernels.aot.cuda_prefill                 # rows of all configurations, as JSON
    python -m turboq_kernels.aot.cuda_prefill bits=3 dim=128  # those that match

As `turboq_kernels.aot.cuda`: instructions of the main loop per element of K and V that a tile of
`rows` query rows reads. Levels "bfloat16" and "float32" are exact tokens, read by the kernel `own`;
its loop holds a branch that a prompt never takes (rows of a tile that see nothing in common).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq_kernels.aot import compilers, cuda
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.cuda import TARGET
from turboq_kernels.aot.cuda import missing as missing

KERNEL, OWN_KERNEL = "turboq_prefill", "turboq_own"
EXACT = {"bfloat16": 16, "float32": 32}  # `levels` of exact tokens, and their bits
BATCH, HEADS = 2, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration(cuda.Configuration):
    """What is compiled: a chunk of `tokens` query tokens of `group` query heads per KV head."""

    group: int = 4
    tokens: int = 512


CONFIGURATIONS = (
    *(Configuration(bits=bits, dim=dim) for dim in (64, 128, 256) for bits in (2, 3, 4)),
    *(Configuration(bits=3, levels="affine", dim=dim) for dim in (64, 128)),
    Configuration(bits=8, levels="int8"),
    Configuration(bits=8, levels="e4m3"),
    *(
        Configuration(bits=bits, levels=levels, dim=dim)
        for levels, bits in EXACT.items()
        for dim in (64, 128, 256)
    ),
)


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS, target=TARGET)
    return compilers.rows("turboq_kernels.aot.cuda_prefill", "cuda", found)


def row(configuration: Configuration, target: str = TARGET) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    from turboq_kernels.prefill import triton

    c = configuration
    if c.levels in EXACT:
        tuned = triton.own_tuning(c.dim, 1 if c.levels == "bfloat16" else 2)
        tile, read = tuned.rows, tuned.entries
    else:
        tuned, tile = triton.tuning(cuda.shapes(c, rows=1)[1])
        read = tuned.tile_rows * 32
    name = OWN_KERNEL if c.levels in EXACT else KERNEL
    cost = cuda.compiled_costs(program(c), target)[name]
    elements = read * 2 * c.dim / (32 * tuned.num_warps)
    return {"target": target, "op": "prefill"} | dataclasses.asdict(c) | {
        "rows": tile,
        "instructions_per_element": round(cost.loop_instructions / elements, 3),
        **cost.columns(),
    }  # fmt: skip


def program(configuration: Configuration) -> Program:
    """`history` over 16 pages of 256 tokens, or `own`."""
    from turboq_kernels.prefill import kernels

    c = configuration
    options: dict[str, Any] = {"scale": c.dim**-0.5, "implementation": "triton"}
    m = c.tokens * c.group
    if c.levels not in EXACT:
        history = functools.partial(kernels.history, **options)
        return Program(history, cuda.shapes(c, rows=m))

    def struct(*shape, dtype: Any = jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    exact = struct(BATCH, HEADS, c.tokens, c.dim, dtype=jnp.dtype(c.levels))
    seen = struct(BATCH, m)
    query = struct(BATCH, HEADS, m, c.dim, dtype=jnp.float32)
    own = functools.partial(kernels.own, **options)
    return Program(own, (query, exact, exact, struct(BATCH, c.tokens), seen, seen))


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
