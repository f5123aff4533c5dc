"""Breaks commands that write while they run, and sees that no result is ever a half one.

    python tests/chaos.py --rounds=100                      all commands, all kinds of trouble
    python tests/chaos.py --rounds=5 --command=export --kind=kill --seed=3

Every round takes a command and a kind of trouble at random. Afterwards the project's own readers
must find the earlier results or the new ones whole; nothing may have ended in a traceback; and the
same command, run again, must end with the files of an undisturbed run and nothing else beside them.

    kill        SIGKILL just before a change of the disk that the command makes from Python
    moment      SIGKILL at a moment of its running time
    full        the disk is full after some bytes: a small tmpfs, or where none can be mounted a
                limit on the size of files
    read_only   the folder cannot be written (not as root, whom nothing stops)
    two         a second process runs the same command into the same folder

Commands run in forks of this process, which has imported what they need and computed nothing.
Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import _paths  # noqa: F401  where the packages are
import chaos_commands
from chaos_commands import COMMANDS, Command

from turboq_calibrate.cli import main as cli

KINDS = ("kill", "moment", "full", "read_only", "two")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link")
SPACE = 64 << 20  # bytes of the tmpfs when there is room
LONG_AGO = 2 * 3600  # seconds: by then nobody writes a partial file any more


class Failed(Exception):
    """What a round found."""


class Run:
    """A command in a process of its own; what it printed as errors is in a file."""

    def __init__(self, argv: list[str], errors: Path, first: Callable[[], None] = lambda: None):
        self.errors, self.begun = errors, time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        code = 70  # of what is no exit code of a command: a traceback
        try:
            where = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            first()
            code = cli.run(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self) -> int:
        """The exit code, or minus the signal. Raises Failed after anything but a code of ours."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.monotonic() - self.begun
        said = self.errors.read_text(errors="replace")
        lines = [line for line in said.splitlines() if line.startswith("turboq: error: ")]
        if code not in (0, 1, -signal.SIGKILL) or (code == 1 and len(lines) != 1):
            raise Failed(f"exit code {code}: {said[-3000:]}")
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def killed_at(change: int, inside: Path) -> Callable[[], None]:
    """Makes this process end itself just before its change number `change` below a folder."""

    def install() -> None:
        seen = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            if not changes(event, arguments, inside):
                return
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        sys.addaudithook(watch)

    return install


def counting(inside: Path, into: Path) -> Callable[[], None]:
    """Writes a byte for every change of the disk below a folder."""

    def install() -> None:
        file = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def watch(event: str, arguments: tuple) -> None:
            if changes(event, arguments, inside):
                os.write(file, b".")

        sys.addaudithook(watch)

    return install


