"""Prefill on GPUs by Pallas-Triton: many query rows over stored tokens, and over exact ones.

Stored tokens are read by the kernel of decode (`decode.triton_kernel`), a program per tile of 64
query rows: a page is unpacked once for a tile, and tokens that none of its rows sees are not read.
Queries and probabilities are rounded to bfloat16. Exact tokens: `triton_own`. Tuned numbers:
`triton.json`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq_kernels.decode import triton as decoding  # says so where JAX has no Triton
from turboq_kernels.decode.triton_kernel import Tuning, attend
from turboq_kernels.decode.triton_unpack import NIBBLE_BITS
from turboq_kernels.decode.types import Pages, Partial, Side
from turboq_kernels.prefill.triton_own import OwnTuning, attend_exact


@functools.cache
def _table() -> dict[str, Any]:
    file = importlib.resources.files("turboq_kernels.prefill") / "triton.json"
    return json.loads(file.read_text())["sm_90"]


def tuning(*sides: Side) -> tuple[Tuning, int]:
    """The tuned numbers for the widest of these sides, and the query rows of a tile.

    Look-up tables of 16 levels take registers that 256 coordinates do not leave, as do offsets.
    """
    dim = max(side.reading.width for side in sides)
    parts = [part for side in sides for part in side.reading.parts]
    bits = max(part.bits if part.bits <= NIBBLE_BITS else 0 for part in parts)
    offsets = any(part.offset is not None for part in parts)
    for entry in _table()["history"]:
        fits = bits <= entry.get("lookup_bits_up_to", NIBBLE_BITS)
        if dim <= entry["dim_up_to"] and fits and offsets <= entry.get("offsets", True):
            return decoding.from_entry(Tuning, entry), entry["rows"]
    raise ValueError(f"no tuning for {dim=}")


def own_tuning(dim: int, pieces: int) -> OwnTuning:
    """Likewise for exact vectors of `dim` numbers, each `pieces` bfloat16.

    Raises:
      ValueError: more than 512 numbers.
    """
    for entry in _table()["own"]:
        if dim <= entry["dim_up_to"] and pieces == entry["pieces"]:
            return decoding.from_entry(OwnTuning, entry)
    raise ValueError(f"{dim=} is more than exact vectors may have here (512); use 'xla'")


def unsupported(q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages) -> str | None:
    """Why `history` cannot run a case, or None."""
    return decoding.unsupported_sides(k, v)


def history(
    q: Float[Array, "B N M C"],
    k: Side,
    v: Side,
    pages: Pages,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    bias: Float[Array, "B N M"] | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
    splits: int | None = None,
    tuned: tuple[Tuning, int] | None = None,
) -> Partial:
    """See `turboq_kernels.prefill.kernels.history`; `tuned` overrides `triton.json`."""
    numbers, rows = tuned or tuning(k, v)
    return attend(
        q, k, v, pages, starts, ends, bias=bias, scale=scale, softcap=softcap, splits=splits,
        interpret=interpret, tuned=numbers, rows=rows, name="turboq_prefill",
    )  # fmt: skip


def own(
    q: Float[Array, "B N M D"],
    k: Float[Array, "B N R D"],
    v: Float[Array, "B N R E"],
    positions: Int[Array, "B R"],
    lower: Int[Array, "B M"],
    upper: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
    tuned: OwnTuning | None = None,
) -> Partial:
    """See `turboq_kernels.prefill.kernels.own`; `tuned` overrides `triton.json`."""
    pieces = 1 if k.dtype == v.dtype == jnp.bfloat16 else 2
    return attend_exact(
        q, k, v, positions, lower, upper, scale=scale, softcap=softcap, interpret=interpret,
        tuned=tuned or own_tuning(max(k.shape[-1], v.shape[-1]), pieces),
    )  # fmt: skip
