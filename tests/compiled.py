"""Tests that compile for chips that are not here, each program once for every compiler.

Compiling takes minutes and always ends alike: `tests/golden/compiled.json` has the digest of every
program that was compiled, with the compiler's version. What lowers to the same text is not compiled
again; its costs are those of `experiments/results/kernel_costs.json`. After a change of a kernel
its programs are compiled in every run until their digests are recorded (CONTRIBUTING, Change a
kernel).

The compilers' packages exist for Linux on x86-64. There a missing one is a failure: a skip would
hide that nothing is checked.
"""

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from unchecked import unchecked

from turboq.files import atomic_write
from turboq_kernels.aot import compilers

HAVE_COMPILERS = sys.platform == "linux" and platform.machine() == "x86_64"
needs_compilers = pytest.mark.skipif(
    not HAVE_COMPILERS, reason="the compilers' packages exist for Linux on x86-64 only"
)
# Everything is compiled or compared then, else one of a kind (`one_of_each`).
RECORDING = "TURBOQ_RECORD_COMPILED" in os.environ
LEDGER = Path(__file__).resolve().parent / "golden" / "compiled.json"


def one_of_each[K](groups: Iterable[Sequence[K]]) -> list[K]:
    """One key of each group, each time another place; all while digests are recorded.

    What is lowered and not compiled again takes half a second.
    """
    kept = [x if RECORDING else [x[i % len(x)]] for i, x in enumerate(groups)]
    return [key for some in kept for key in some]


def compiled[K: Hashable](
    what: str,
    target: str,
    keys: Iterable[K],
    lower: Callable[[K], str],
    compile: Callable[[list[K]], Iterable[Any]],
    recorded: Mapping[K, Any],
    ledger: Path = LEDGER,
) -> dict[K, Any]:
    """What compiling gives, by key: `recorded` where the program is as it was then.

    Args:
      what: of which kind the programs are. target: "tpu" or "cuda".
      lower: gives the text of one. compile: compiles those of some keys, in this order.
    """
    version = compilers.version(target)
    known = json.loads(ledger.read_text())
    with unchecked(), warnings.catch_warnings():  # shapes stand for arrays
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        texts = {key: lower(key) for key in keys}
    names = {key: f"{what} {key}" for key in texts}
    digests = {
        names[key]: hashlib.sha256(f"{version} {text}".encode()).hexdigest()[:32]
        for key, text in texts.items()
    }
    todo = [key for key, name in names.items() if known.get(name) != digests[name]]
    found = dict(zip(todo, compile(todo), strict=True)) if todo else {}
    if found and RECORDING:
        for key, got in found.items():
            assert got == recorded[key], f"run scripts/kernel_costs first: {got}, {recorded[key]}"
        text = json.dumps(known | digests, indent=0, sort_keys=True)
        atomic_write(ledger, text.encode() + b"\n")
    return {key: found.get(key, recorded.get(key)) for key in texts}
