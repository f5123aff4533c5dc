#!/usr/bin/env python3
"""Writes what the compilers say the kernels cost: kernel_costs.json, gpu_targets.json."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turboq.files import atomic_write  # noqa: E402

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
    wanted = dict(condition.split("=") for condition in given.only)
    op = wanted.pop("op", None)
    only = [f"{k}={v}" for k, v in wanted.items()]
    platforms = given.platform or ("tpu", "cuda")
    modules = [
        (importlib.import_module(f"turboq_kernels.aot.{name}"), platform)
        for (platform, its_op), name in MODULES.items()
        if platform in platforms and (its_op is None or op in (None, its_op))
    ]
    missing = sorted({reason for m, _ in modules if (reason := m.missing()) is not None})
    if missing:
        print("\n".join(missing), file=sys.stderr)
        return 1
    for module, platform in modules:
        out = given.out or RESULTS / FILES[platform]
        every = [f"op={op}"] if platform in ("targets", "rocm") and op is not None else []
        for row in module.rows(only + every):
            # After every row: a run of many compilations may be cut off.
            old = json.loads(out.read_text()) if out.exists() else []
            atomic_write(out, written(merged(old, [row])))
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