def changes(event: str, arguments: tuple, inside: Path) -> bool:
    """Whether a call that Python announces changes the disk below a folder."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = arguments[0]
    else:
        return False
    return isinstance(path, str | bytes) and os.fsdecode(path).startswith(str(inside))


class Chaos:
    """One command: its folder before, after an undisturbed run, and between."""

    def __init__(self, command: Command, folder: Path, room: Path):
        self.command, self.folder, self.room = command, folder, room
        self.out = room / "out"
        self.old, self.new, self.errors = folder / "old", folder / "new", folder / "errors"
        folder.mkdir()
        command.before(self.old)
        self.restore()
        run = self.run(counting(room, folder / "changes"))
        if run.wait():
            raise Failed(f"{command.name} undisturbed: {self.errors.read_text()}")
        self.seconds, self.count = run.seconds, (folder / "changes").stat().st_size
        shutil.copytree(self.out, self.new)
        self.states = {self.state(self.old), self.state(self.new)}

    def run(self, first: Callable[[], None] = lambda: None, errors: str = "errors") -> Run:
        return Run(self.command.argv(self.out), self.folder / errors, first)

    def restore(self) -> None:
        chaos_commands.empty(self.room)
        if self.old.exists():
            shutil.copytree(self.old, self.out)

    def state(self, out: Path) -> str:
        """What the project's readers find, or "none": read in a fork, as this process computes
        nothing."""
        said = self.folder / "state"
        pid = os.fork()
        if pid == 0:
            try:
                said.write_text(self.command.state(out))
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise Failed("what is there cannot be read (traceback above)")
        return said.read_text()

    def check(self) -> None:
        """Old or new, whole; and run again, new and nothing else."""
        state = self.state(self.out)
        if state not in self.states:
            raise Failed(f"found {state[:200]}: neither the old nor the new results")
        for path in self.room.rglob("*"):
            if ".partial" in path.name:
                os.utime(path, (time.time() - LONG_AGO,) * 2)
        if self.run().wait():
            raise Failed(f"run again: {self.errors.read_text()}")
        want, got = self.command.files(self.new), self.command.files(self.out)
        if beside := sorted(set(os.listdir(self.room)) - {"out"}):
            raise Failed(f"run again, there are also {', '.join(beside)}")
        if want.keys() != got.keys():
            raise Failed(f"run again, files differ: {sorted(want.keys() ^ got.keys())}")
        if other := [name for name in want if want[name] != got[name]]:
            raise Failed(f"run again, {', '.join(other)} have other bytes")

    def kill(self, rng: random.Random) -> str:
        at = rng.randrange(self.count)
        code = self.run(killed_at(at, self.room)).wait()
        return f"before change {at} of {self.count}" + ("" if code else ", which did not come")

    def moment(self, rng: random.Random) -> str:
        after = rng.uniform(0, self.seconds)
        run = self.run()
        time.sleep(after)
        run.kill()
        run.wait()
        return f"after {after:.2f} of {self.seconds:.2f} s"

    def two(self, rng: random.Random) -> str:
        after = rng.uniform(0, self.seconds / 2)
        runs = [self.run()]
        time.sleep(after)
        runs.append(self.run(errors="errors_of_second"))
        codes = [run.wait() for run in runs]
        if 0 not in codes:
            raise Failed("neither of two writers ended well")
        return f"{after:.2f} s apart, exit codes {codes}"


def full(chaos: Chaos, rng: random.Random, mounted: bool) -> str:
    """A disk, or a largest file, of a random size up to what the command needs."""
    have = chaos_commands.size(chaos.old)
    room = rng.randrange(4096, max(chaos_commands.size(chaos.new), 8192))
    if mounted:
        chaos_commands.resize(chaos.room, have + room)
        try:
            code = chaos.run().wait()
        finally:
            chaos_commands.resize(chaos.room, SPACE)
        return f"{room} bytes were free, exit code {code}"
    largest = max(p.stat().st_size for p in chaos.new.rglob("*") if p.is_file())
    limit = rng.randrange(largest)
    code = chaos.run(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).wait()
    return f"no tmpfs: files of {limit} bytes at most, exit code {code}"


def read_only(chaos: Chaos) -> str:
    folders = [chaos.room, *(p for p in chaos.room.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        if chaos.run().wait() != 1:
            raise Failed("a folder that cannot be written was written")
    finally:
        for path in folders:
            path.chmod(0o755)
    return "refused"


def one_round(chaos: Chaos, kind: str, rng: random.Random, mounted: bool) -> str:
    """What was done, or why nothing was."""
    chaos.restore()
    if kind == "read_only":
        if os.geteuid() == 0:
            return "skipped: nothing is read-only to root"
        done = read_only(chaos)
    elif kind == "full":
        done = full(chaos, rng, mounted)
    else:
        done = getattr(chaos, kind)(rng)
    chaos.check()
    return done


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    rng, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="turboq-chaos-") as name:
        folder = Path(name)
        room = folder / "room"
        room.mkdir()
        mounted = "full" in options.kind and chaos_commands.mount(room, SPACE)
        try:
            known: dict[str, Chaos] = {}
            for number in range(options.rounds):
                command, kind = rng.choice(options.command), rng.choice(options.kind)
                own, line = random.Random(rng.random()), f"{number:4d} {command:12} {kind:9}"
                try:
                    if command not in known:
                        made = COMMANDS[command](folder)
                        known[command] = Chaos(made, folder / command, room)
                    print(f"{line} {one_round(known[command], kind, own, mounted)}", flush=True)
                except Failed as error:
                    failed += 1
                    print(f"{line} FAILED {error}", flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", str(room)], check=True)
    print(f"{options.rounds} rounds, seed {options.seed}: {failed} failed")
    return int(failed > 0)


def arguments() -> argparse.ArgumentParser:
    def some(known):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--command", type=some(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--kind", type=some(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
