#!/usr/bin/env python3
"""Writes what the compilers say the kernels cost: kernel_costs.json, gpu_targets.json."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turboq.files import atomic_write  # noqa: E402
from turboq_kernels.aot import compilers, cuda  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
FILES = {
    "tpu": "kernel_costs.json",
    "cuda": "kernel_costs.json",
    "targets": "gpu_targets.json",
    "rocm": "amd_costs.json",
}
# Modules of turboq_kernels.aot by platform and operation.
MODULES = {
    ("tpu", "decode"): "tpu",
    ("tpu", "encode"): "tpu_encode",
    ("tpu", "prefill"): "tpu_prefill",
    ("tpu", "columns"): "tpu_columns",
    ("cuda", "decode"): "cuda",
    ("cuda", "prefill"): "cuda_prefill",
    ("cuda", "encode"): "cuda_encode",
    ("cuda", "columns"): "cuda_columns",
    ("cuda", "logits"): "cuda_decoded",
    ("cuda", "window"): "cuda_window",
    ("tpu", "step"): "tpu_step",
    ("cuda", "step"): "cuda_step",
    ("targets", None): "cuda_targets",  # every operation
    ("rocm", None): "rocm",  # likewise
}
# What makes two rows the same measurement.
KEYS = ("target", "op", "bits", "levels", "dim", "group", "tokens", "cache", "joined", "states")

HELP = """\
Compiles the kernels for chips that are not here and writes their static costs: VLIW bundles of the
main loop per 256 tokens on TPU, instructions per element, registers and spills on sm_90; with
--platform=targets one case of every operation for sm_80, sm_89, sm_100 and sm_120, with
--platform=rocm for AMD's gfx942, gfx1100 and gfx1201. Conditions
choose rows, e.g. op=encode bits=3; those other than op must be met by some row of every operation.
Rows of a platform or of conditions that were not asked for stay as they are in the file.

Needs the compilers, on any CPU machine: ./scripts/bootstrap dev installs them into .venv/compilers,
where .venv/bin/python finds them; the extra `aot` beside another JAX does as well.
"""


def key(row: dict) -> tuple:
    return tuple(str(row.get(k)) for k in KEYS)


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """New rows in place of old ones of the same key; sorted."""
    rows = {key(row): row for row in old} | {key(row): row for row in new}
    return [rows[k] for k in sorted(rows)]


def written(rows: list[dict]) -> str:
    """One row per line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def chosen(given: list[str], platforms: Sequence[str]) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The modules, and of each its platform and its rows, none of which is compiled yet.

    Raises:
      ValueError: a condition that none meets.
    """
    wanted = compilers.conditions(given)
    op, target = wanted.pop("op", None), wanted.get("target")
    known = {p: targets(p) for p in FILES}
    if target is not None and not any(target in known[p] for p in platforms):
        every = "; ".join(f"{' '.join(x)} (--platform={p})" for p, x in known.items())
        raise ValueError(f"{target=} must be one of {every}")
    ops = dict.fromkeys(x for p, x in MODULES if p in platforms and x is not None)
    if op is not None and ops and op not in ops:
        raise ValueError(f"{op=} must be one of {' '.join(ops)}")
    only, modules, jobs = [f"{k}={v}" for k, v in wanted.items()], [], []
    for (platform, its_op), name in MODULES.items():
        if platform in platforms and (its_op is None or op in (None, its_op)):
            every = [f"op={op}"] if its_op is None and op is not None else []
            modules.append(importlib.import_module(f"turboq_kernels.aot.{name}"))
            jobs.append((platform, modules[-1].rows(only + every)))
    return modules, jobs


def targets(platform: str) -> list[str]:
    """What is compiled for."""
    names = [name for (its_platform, _), name in MODULES.items() if its_platform == platform]
    found = [importlib.import_module(f"turboq_kernels.aot.{name}") for name in names]
    every = (getattr(c, "target", cuda.TARGET) for m in found for c in m.CONFIGURATIONS)
    return list(dict.fromkeys(every))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--platform", choices=tuple(FILES), action="append", help="default: tpu and cuda"
    )
    parser.add_argument("--out", type=pathlib.Path, help="default: in experiments/results")
    parser.add_argument("only", nargs="*", metavar="KEY=VALUE", help="e.g. bits=3 target=v5e")
    given = parser.parse_args(arguments)
    platforms = given.platform or ("tpu", "cuda")
    try:
        modules, jobs = chosen(given.only, platforms)
    except ValueError as error:
        print(f"--platform={','.join(platforms)}: {error}", file=sys.stderr)
        return 1
    missing = sorted({reason for m in modules if (reason := m.missing()) is not None})
    if missing:
        print("\n".join(missing), file=sys.stderr)
        return 1
    for platform, rows in jobs:
        out = given.out or RESULTS / FILES[platform]
        for row in rows:
            # After every row: a run of many compilations may be cut off.
            old = json.loads(out.read_text()) if out.exists() else []
            atomic_write(out, written(merged(old, [row])))
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
