"""The commands that `chaos.py` breaks, on a tiny model, and how to tell what they left."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import model_files

from turboq.errors import TurboqError
from turboq_calibrate.cli import main as cli

MODEL = f"--model={model_files.GOLDEN / 'llama3'}"
SMALL = ("--windows=2", "--window_length=40")
OBSERVE = ("calibrate", MODEL, *SMALL, "--text=topics:calibration", "--chunk_windows=1")
OBSERVE += ("--checkpoint_every=1", "--check_length=0")
VOLATILE = ("run.json", "events.jsonl", "lock")  # times of a run, and what only means to exist


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """`before` fills the folder, or not; `state` is what readers find in it, "none" if nothing."""

    name: str
    argv: Callable[[Path], list[str]]
    before: Callable[[Path], None]
    state: Callable[[Path], str]

    def files(self, out: Path) -> dict[str, bytes]:
        """Everything that is there, hidden files too, but for what no two runs share."""
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in VOLATILE
        }


def plan(folder: Path) -> Command:
    def argv(out: Path) -> list[str]:
        return ["plan", MODEL, "--codec=turboquant_mse", "--bits=3", f"--out={out}"]

    return Command(name="plan", argv=argv, before=made(_coarse), state=plan_state)


def plan_budget(folder: Path) -> Command:
    statistics = shared(folder / "statistics", lambda out: [*OBSERVE, f"--out={out}"])

    def argv(out: Path) -> list[str]:
        found = f"--statistics={statistics}"
        return ["plan", MODEL, found, "--budget=3.25bpc", "--force", f"--out={out}"]

    return Command(name="plan_budget", argv=argv, before=made(_coarse), state=plan_state)


def calibrate(folder: Path) -> Command:
    return Command(
        name="calibrate",
        argv=lambda out: [*OBSERVE, f"--out={out}"],
        before=lambda out: None,
        state=statistics_state,
    )


def merge(folder: Path) -> Command:
    shards = [
        shared(folder / f"shard{i}", lambda out, i=i: [*OBSERVE, f"--shard={i}/2", f"--out={out}"])
        for i in (0, 1)
    ]
    return Command(
        name="merge",
        argv=lambda out: ["merge", f"--out={out}", *map(str, shards)],
        before=lambda out: None,
        state=statistics_state,
    )


def evaluate(folder: Path) -> Command:
    def argv(out: Path, bits: int = 3) -> list[str]:
        text = ("--text=topics:heldout", f"--baselines=turboquant_mse:{bits}")
        return ["evaluate", MODEL, *SMALL, *text, f"--out={out}"]

    return Command(
        name="evaluate", argv=argv, before=made(lambda out: argv(out, 2)), state=quality_state
    )


def tasks(folder: Path) -> Command:
    def argv(out: Path, bits: int = 3) -> list[str]:
        what = ("--tasks=arithmetic", "--lengths=256", "--samples=2")
        return ["tasks", MODEL, *what, f"--baselines=turboquant_mse:{bits}", f"--out={out}"]

    return Command(name="tasks", argv=argv, before=made(lambda out: argv(out, 2)), state=file_state)


def report(folder: Path) -> Command:
    quality = shared(folder / "quality", evaluate(folder).argv)

    def before(out: Path) -> None:
        shutil.copytree(quality, out)
        (out / "report.html").write_text("an earlier page")

    return Command(
        name="report", argv=lambda out: ["report", f"--run={out}"], before=before, state=file_state
    )


def export(folder: Path) -> Command:
    """Of the same plan as before, beside whose files lies one that must go."""
    known = shared(folder / "plan_to_export", plan(folder).argv)

    def argv(out: Path) -> list[str]:
        return ["export", "--engine=reader", f"--plan={known}", f"--out={out}"]

    def before(out: Path) -> None:
        run(argv(out))
        (out / "earlier").write_text("of an earlier export")

    return Command(name="export", argv=argv, before=before, state=file_state)


def memory(folder: Path) -> Command:
    def before(out: Path) -> None:
        out.mkdir()
        (out / "wall.png").write_bytes(b"an earlier picture")

    def argv(out: Path) -> list[str]:
        return ["memory", MODEL, "--memory_gib=1", f"--picture={out / 'wall.png'}"]

    return Command(name="memory", argv=argv, before=before, state=file_state)


COMMANDS = {
    make.__name__: make
    for make in (calibrate, merge, plan, plan_budget, evaluate, tasks, report, export, memory)
}


def _coarse(out: Path) -> list[str]:
    return ["plan", MODEL, "--codec=turboquant_mse", "--bits=2", f"--out={out}"]


def run(argv: list[str]) -> None:
    """A command that must succeed, in a fork."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 70
        try:
            code = cli.run(argv)
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"turboq {' '.join(argv)} failed")


def made(argv: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    return lambda out: run(argv(out))


def shared(out: Path, argv: Callable[[Path], list[str]]) -> Path:
    """What a command makes, once for all that read it."""
    if not out.exists():
        run(argv(out))
    return out


def plan_state(out: Path) -> str:
    from turboq.plan import load
    from turboq.plan.document import fingerprint

    try:
        found, arrays = load(out)
    except TurboqError as error:
        return "none" if "no such plan" in str(error) else str(error)
    return f"{fingerprint(found)} {sorted(arrays)}"


def statistics_state(out: Path) -> str:
    from turboq_calibrate.observe.statistics_files import load_statistics

    try:
        found = load_statistics(out)
        for i in range(len(found)):
            _ = found[i], len(found.tokens(i))
        return f"{found.sha256} {found.windows.shape}"
    except TurboqError as error:
        return "none" if "no finished statistics" in str(error) else str(error)


def quality_state(out: Path) -> str:
    from turboq_calibrate.measure.quality_table import csv_text, read_quality

    try:
        found = read_quality(out)
    except TurboqError as error:
        return "none" if "does not exist" in str(error) else str(error)
    if (out / "quality.csv").read_text() != csv_text(found.rows):
        return "quality.csv is not of quality.json"
    return hashlib.sha256((out / "quality.json").read_bytes()).hexdigest()


def file_state(out: Path) -> str:
    """Names and hashes of what is not hidden."""
    found = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(out).parts)
    }
    return str(found) if found else "none"


def empty(folder: Path) -> None:
    """Removes what is in a folder that may be a mount point."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def size(folder: Path) -> int:
    """Bytes of a folder's files in pages, as tmpfs counts them."""
    if not folder.exists():
        return 0
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


def mount(folder: Path, nbytes: int) -> bool:
    """A file system in memory on a folder, if this process may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "turboq-chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def resize(folder: Path, nbytes: int) -> None:
    command = ["mount", "-o", f"remount,size={nbytes}", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
