"""Compiles the column kernel for TPU generations on a machine without one; reads its schedule.

    python -m turboq_kernels.aot.tpu_columns                     # rows of all configurations
    python -m turboq_kernels.aot.tpu_columns target=v5e bits=3   # those that match

As `turboq_kernels.aot.tpu`. `bits` per coordinate of K and of V are those of a layer as a whole:
its heads may have any, and one program reads them all. `cache` says how keys stand: "after" their
rotary embedding, or in blocks of so many positions, 1 for keys before it; `joined` how many heads
are one vector.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from turboq.numbers.packing import PAGE, ROWS
from turboq.numbers.rope import Rope
from turboq_kernels.aot import compilers, tpu
from turboq_kernels.aot.compilers import Program
from turboq_kernels.aot.tpu import missing as missing
from turboq_kernels.columns import linear, mosaic_tpu, mosaic_tpu_decoded
from turboq_kernels.columns.linear import GAIN_BITS, LANES, LinearLayer, LinearSide
from turboq_kernels.columns.queries import Folded

KERNEL = "turboq_columns"
HEADS, BATCH, PAGES = 8, 8, 128
ROPE = Rope(dim=128, theta=10000.0)


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
    def block(self) -> int | None:
        """Positions of a block of keys; None: after their rotary embedding."""
        return None if self.cache == "after" else int(self.cache)

    @property
    def decoded(self) -> bool:
        """Whether keys are decoded, for queries cannot be folded."""
        return self.block is not None and self.block not in mosaic_tpu.BLOCKS

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
    Configuration(target="v5e", bits=2, cache="1"),
    *(
        Configuration(target="v5e", bits=2, cache=form, joined=2)
        for form in ("1", "16", "64", "128")
    ),
    *(Configuration(target=target, bits=3) for target in ("v6e", "v5p", "tpu7x")),
    *(Configuration(target=x, bits=2, cache="1", joined=2) for x in ("v6e", "v5p", "tpu7x")),
)


def arguments(c: Configuration) -> tuple[Any, ...]:
    """Shapes of a call."""
    (k_width, v_width), rows = c.widths, HEADS * c.group * c.tokens
    units = len(c.unit_groups)
    blocks = 1 if c.block is None else PAGES * PAGE // c.block

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def side(width):
        return LinearSide(
            matrix=struct(c.joined, c.dim, width), unit=struct(width, dtype=jnp.int32),
            mean=struct(HEADS, c.dim), gains=struct(units, 1 << GAIN_BITS),
            start=struct(units, dtype=jnp.int32), count=struct(units, dtype=jnp.int32),
            tile_unit=struct(width // LANES, dtype=jnp.int32), slots=2,
        )  # fmt: skip

    layer = LinearLayer(
        k=side(k_width), v=side(v_width),
        means=struct(HEADS, c.block or 1, c.dim), longest=struct(HEADS),
        sums=struct(HEADS, c.dim, units // (HEADS // c.joined)),
        unit_groups=c.unit_groups, widest=(c.bits * c.dim,) * 2 * c.joined, joined=c.joined > 1,
        first=struct(2, dtype=jnp.int32), gain_lane=struct(dtype=jnp.int32),
        gain_weights=struct(units, linear.gain_lanes(HEADS, k_width), dtype=jnp.int32), gained=True,
        gain_lanes=struct(2, units, GAIN_BITS, dtype=jnp.int32),
        own=struct(c.dim, k_width) if c.joined > 1 else None,
    )  # fmt: skip
    seen = struct(BATCH, rows, dtype=jnp.int32)
    words = struct(BATCH, PAGES, ROWS, 2 * (k_width + v_width), dtype=jnp.uint32)
    if c.decoded:
        first = struct(1, 1, dtype=jnp.int32)
        return struct(BATCH, rows, c.dim), words, layer, seen, seen, first
    folded = Folded(
        left=struct(BATCH, blocks, rows, k_width),
        largest=struct(BATCH, rows),
        bias=struct(BATCH, rows, 1 if blocks == 1 else PAGES * PAGE),
    )
    return folded, words, layer, seen, seen


def _spec(c: Configuration) -> mosaic_tpu_decoded.Spec:
    """Of the kernel that decodes."""
    return mosaic_tpu_decoded.specify(
        HEADS * c.group * c.tokens, c.dim, c.unit_groups, (c.bits * c.dim,) * 2 * c.joined,
        c.joined > 1, 2 * sum(c.widths), ROPE,
        gain_lanes=linear.gain_lanes(HEADS, c.widths[0]), softcap=None,
    )  # fmt: skip


def program(configuration: Configuration) -> Program:
    """A call over a layer.

    Raises:
      ValueError: the kernel does not support the case.
    """
    c, shapes = configuration, arguments(configuration)
    options, rows = {"scale": c.dim**-0.5, "softcap": None}, HEADS * c.group * c.tokens
    if c.decoded:
        reason, attend = (
            mosaic_tpu_decoded.unsupported(_spec(c), c.block),
            mosaic_tpu_decoded.attend,
        )
        assert c.block is not None
        options |= {"rope": ROPE, "block": c.block}
    else:
        widths = c.widths
        reason = mosaic_tpu.unsupported(rows, c.unit_groups, c.bits * c.dim, widths, c.block)
        attend = mosaic_tpu.attend
    with compilers.abstractly(tpu.device(c.target)):
        reason = reason or mosaic_tpu.unsupported_chip()
    if reason is not None:
        raise ValueError(f"{configuration}: {reason}")
    return Program(functools.partial(attend, **options), shapes)


def row(configuration: Configuration, dump: pathlib.Path) -> dict[str, Any]:
    """One row; `dump` is the empty folder the compiler writes its schedule to."""
    tpu.compile_for(configuration.target, program(configuration))
    cost, c = tpu.read_cost(dump, KERNEL), configuration
    if c.decoded:
        used = mosaic_tpu_decoded.vmem_bytes(_spec(c))
    else:
        used = mosaic_tpu.vmem_bytes(HEADS * c.group * c.tokens, c.unit_groups, 2, c.widths)
    return {"op": "columns"} | dataclasses.asdict(c) | {
        "bundles_per_256_tokens": round(cost.loop_bundles / (c.joined if c.decoded else HEADS), 1),
        "loop_bundles": cost.loop_bundles,
        "loop_tokens": PAGE,
        "slots_used": cost.busy,
        "vmem_bytes": max(used, cost.vmem_bytes),
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
