"""Compiles the prefill kernels for TPU generations on a machine without one; reads their schedules.

    python -m turboq_kernels.aot.tpu_prefill                      # rows of all configurations
    python -m turboq_kernels.aot.tpu_prefill target=v5e bits=3    # those that match

As `turboq_kernels.aot.tpu`, for a tile of query rows of one KV head. Levels "bfloat16" are exact
tokens, read by the kernel `own`; its bundles are those of one step of the grid.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.numbers.packing import PAGE
from turboq_kernels.aot import compilers, tpu
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.tpu import Configuration
from turboq_kernels.aot.tpu import missing as missing
from turboq_kernels.decode.types import Side
from turboq_kernels.prefill import mosaic_tpu, mosaic_tpu_own, mosaic_tpu_softmax

EXACT = "bfloat16"  # `levels` of exact tokens
TOKENS = 512  # query tokens of the chunk


def _at(target: str, bits: int, levels: str, **changes) -> Configuration:
    usual = Configuration(target=target, bits=bits, levels=levels, dim=128, group=4, tokens=TOKENS)
    return dataclasses.replace(usual, **changes)


CONFIGURATIONS = (
    *(_at(target, bits, "symmetric") for target in ("v5e", "v6e") for bits in (3, 2, 4)),
    _at("v5e", 3, "table"),
    _at("v5e", 3, "symmetric", cache="paged"),
    *(_at(target, 16, EXACT) for target in ("v5e", "v6e")),
)


def program(configuration: Configuration, pool: int | None = None) -> Program:
    """`history`, or `own` for exact tokens.

    Raises:
      ValueError: the kernel does not support the case.
    """
    c = configuration
    if c.levels == EXACT:
        batch, heads, rows = 8, 8, c.group * c.tokens

        def struct(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        keys = struct(batch, heads, c.tokens, c.dim, dtype=EXACT)
        seen = struct(batch, rows)
        shapes = (
            struct(batch, heads, rows, c.dim, dtype="float32"), keys, keys,
            struct(batch, c.tokens), seen, seen,
        )  # fmt: skip

        def own(*args):
            return mosaic_tpu.own(*args, scale=c.dim**-0.5, softcap=None)

        return Program(own, shapes)
    shapes = arguments(c, pool)
    reason = mosaic_tpu.unsupported(*shapes[:4])
    if reason is not None:
        raise ValueError(f"{c}: {reason}")

    def history(*args):
        return mosaic_tpu.history(*args, bias=None, scale=c.dim**-0.5, softcap=None)

    return Program(history, shapes)


def arguments(configuration: Configuration, pool: int | None = None) -> tuple[Any, ...]:
    """Shapes of a call of `history`: `aot.tpu.arguments`, parts knowing that they are symmetric."""
    q, k, v, *rest = tpu.arguments(configuration, pool)
    return q, *(_told(side, configuration.levels == "symmetric") for side in (k, v)), *rest


def _told(side: Side, symmetric: bool) -> Side:
    parts = tuple(dataclasses.replace(p, symmetric=symmetric) for p in side.reading.parts)
    return dataclasses.replace(side, reading=dataclasses.replace(side.reading, parts=parts))


def row(configuration: Configuration, dump: pathlib.Path) -> dict[str, Any]:
    """One row; `dump` is the empty folder the compiler writes its schedule to."""
    c = configuration
    analysis = tpu.compile_for(c.target, program(c)).memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler reports no memory analysis")
    if c.levels == EXACT:
        cost = tpu.read_cost(dump, "turboq_own")
        tokens, vmem = min(mosaic_tpu_own.STEP, c.tokens), cost.vmem_bytes
    else:
        cost = tpu.read_cost(dump, "turboq_prefill")
        spec, _ = mosaic_tpu.specify(*arguments(c)[:4])
        # With the windows of the operands, which the compiler may allocate outside the kernel.
        tokens, vmem = spec.step.tokens, max(mosaic_tpu.vmem_bytes(spec), cost.vmem_bytes)
    return {"op": "prefill"} | dataclasses.asdict(c) | {
        "bundles_per_256_tokens": round(cost.loop_bundles * PAGE / tokens, 1),
        "rows": mosaic_tpu_softmax.tiling(c.group * c.tokens).tile,
        "loop_bundles": cost.loop_bundles,
        "loop_tokens": tokens,
        "slots_used": cost.busy,
        "vmem_bytes": vmem,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }  # fmt: skip


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.tpu.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.tpu_prefill", "tpu", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, row, rows)
