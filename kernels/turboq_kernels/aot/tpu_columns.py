"""Compiles the column kernel for TPU generations on a machine without one; reads its schedule.

    python -m turboq_kernels.aot.tpu_columns                     # rows of all configurations
    python -m turboq_kernels.aot.tpu_columns target=v5e bits=3   # those that match

As `turboq_kernels.aot.tpu`. `bits` per coordinate of K and of V are those of a layer as a whole:
its heads may have any, and one program reads them all. `cache` says how keys stand: "after" their
rotary embedding, or in blocks of so many positions; `joined` how many heads are one vector.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.numbers.packing import PAGE, ROWS
from turboq_kernels.aot import compilers, tpu
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.tpu import missing as missing
from turboq_kernels.columns import mosaic_tpu
from turboq_kernels.columns.linear import GAIN_BITS, LANES, LinearLayer, LinearSide
from turboq_kernels.columns.queries import Folded

KERNEL = "turboq_columns"
HEADS, BATCH, PAGES = 8, 8, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: a layer of 8 KV heads with stored gains, 8 sequences of 32 Ki tokens."""

    target: str
    bits: int
    levels: str = "window"
    dim: int = 128
    group: int = 4
    tokens: int = 1
    cache: str = "256"
    joined: int = 1

    @property
    def unit_groups(self) -> tuple[int, ...]:
        """As of `linear.LinearLayer`."""
        groups = tuple(head // self.joined for head in range(HEADS))
        return groups if self.joined == 1 else groups * 2

    @property
    def widths(self) -> tuple[int, int]:
        """Lanes of K and V as they are read, aligned."""
        codes, gains = HEADS * self.bits * self.dim, 2 * HEADS * GAIN_BITS
        if self.joined > 1:
            whole = _up(2 * codes + gains + LANES - 1)
            return whole, whole
        return _up(codes + gains + LANES - 1), _up(codes + LANES - 1)


def _up(lanes: int) -> int:
    return -(-lanes // LANES) * LANES


CONFIGURATIONS = (
    *(Configuration(target="v5e", bits=bits) for bits in (3, 2)),
    *(Configuration(target="v5e", bits=3, cache=form) for form in ("after", "128")),
    Configuration(target="v5e", bits=3, group=8),
    Configuration(target="v5e", bits=3, tokens=2),
    Configuration(target="v5e", bits=2, joined=2),
    *(Configuration(target=target, bits=3) for target in ("v6e", "v5p")),
)


def arguments(c: Configuration) -> tuple[Any, ...]:
    """Shapes of a call."""
    (k_width, v_width), rows = c.widths, HEADS * c.group * c.tokens
    units = len(c.unit_groups)
    blocks = 1 if c.cache == "after" else PAGES * PAGE // int(c.cache)

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def side(width):
        return LinearSide(
            matrix=struct(c.joined, c.dim, width), unit=struct(width, dtype=jnp.int32),
            mean=struct(HEADS, c.dim), gains=struct(units, 1 << GAIN_BITS),
            start=struct(units, dtype=jnp.int32), count=struct(units, dtype=jnp.int32),
            tile_unit=struct(width // LANES, dtype=jnp.int32), slots=2,
        )  # fmt: skip

    gain_lanes = _up(2 * HEADS * GAIN_BITS + LANES - 1)
    layer = LinearLayer(
        k=side(k_width), v=side(v_width),
        means=struct(HEADS, 1 if blocks == 1 else int(c.cache), c.dim), longest=struct(HEADS),
        sums=struct(HEADS, c.dim, units // (HEADS // c.joined)),
        unit_groups=c.unit_groups, widest=(c.bits * c.dim,) * 2 * c.joined, joined=c.joined > 1,
        first=struct(2, dtype=jnp.int32), gain_lane=struct(dtype=jnp.int32),
        gain_weights=struct(units, gain_lanes, dtype=jnp.int32), gained=True,
        gain_lanes=struct(2, units, GAIN_BITS, dtype=jnp.int32),
    )  # fmt: skip
    folded = Folded(
        left=struct(BATCH, blocks, rows, k_width),
        largest=struct(BATCH, rows),
        bias=struct(BATCH, rows, 1 if blocks == 1 else PAGES * PAGE),
    )
    words = struct(BATCH, PAGES, ROWS, 2 * (k_width + v_width), dtype=jnp.uint32)
    seen = struct(BATCH, rows, dtype=jnp.int32)
    return folded, words, layer, seen, seen


def program(configuration: Configuration) -> Program:
    """A call over a layer.

    Raises:
      ValueError: the kernel does not support the case.
    """
    c, shapes = configuration, arguments(configuration)
    block = None if c.cache == "after" else int(c.cache)
    rows = HEADS * c.group * c.tokens
    reason = mosaic_tpu.unsupported(rows, c.unit_groups, c.bits * c.dim, c.widths, block)
    if reason is not None:
        raise ValueError(f"{configuration}: {reason}")

    def run(*shapes):
        return mosaic_tpu.attend(*shapes, scale=c.dim**-0.5, softcap=None)

    return Program(run, shapes)


def row(configuration: Configuration, dump: pathlib.Path) -> dict[str, Any]:
    """One row; `dump` is the empty folder the compiler writes its schedule to."""
    tpu.compile_for(configuration.target, program(configuration))
    cost, c = tpu.read_cost(dump, KERNEL), configuration
    return {"op": "columns"} | dataclasses.asdict(c) | {
        "bundles_per_256_tokens": round(cost.loop_bundles / HEADS, 1),
        "loop_bundles": cost.loop_bundles,
        "loop_tokens": PAGE,
        "slots_used": cost.busy,
        "vmem_bytes": max(
            mosaic_tpu.vmem_bytes(HEADS * c.group * c.tokens, c.unit_groups, 2, c.widths),
            cost.vmem_bytes,
        ),
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
    return compilers.rows("turboq_kernels.aot.tpu_columns", "tpu", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, row, rows)
