"""Progress of a long step: one bar with ETA on a terminal, a few plain lines elsewhere.

A log gets a line after half a minute and then whenever a tenth more time has passed, and the last,
but none of a step that is over within a second; each begins with the time since the command began.
Inside `phases` the steps of a command say which of how many they are. `run.shown` says how much.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from turboq_calibrate.run import shown

LOG_EVERY_S = 30.0  # at least, and a tenth of what has passed
SHORT_S = 1.0  # a step that took less is no line


class _Phases:
    """Labels of a command's steps in their order, and how many of them began."""

    def __init__(self, labels: tuple[str, ...]):
        self.labels, self.begun = labels, 0

    def number(self, label: str) -> int | None:
        """Which step this label begins: the next one that has it, else any that has."""
        has = [i for i, name in enumerate(self.labels) if label.startswith(name)]
        if not has:
            return None
        found = next((i for i in has if i >= self.begun), has[-1])
        self.begun = max(self.begun, found + 1)
        return found + 1


_PHASES: contextvars.ContextVar[_Phases | None] = contextvars.ContextVar("phases", default=None)


@contextlib.contextmanager
def phases(*labels: str) -> Iterator[None]:
    """Numbers the steps inside that have these labels (or begin with them): [2/3] observe.

    A label that stands there twice is two steps.
    """
    token = _PHASES.set(_Phases(labels))
    try:
        yield
    finally:
        _PHASES.reset(token)


def _numbered(label: str) -> str:
    known = _PHASES.get()
    found = None if known is None else known.number(label)
    return label if known is None or found is None else f"[{found}/{len(known.labels)}] {label}"


class Progress:
    """Context manager over `total` units of work.

        with Progress(tokens, label="capture") as bar:
            bar.advance(1024, "layer 3 of 30")

    `done` units were finished by an earlier run: they count as progress, not as speed.
    `enabled=False` is silent, and so is all inside `showing(QUIET)`; `stream` is a text file
    (standard error by default).
    """

    def __init__(
        self,
        total: float | int,
        *,
        label: str,
        unit: str = "tokens",
        done: float | int = 0,
        stream: Any = None,
        enabled: bool = True,
    ):
        self.total, self.unit, self.done = total, unit, done
        self.label = _numbered(label)
        self._stream = sys.stderr if stream is None else stream
        self._shown = shown.CURRENT.get()
        self._enabled = enabled and self._shown.level > shown.QUIET
        self._at_start = done
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if self._enabled and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                _Rate(self),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self.label, total=self.total, note="")
            self._bar.update(self._task, completed=self.done)
            self._bar.start()
        elif self._enabled and self._shown.level >= shown.ALL:
            percent = 100 * self.done / self.total if self.total else 0.0
            before = f" at {percent:.0f}%, done before" if self.done else ""
            print(f"{self._at()}{self.label} begins{before}", file=self._stream, flush=True)
        return self

    def advance(self, amount: float | int, note: str = "") -> None:
        """`amount` more units are done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        finished = self.done >= self.total * (1 - 1e-9)
        wait = max(LOG_EVERY_S, 0.1 * (now - self._start))
        last = finished and (now - self._start >= SHORT_S or self._shown.level >= shown.ALL)
        if self._enabled and (now - self._last_line >= wait or last):
            self._last_line = now
            print(self.line(note), file=self._stream, flush=True)

    @property
    def rate(self) -> float:
        """Units per second of this run, 0 before the first."""
        return (self.done - self._at_start) / max(time.monotonic() - self._start, 1e-9)

    def _at(self) -> str:
        """How long the command has run, before a line; nothing outside of one."""
        since = self._shown.since
        return "" if since is None else f"{clock(time.monotonic() - since)}  "

    def line(self, note: str = "") -> str:
        """The plain log line: time of the whole command, percentage, rate, time left."""
        left = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        eta = clock(max(left, 0.0))
        percent = 100 * self.done / self.total if self.total else 100.0
        tail = f"  {note}" if note else ""
        head = f"{self._at()}{self.label}"
        return f"{head} {percent:3.0f}%  {self.rate:.0f} {self.unit}/s  ETA {eta}{tail}"

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Rate(ProgressColumn):
    def __init__(self, owner: Progress):
        super().__init__()
        self._owner = owner

    def render(self, task: Task) -> Text:
        return Text(f"{self._owner.rate:.0f} {self._owner.unit}/s")


def clock(seconds: float | int) -> str:
    """Seconds as h:mm:ss, or "?" when unknown."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
