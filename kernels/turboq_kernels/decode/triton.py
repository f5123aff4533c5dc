"""Decode on GPUs by Pallas-Triton: split-KV attention over packed head-pages on the tensor cores.

All query rows of a sequence and KV head (T * G, padded to 8) are one tile of `triton_kernel`, which
both prefill and decode are made of. Tuned numbers: `triton.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, cast

import jax
from jaxtyping import Array, Float, Int

from turboq_kernels.decode.types import Pages, Partial, Side
from turboq_kernels.target import target, too_old

try:
    import jax.experimental.pallas.triton

    from turboq_kernels.decode import triton_unpack as unpacking
    from turboq_kernels.decode.triton_kernel import Tuning, attend
    from turboq_kernels.decode.triton_kernel import join as join
except ImportError as error:  # deprecated since JAX 0.11
    raise ImportError(
        f"JAX {jax.__version__} has no Pallas-Triton backend (jax.experimental.pallas.triton), "
        "which this kernel is written in; use JAX 0.11 or 0.12, or implementation='xla'"
    ) from error

_MAX_ROWS = 64
_MIN_RUN = 16  # the matrix units' smallest depth
_PACKED_FLOATS = ("int8", "e4m3")  # read by `add.bf16x2`, which sm_90 is the first to have


@functools.cache
def _table() -> dict[str, Any]:
    file = importlib.resources.files("turboq_kernels.decode") / "triton.json"
    return json.loads(file.read_text())


def tuning(k: Side, v: Side, rows: int) -> Tuning:
    """The tuned numbers for the wider of these sides and `rows` padded query rows."""
    dim = max(k.reading.width, v.reading.width)
    bits = max(part.bits for side in (k, v) for part in side.reading.parts)
    for entry in _table()["sm_90"]:
        fits = bits <= entry.get("bits_up_to", bits)
        if dim <= entry["dim_up_to"] and rows <= entry["rows_up_to"] and fits:
            return from_entry(Tuning, entry)
    raise ValueError(f"no tuning for {dim=}, {rows=}")


def from_entry[T](kind: type[T], entry: dict[str, Any]) -> T:
    """The dataclass `kind` from those entries of a table's row that it has."""
    names = {field.name for field in dataclasses.fields(cast(Any, kind))}
    return kind(**{name: value for name, value in entry.items() if name in names})


def unsupported(q: Float[Array, "B N M C"], k: Side, v: Side, pages: Pages) -> str | None:
    """Why this kernel cannot run a case, or None."""
    if q.shape[2] > _MAX_ROWS:
        return f"{q.shape[2]} query rows per KV head are more than {_MAX_ROWS}"
    return unsupported_sides(k, v)


def unsupported_sides(k: Side, v: Side) -> str | None:
    """Why no kernel here can read such stored tokens, or None."""
    capability, reason = target().capability, too_old()
    if reason is not None:
        return reason
    for side in (k, v):
        for part in side.reading.parts:
            if part.levels in _PACKED_FLOATS and capability is not None and capability < (9, 0):
                major, minor = capability
                return f"{part.field!r} as {part.levels} needs sm_90, this GPU is sm_{major}{minor}"
            if part.levels == "table" and part.bits > unpacking.NIBBLE_BITS:
                return f"a level table of {part.bits} bits ({part.field!r}) has no look-up"
            if part.width % _MIN_RUN:
                return f"{part.width} coordinates of {part.field!r} are no multiple of {_MIN_RUN}"
        if side.reading.width > 512:
            return f"{side.reading.width} coordinates are more than 512"
    return None


def decode(
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
    splits: int | None,
    interpret: bool = False,
    tuned: Tuning | None = None,
) -> Partial:
    """See `turboq_kernels.decode.api.decode`; `tuned` overrides `triton.json`."""
    rows = max(8, 1 << (q.shape[2] - 1).bit_length())
    return attend(
        q, k, v, pages, starts, ends, bias=bias, scale=scale, softcap=softcap, splits=splits,
        interpret=interpret, rows=rows, name="turboq_decode",
        tuned=tuned or tuning(k, v, rows),
    )  # fmt: skip
