"""Damages what the project reads, and sees that every damage is a value or one clear line.

    python tests/fuzz.py --minutes=60                    all targets, equal shares of the time
    python tests/fuzz.py --cases=500 --target=gguf       so many cases of one
    python tests/fuzz.py --target=gguf --first=17 --cases=1 --seed=0     one again, with traceback

A case is fixed by target, seed and index. It fails if it ends in anything but success or the
project's own error, if that error's line is long or not printable, if it takes more than --limit
seconds of processor time, or if it ends the process or holds it for sixty times --limit: cases run
in a child process, which then begins again with the next. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

import _paths  # noqa: F401  where the packages are

TARGETS = ("plan", "codec", "safetensors", "gguf", "gguf_split", "config", "geometry", "tokenizer")
TARGETS += ("statistics", "inputs", "quality", "tasks", "export")
LONGEST = 600  # characters of an error, the folder's name left out
MEMORY = 4 << 30  # bytes a case may take above what the process has
# Threads of small matrix products wait for each other by computing, which counts as time.
ALONE = {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
HANGS = 60  # times the limit of processor time, on the clock: what waits, and C code
RESTARTS = 50


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    if options.state is not None:
        work(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="turboq-fuzz-") as folder:
        state = Path(folder) / "state"
        state.write_text(json.dumps({"running": None, "counts": {}}))
        command = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:])]
        for _ in range(RESTARTS):
            child = [*command, f"--state={state}"]
            ended = subprocess.run(child, env=ALONE | os.environ, check=False).returncode
            found = json.loads(state.read_text())
            if found["running"] is None:
                break
            target, index = found["running"]
            why = f"signal {-ended}" if ended < 0 else "a hang, its traceback is above"
            report(target, options.seed, index, f"the process ended (exit code {ended}: {why})")
            found["counts"][target]["cases"] += 1
            found["counts"][target]["failed"] += 1
            state.write_text(json.dumps(found | {"running": None}))
        else:
            print(f"given up after {RESTARTS} ended processes")
            return 1
    failed = 0
    print("target         cases   refused    failed  slowest s")
    for target, count in found["counts"].items():
        failed += count["failed"]
        numbers = f"{count['cases']:8d}  {count['refused']:8d}  {count['failed']:8d}"
        print(f"{target:12}{numbers}  {count['slowest']:9.2f}")
    unfinished = [name for name in options.target if name not in found["counts"]]
    if ended or unfinished:
        print(f"not run: exit code {ended}, {', '.join(unfinished) or 'between two cases'}")
    return int(bool(failed or ended or unfinished))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    much = parser.add_mutually_exclusive_group(required=True)
    much.add_argument("--minutes", type=float, help="in all, shared by the targets")
    much.add_argument("--cases", type=int, help="of every target")
    parser.add_argument("--target", type=lambda text: text.split(","), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds of processor time a case")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser


def report(target: str, seed: int, index: int, why: str) -> None:
    again = f"--target={target} --seed={seed} --first={index} --cases=1"
    print(f"FAILED {again}: {why}", flush=True)


class State:
    """How far the child is, in a file that outlives it: the case it runs, and counts of targets."""

    def __init__(self, path: Path):
        self.counts = json.loads(path.read_text())["counts"]
        self._file = os.open(path, os.O_RDWR)

    def write(self, running: tuple[str, int] | None) -> None:
        text = json.dumps({"running": running, "counts": self.counts})
        os.pwrite(self._file, text.encode().ljust(4096), 0)


def work(options: argparse.Namespace) -> None:
    """The child: all cases that are left, in order."""
    import fuzz_targets
    from unchecked import unchecked

    from turboq.errors import TurboqWarning

    known = fuzz_targets.TARGETS | {"planted": fuzz_targets.planted}
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", TurboqWarning)
    faulthandler.enable()
    state = State(options.state)
    share = None if options.minutes is None else 60 * options.minutes / len(options.target)
    for target in options.target:
        if target not in known:
            sys.exit(f"--target={target} must be one of {', '.join(known)}")
        new = {"cases": 0, "refused": 0, "failed": 0, "slowest": 0.0, "seconds": 0.0}
        count = state.counts.setdefault(target, new)
        with tempfile.TemporaryDirectory(prefix=f"turboq-{target}-") as folder:
            case = None
            while count["cases"] < options.cases if share is None else count["seconds"] < share:
                if case is None:
                    case = known[target](Path(folder))
                    bound_memory()
                index = options.first + count["cases"]
                state.write((target, index))
                begun, used = time.monotonic(), time.process_time()
                faulthandler.dump_traceback_later(HANGS * options.limit, exit=True)
                with unchecked():
                    outcome = run(case, target, index, options, folder)
                faulthandler.cancel_dump_traceback_later()
                used = time.process_time() - used
                if outcome != "failed" and used > options.limit:
                    outcome = "failed"
                    report(target, options.seed, index, f"{used:.1f} s of processor time")
                count["cases"] += 1
                count["refused"] += outcome == "refused"
                count["failed"] += outcome == "failed"
                count["slowest"] = max(count["slowest"], used)
                count["seconds"] += time.monotonic() - begun
                state.write(None)


def run(case, target: str, index: int, options: argparse.Namespace, folder: str) -> str:
    """One case: "read", "refused" or "failed"."""
    import numpy as np

    from turboq.errors import TurboqError

    try:
        case(np.random.default_rng([options.seed, zlib.crc32(target.encode()), index]))
    except TurboqError as error:
        line = " ".join(str(error).replace(folder, "").split())  # as the command prints it
        if len(line) <= LONGEST and line.isprintable():
            if options.cases == 1:
                print(f"refused: {line}")
            return "refused"
        why = "is not printable" if len(line) <= LONGEST else f"has {len(line)} characters"
        report(target, options.seed, index, f"the error {why}: {line[:80]!r}...")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        place = f"{where.filename}:{where.lineno}"
        report(target, options.seed, index, f"{line} at {place}")
        if options.cases == 1:
            traceback.print_exc()
    else:
        return "read"
    return "failed"


def bound_memory() -> None:
    """A size that a file states must not take the machine's memory: then it is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))


if __name__ == "__main__":
    sys.exit(main())
