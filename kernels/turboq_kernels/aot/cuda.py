"""Compiles the decode kernel for an H100 on a machine without a GPU or driver, and counts its cost.

    python -m turboq_kernels.aot.cuda                 # rows of all shipped configurations, as JSON
    python -m turboq_kernels.aot.cuda bits=3 dim=128  # those that match

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version, whose plugin holds XLA's
GPU compiler (`turboq_kernels.aot.compilers` finds them). Costs are static: instructions of the main
loop per element of K and V, registers, bytes of spill. They say nothing about memory stalls; no
time is measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable, topologies
from jax.sharding import AbstractDevice, SingleDeviceSharding

from turboq.codecs.reading import Part, Reading
from turboq_kernels.aot import cards, compilers, cubin
from turboq_kernels.aot.compilers import Program
from turboq_kernels.decode import api, types

TARGET = "sm_90"
DEVICE = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
KERNEL = "turboq_decode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: K and V alike, `group` query heads per KV head, one query token."""

    bits: int
    levels: str = "table"
    dim: int = 128
    group: int = 8


CONFIGURATIONS = (
    *(
        Configuration(bits=bits, dim=dim, group=group)
        for dim in (64, 128, 256)
        for bits in (2, 3, 4)
        for group in (4, 8)
    ),
    Configuration(bits=3, group=16),
    Configuration(bits=8, levels="int8"),
    Configuration(bits=8, levels="e4m3"),
)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return compilers.missing("cuda")


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Costs of the configurations, one by one, compiled in one process.

    Args:
      only: conditions like "bits=3" that a row must all meet.

    Raises:
      RuntimeError: the compiler is missing or failed.
      ValueError: no configuration meets the conditions.
    """
    found = compilers.select(only, CONFIGURATIONS, target=TARGET)
    return compilers.rows("turboq_kernels.aot.cuda", "cuda", found)


def row(configuration: Configuration, target: str = TARGET) -> dict[str, Any]:
    """One row of `experiments/results/kernel_costs.json`."""
    from turboq_kernels.decode import triton

    c = configuration
    rows = max(8, c.group)  # padded: the same kernel for all groups up to 8
    cost = _cost(dataclasses.replace(c, group=rows), target)
    _, k, v, *_ = shapes(c, rows=rows)
    tuned = triton.tuning(k, v, rows)
    elements = tuned.tile_rows * 32 * 2 * c.dim // (32 * tuned.num_warps)
    return {
        "target": target,
        "op": "decode",
        **dataclasses.asdict(c),
        "instructions_per_element": round(cost.loop_instructions / elements, 3),
        **cost.columns(),
    }


def program(c: Configuration) -> Program:
    """`decode` of 8 sequences of 32,768 tokens, in pages of 256."""

    def run(q, k, v, pages, starts, ends):
        return api.decode(q, k, v, pages, starts, ends, scale=c.dim**-0.5, implementation="triton")

    return Program(run, shapes(c, rows=c.group, batch=8, count=128))


@functools.cache
def _cost(c: Configuration, target: str) -> cubin.Cost:
    return compiled_costs(program(c), target)[KERNEL]


def shapes(c: Configuration, *, rows: int, batch: int = 2, heads: int = 8, count: int = 16):
    """Arguments (q, k, v, pages, starts, ends) of `rows` query rows over `count` pages of 256."""
    page = 256

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    total = batch * heads * count
    offset = "offset" if c.levels == "affine" else None
    part = Part(
        field="codes", width=c.dim, bits=c.bits, levels=c.levels, scale="scale", offset=offset
    )
    scales = struct(total, page, dtype=jnp.float16)
    side = types.Side(
        words=(struct(total, c.bits, page // 32, c.dim, dtype=jnp.uint32),),
        scales=(scales,), offsets=(scales if offset else None,),
        tables=(struct(heads, 2**c.bits) if c.levels == "table" else None,),
        reading=Reading(parts=(part,)),
    )  # fmt: skip
    pages = types.Pages(
        table=struct(batch, count, dtype=jnp.int32), stride_page=1, stride_head=count
    )
    seen = struct(batch, rows, dtype=jnp.int32)
    return struct(batch, heads, rows, c.dim), side, side, pages, seen, seen


def compiled_costs(program: Program, target: str = TARGET) -> dict[str, cubin.Cost]:
    """Costs of all GPU functions of a program compiled for a card of `cards`."""
    payload, *_ = serialize_executable.serialize(compile_for(program, target))
    return cubin.costs(payload)


def compile_for(program: Program, target: str = TARGET):
    """The executable for a card of `cards` (which cannot run here)."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=target, topology="1x1x1",
        target_config=cards.config(target),
    )  # fmt: skip
    place = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.arguments
    )
    with compilers.abstractly(cards.device(target)):
        return program.jitted.lower(*args).compile()


def lowered(program: Program) -> str:
    """See `compilers.lowered`."""
    return compilers.lowered(program, "cuda", DEVICE)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
