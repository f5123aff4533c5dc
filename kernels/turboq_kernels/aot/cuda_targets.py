"""Compiles one case of every kernel for the NVIDIA targets beside sm_90, or says why it is refused.

    python -m turboq_kernels.aot.cuda_targets                          # all rows, as JSON
    python -m turboq_kernels.aot.cuda_targets target=sm_80 op=columns  # those that match

As `turboq_kernels.aot.cuda`, for the cards of `turboq_kernels.aot.cards`. Numbers of stages and
warps are those tuned for sm_90.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from turboq_kernels.aot import cards, compilers
from turboq_kernels.aot.cuda import missing as missing

# Of every operation, the module that compiles it and what it compiles at 3 bits, D = 128.
_CASES = {
    "decode": ("cuda", {"bits": 3}),
    "prefill": ("cuda_prefill", {"bits": 3}),
    "encode": ("cuda_encode", {"bits": 3, "dim": 128, "tokens": 256}),
    "columns": ("cuda_columns", {"bits": 3}),
    "window": ("cuda_window", {"states": 64}),
    "step": ("cuda_step", {"levels": "turboquant_mse"}),
}
_FLOATS = ("int8", "e4m3")  # stored tokens of one byte


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is compiled: an operation for a target; with `levels`, tokens of 8 bits."""

    target: str
    op: str
    levels: str = ""


CONFIGURATIONS = tuple(
    Configuration(target=target, op=op, levels=levels)
    for target in cards.CARDS
    if target != "sm_90"
    for op, levels in (*((op, "") for op in _CASES), *(("decode", x) for x in _FLOATS))
)


def row(configuration: Configuration) -> dict[str, Any]:
    """One row of `experiments/results/gpu_targets.json`: costs, or the reason in `refused`."""
    c = configuration
    name, fields = _CASES[c.op]
    module = importlib.import_module(f"turboq_kernels.aot.{name}")
    if c.levels:
        fields = {"bits": 8, "levels": c.levels}
    try:
        if c.op in ("columns", "window", "step"):
            got = module.row(module.Configuration(target=c.target, **fields))
        else:
            got = module.row(module.Configuration(**fields), c.target)
    except ValueError as error:
        return dataclasses.asdict(c) | {"refused": str(error)}
    unknown = ["residency", "loads_ahead"]  # read for sm_90
    for per in ("instructions_per_element", "instructions_per_state"):
        if not got.get(per, True):  # newer code whose loop is not found: no count
            unknown.append(per)
    return {name: value for name, value in got.items() if name not in unknown}


def rows(only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """See `turboq_kernels.aot.cuda.rows`."""
    found = compilers.select(only, CONFIGURATIONS)
    return compilers.rows("turboq_kernels.aot.cuda_targets", "cuda", found)


if __name__ == "__main__":
    compilers.main(sys.argv[1:], Configuration, lambda c, _: row(c), rows)
