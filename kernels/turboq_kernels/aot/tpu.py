"""Compiles the decode kernel for TPU generations on a machine without one, and reads its schedule.

    python -m turboq_kernels.aot.tpu                      # rows of all configurations, as JSON
    python -m turboq_kernels.aot.tpu target=v5e bits=3    # those that match

Needs libtpu (`turboq_kernels.aot.compilers` finds it); the compiler inside needs no chip. The cost
is the number of VLIW bundles of the main loop in the final schedule, per 256 tokens of one KV head:
K, softmax, V and the start of all copies. A bundle issues in one cycle if nothing stalls; stalls
(memory, results not ready) are not in the schedule. No time is measured here.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, SingleDeviceSharding

from turboq.codecs.reading import Part, Reading
from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.aot import compilers
from turboq_kernels.aot.compilers import Program
from turboq_kernels.decode import mosaic_tpu, types

KERNEL = "turboq_decode"
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# Name and cores of their devices.
DEVICES = {
    "v4": ("TPU v4", 1),
    "v5e": ("TPU v5 lite", 1),
    "v5p": ("TPU v5", 2),
    "v6e": ("TPU v6 lite", 1),
    "tpu7x": ("TPU7x", 1),
}
INTEGER_UNIT = ("v5e", "v5p", "v6e")  # the others multiply bfloat16 and fp8 only
MIB = 2**20
# What one core has (jax's pltpu.get_tpu_info; exceeding it is a compile error).
VMEM_LIMIT = {
    "v4": 16 * MIB,
    "v5e": 128 * MIB,
    "v5p": 64 * MIB,
    "v6e": 128 * MIB,
    "tpu7x": 64 * MIB,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: K and V alike, pages of 256 tokens, long sequences.

    `levels` are those of `turboq.codecs.reading`, or "symmetric" for a table with
    level(~code) = -level(code). `tokens` query tokens of `group` heads share one pass.
    """

    target: str
    bits: int
    levels: str
    dim: int
    group: int
    tokens: int = 1
    cache: str = "contiguous"  # or "paged": a page table of any order

    def __post_init__(self):
        if self.target not in TOPOLOGIES:
            raise ValueError(f"{self.target=} must be one of {tuple(TOPOLOGIES)}")
        if self.cache not in ("contiguous", "paged"):
            raise ValueError(f"{self.cache=} must be 'contiguous' or 'paged'")


def _at(target: str, bits: int, levels: str, **changes) -> Configuration:
    usual = Configuration(target=target, bits=bits, levels=levels, dim=128, group=8)
    return dataclasses.replace(usual, **changes)


