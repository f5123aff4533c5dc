"""Compiles GPU kernels for AMD cards on a machine without one: compiled for, never run.

    python -m turboq_kernels.aot.rocm                            # all rows, as JSON
    python -m turboq_kernels.aot.rocm target=gfx942 op=columns   # those that match

XLA's compiler for AMD is in the package jax-rocm7-pjrt, which no JAX may find by itself here: it
would look for a GPU. It is linked to ROCm's libraries, of which compiling calls nothing that
matters: `stubs` puts empty ones where it looks for them. The code is read with Debian's llvm-19
(`llvm-objdump-19`, `llvm-readelf-19`). Instructions are those of the largest loop, of one thread,
by the elements of K and V that it reads, as of `turboq_kernels.aot.cuda`; scalar ones count.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable, topologies
from jax.sharding import AbstractDevice, SingleDeviceSharding

from turboq.numbers.packing import PAGE
from turboq_kernels.aot import code_object, compilers, rocm_stubs
from turboq_kernels.aot.compilers import Program

KIB, GB = 1024, 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Public figures of one card of a target: compute units, threads of a wave, bytes, bytes/s."""

    name: str
    units: int
    wave: int
    cache: int
    memory: int
    bandwidth: int
    shared: int = 64 * KIB


CARDS = {
    "gfx942": Card(
        name="AMD Instinct MI300X", units=304, wave=64, cache=4 * KIB**2, memory=192 * GB,
        bandwidth=5300 * GB,
    ),
    "gfx1100": Card(
        name="AMD Radeon RX 7900 XTX", units=96, wave=32, cache=6 * KIB**2, memory=24 * GB,
        bandwidth=960 * GB,
    ),
    "gfx1201": Card(
        name="AMD Radeon RX 9070 XT", units=64, wave=32, cache=8 * KIB**2, memory=16 * GB,
        bandwidth=640 * GB,
    ),
}  # fmt: skip

_CONFIG = """
gpu_device_info {{
  name: "{card.name}"
  device_vendor: "AMD"
  rocm_compute_capability {{ gcn_arch_name: "{target}" }}
  core_count: {card.units}
  clock_rate_ghz: 2.1
  fpus_per_core: 128
  threads_per_warp: {card.wave}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 131072
  shared_memory_per_block: {card.shared}
  shared_memory_per_block_optin: {card.shared}
  shared_memory_per_core: {card.shared}
  l2_cache_size: {card.cache}
  device_memory_size: {card.memory}
  memory_bandwidth: {card.bandwidth}
  device_address_bits: 64
  compile_time_toolkit_version: "7.2.0"
  runtime_version: "7.2.0"
  driver_version: "7.2.0"
  dnn_version: "3.5.0"
}}
dnn_version_info {{ major: 3 minor: 5 patch: 0 }}
platform_name: "ROCM"
device_description_str: "{card.name}"
"""

# Of every operation, the module that says what is compiled, its fields, and the kernel.
_CASES = {
    "columns": ("cuda_columns", {"target": "", "bits": 3}, "turboq_columns"),
    "decode": ("cuda", {"bits": 3}, "turboq_decode"),
    "encode": ("cuda_encode", {"bits": 3, "dim": 128, "tokens": 256}, "turboq_encode"),
    "prefill": ("cuda_prefill", {"bits": 3}, "turboq_prefill"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: an operation at 3 bits, D = 128, for a target."""

    target: str
    op: str


CONFIGURATIONS = tuple(Configuration(target=t, op=op) for op in _CASES for t in CARDS)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return compilers.missing("rocm") or code_object.missing()


def device(target: str) -> AbstractDevice:
    """The card that programs are traced for."""
    return AbstractDevice(device_kind=target, num_cores=CARDS[target].units, platform="gpu")


@functools.cache
def _compiler() -> None:
    """Makes the compiler known to this process's JAX, as the plugin "rocm"."""
    from jax._src import xla_bridge

    library = rocm_stubs.make(compilers.folder("rocm"))
    xla_bridge.register_plugin(
        "rocm", priority=500, library_path=str(library), options={"platform_name": "ROCM"}
    )


def compile_for(program: Program, target: str):
    """The executable for a card of `CARDS` (which cannot run here)."""
    _compiler()
    topology = topologies.get_topology_desc(
        platform="rocm", topology_name=target, topology="1x1x1",
        target_config=_CONFIG.format(target=target, card=CARDS[target]),
    )  # fmt: skip
    place = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.arguments
    )
    with compilers.abstractly(device(target)):
        return program.jitted.lower(*args).compile()


def row(configuration: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/amd_costs.json`: costs, or the reason in `refused`."""
    c = configuration
    name, fields, kernel = _CASES[c.op]
    module = importlib.import_module(f"turboq_kernels.aot.{name}")
    case = module.Configuration(**fields | ({"target": c.target} if "target" in fields else {}))
    shown = {"op": c.op} | dataclasses.asdict(case) | {"target": c.target}
    shown |= {"versions": versions(), "date": datetime.date.today().isoformat()}
    try:
        payload, *_ = serialize_executable.serialize(compile_for(module.program(case), c.target))
        cost = code_object.costs(payload, kernel)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return shown | {"refused": str(error).splitlines()[0][:300]}
    return shown | {
        "instructions_per_element": round(
            cost.loop_instructions * cost.threads / _elements(c.op, case), 3
        ),
        **dataclasses.asdict(cost),
    }


def _elements(op: str, case: Any) -> float:
    """Elements of K and V that a program's loop reads in a turn, or that `encode` writes."""
    from turboq_kernels.decode import triton as decode
    from turboq_kernels.prefill import triton as prefill

    if op == "columns":
        return PAGE * 2 * case.dim
    if op == "encode":
        return 32 * case.dim
    module = importlib.import_module("turboq_kernels.aot.cuda")
    if op == "prefill":
        return prefill.tuning(module.shapes(case, rows=1)[1])[0].tile_rows * 32 * 2 * case.dim
    _, k, v, *_ = module.shapes(case, rows=case.group)
    return decode.tuning(k, v, case.group).tile_rows * 32 * 2 * case.dim


def versions() -> str:
    """Of what compiles and of what reads."""
    return f"jax {jax.__version__}, {compilers.version('rocm')}, {code_object.version()}"


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.rocm", "rocm", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