CONFIGURATIONS = (
    *(_at("v5e", bits, "symmetric") for bits in (3, 2, 4)),
    *(_at("v5e", bits, "table") for bits in (3, 2)),
    _at("v5e", 3, "affine"),
    _at("v5e", 3, "symmetric", cache="paged"),
    _at("v5e", 3, "symmetric", tokens=2),
    _at("v5e", 3, "symmetric", dim=64),
    _at("v5e", 3, "symmetric", dim=256),
    _at("v5e", 8, "int8"),
    *(_at(target, 3, "symmetric") for target in ("v6e", "v5p", "v4", "tpu7x")),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the final schedule says.

    `vmem_bytes` are the kernel's own, without windows of operands; `busy` is, for each kind of
    slot, the part of the loop's issue slots that are used. `nested_bundles` of the loop lie in
    loops inside it.
    """

    loop_bundles: int
    vmem_bytes: int
    busy: dict[str, float]
    nested_bundles: int = 0


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return compilers.missing("tpu")


def arguments(configuration: Configuration, pool: int | None = None) -> tuple[Any, ...]:
    """Shapes of a decode call: 8 sequences of 128 Ki tokens, 8 KV heads.

    Args:
      pool: head-pages that exist, by default as many as the table names. The kernel is the same
        for any number; what XLA does around it compiles several times faster for a few.
    """
    c, batch, heads, count = configuration, 8, 8, 512
    levels = "table" if c.levels == "symmetric" else c.levels

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    total = pool or batch * heads * count
    part = Part(
        field="codes", width=c.dim, bits=c.bits, levels=levels, scale="scale",
        offset="offset" if levels == "affine" else None,
    )  # fmt: skip
    row = struct(total, PAGE, dtype=jnp.float16)
    side = types.Side(
        words=(struct(total, c.bits, ROWS, c.dim, dtype=jnp.uint32),),
        scales=(row,), offsets=(row if levels == "affine" else None,),
        tables=(struct(heads, 2**c.bits) if levels == "table" else None,),
        reading=Reading(parts=(part,)),
    )  # fmt: skip
    contiguous = c.cache == "contiguous"
    pages = types.Pages(
        table=struct(batch, count, dtype=jnp.int32),
        stride_page=1 if contiguous else heads,
        stride_head=count if contiguous else 1,
        contiguous=contiguous,
    )
    rows = c.group * c.tokens
    seen = struct(batch, rows, dtype=jnp.int32)
    return struct(batch, heads, rows, c.dim), side, side, pages, seen, seen


def program(configuration: Configuration, pool: int | None = None, **options) -> Program:
    """A decode call.

    Args:
      options: of the kernel.

    Raises:
      ValueError: the kernel does not support the case.
    """
    shapes = arguments(configuration, pool)
    reason = mosaic_tpu.unsupported(*shapes[:4])
    if reason is not None:
        raise ValueError(f"{configuration}: {reason}")
    symmetric = configuration.levels == "symmetric"

    def run(q, k, v, pages, starts, ends):
        return mosaic_tpu.decode(
            q, k, v, pages, starts, ends, bias=None, scale=configuration.dim**-0.5,
            softcap=None, splits=None, symmetric=symmetric, **options,
        )  # fmt: skip

    return Program(run, shapes)


def compile_for(target: str, program: Program):
    """The executable for a generation (which cannot run here).

    Raises:
      ValueError: an unknown target. Whatever the compiler raises.
    """
    chip = device(target)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target])
    place = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.arguments
    )
    with compilers.abstractly(chip):
        return program.jitted.lower(*args).compile()


def lowered(target: str, program: Program) -> str:
    """See `compilers.lowered`."""
    return compilers.lowered(program, "tpu", device(target))


def device(target: str) -> AbstractDevice:
    """The chip that programs are traced for.

    Raises:
      ValueError: none of `TOPOLOGIES`.
    """
    if target not in DEVICES:
        raise ValueError(f"{target=} must be one of {tuple(DEVICES)}")
    kind, cores = DEVICES[target]
    return AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")


def row(configuration: Configuration, dump: pathlib.Path) -> dict[str, Any]:
    """One row; `dump` is the empty folder the compiler writes its schedule to."""
    executable = compile_for(configuration.target, program(configuration))
    shapes = arguments(configuration)
    cost = read_cost(dump)
    q, k, v, pages, *_ = shapes
    spec, _ = mosaic_tpu.specify(
        q, k, v, pages,
        int8=configuration.target in INTEGER_UNIT, symmetric=configuration.levels == "symmetric",
    )  # fmt: skip
    given = sum(
        x.size * x.dtype.itemsize
        for side in (k, v)
        for x in (*side.words, *side.scales, *side.offsets)
        if x is not None
    )
    analysis = executable.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler reports no memory analysis")
    named = dataclasses.asdict(configuration)
    return {"op": "decode"} | named | {
        "bundles_per_256_tokens": round(cost.loop_bundles * PAGE / spec.step.tokens, 1),
        "loop_bundles": cost.loop_bundles,
        "loop_tokens": spec.step.tokens,
        "slots_used": cost.busy,
        # With the windows of the operands, which the compiler may allocate outside the kernel.
        "vmem_bytes": max(mosaic_tpu.vmem_bytes(spec), cost.vmem_bytes),
        # Arguments on the chip over their bytes: one means that no tile is padded.
        "padding": round(analysis.argument_size_in_bytes / given, 3),
    }  # fmt: skip


def read_cost(dump: pathlib.Path, kernel: str = KERNEL) -> Cost:
    """The cost of the kernel of this name whose schedule lies in `dump`.

    Raises:
      RuntimeError: no schedule, or one this reader does not understand.
    """
    bundles = _one(dump, kernel, r"-\d+-final_bundles\.txt")
    depths, text = [], []
    for line in bundles.read_text().splitlines():
        found = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+[A-Z ]*:\s*(>*)", line)
        if found:
            depths.append(len(found[1]))
            text.append(line)
    loop = _main_loop(depths, text)
    used = _one(dump, kernel, r"-\d+-final_hlo-static-per-bundle-utilization\.txt").read_text()
    capacity, table = used.split("== UTILIZATION:")
    names, slots = capacity.strip().splitlines()[-2:]
    names = [x.strip() for x in names.split(",")]
    slots = [int(x) for x in slots.split()]
    rows = [[int(x) for x in line.split()] for line in table.strip().splitlines()]
    if len(rows) != len(depths):
        raise RuntimeError(f"{len(rows)} rows of utilization for {len(depths)} bundles in {dump}")
    busy = {
        name: round(sum(rows[i][column] for i in loop) / (len(loop) * slots[column]), 2)
        for column, name in enumerate(names)
        if ":" not in name
    }
    nested = sum(depths[i] > min(depths[i] for i in loop) for i in loop)
    return Cost(len(loop), _vmem(dump, kernel), busy, nested)


def _main_loop(depths: list[int], text: list[str]) -> list[int]:
    """Indices of the bundles of the loop that multiplies: the longest run inside a loop."""
    runs: list[list[int]] = [[]]
    # Grid steps are loops too: what is inside them once more is the kernel's own.
    inner = max(d for d, line in zip(depths, text, strict=True) if "vmatmul" in line)
    for i, depth in enumerate(depths):
        if depth >= inner:
            runs[-1].append(i)
        elif depth and runs[-1]:
            runs.append([])
    loop = max(runs, key=len)
    if not any("vmatmul" in text[i] for i in loop):
        raise RuntimeError("no matrix product in the longest loop of the schedule")
    return loop


def _vmem(dump: pathlib.Path, kernel: str) -> int:
    """Bytes of VMEM that the compiler allocates inside the kernel."""
    text = _one(dump, kernel, r"-\d+-pre-finalize-registers-and-allocations\.txt").read_text()
    sizes = re.findall(r"#allocation\d+ \[[^\n]*space=vmem, size = (0x[0-9a-f]+|\d+)", text)
    if not sizes:
        raise RuntimeError(f"no allocation in VMEM found in {dump}")
    return sum(int(x, 0) for x in sizes)


def _one(dump: pathlib.Path, kernel: str, ending: str) -> pathlib.Path:
    found = [p for p in dump.iterdir() if kernel in p.name and re.search(ending + "$", p.name)]
    found = [p for p in found if "schedule-analysis" not in p.name]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} files match {ending} of {kernel} in {dump}; expected one")
    return found[0]


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Costs of the configurations, one by one, compiled in one process.

    Args:
      only: conditions like "bits=3" that a row must all meet.

    Raises:
      RuntimeError: the compiler is missing or failed.
      ValueError: no configuration meets the conditions.
    """
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.tpu", "tpu", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, row, rows)
