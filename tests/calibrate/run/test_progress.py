"""Progress bars and their plain fallback."""

import io
import math
import re

import pytest

from turboq_calibrate.run import progress, shown
from turboq_calibrate.run.progress import Progress, clock


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_show_rate_and_eta(monkeypatch):
    time, out = Clock(monkeypatch), io.StringIO()
    with Progress(1000.0, label="capture", done=200.0, stream=out) as bar:
        for _ in range(8):
            time.now += 20.0
            bar.advance(100.0, "layer 1 of 2")
    lines = out.getvalue().splitlines()
    # At 40 s: 400 of 1000 done, 200 of them by this run, 600 left at 5 a second.
    assert lines[0] == "capture  40%  5 tokens/s  ETA 0:02:00  layer 1 of 2"
    assert lines[-1] == "capture 100%  5 tokens/s  ETA 0:00:00  layer 1 of 2"
    assert len(lines) == 4  # one per 30 s at most, and the last


def test_a_long_run_has_few_lines(monkeypatch):
    """Ten hours in steps of a second: every 30 s for 300 s, then each at 1.1 times the last."""
    time, out = Clock(monkeypatch), io.StringIO()
    with Progress(36000.0, label="observe", stream=out) as bar:
        for _ in range(36000):
            time.now += 1.0
            bar.advance(1.0)
    lines = len(out.getvalue().splitlines())
    assert lines == pytest.approx(10 + math.log(36000 / 300) / math.log(1 / 0.9), abs=4)


def test_phases_are_numbered(monkeypatch):
    time, out = Clock(monkeypatch), io.StringIO()
    with progress.phases("self:", "observe"):
        for label in ("self:3 from ''", "observe", "other"):
            with Progress(1.0, label=label, stream=out) as bar:
                time.now += 1.0
                bar.advance(1.0)
    with Progress(1.0, label="observe", stream=out) as bar:
        time.now += 1.0
        bar.advance(1.0)
    heads = [line.partition(" 100%")[0] for line in out.getvalue().splitlines()]
    assert heads == ["[1/2] self:3 from ''", "[2/2] observe", "other", "observe"]


def test_a_label_that_stands_twice_is_two_phases(monkeypatch):
    time, out = Clock(monkeypatch), io.StringIO()
    with progress.phases("fit", "costs", "fit", "costs", "evaluate"):
        for label in ("fit", "costs", "fit", "costs", "evaluate", "fit"):
            with Progress(1.0, label=label, stream=out) as bar:
                time.now += 1.0
                bar.advance(1.0)
    heads = [line.partition(" 100%")[0] for line in out.getvalue().splitlines()]
    numbered = ["[1/5] fit", "[2/5] costs", "[3/5] fit", "[4/5] costs", "[5/5] evaluate"]
    assert heads == [*numbered, "[3/5] fit"]  # once more: never a number that is not there


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (shown.QUIET, []),
        (shown.USUAL, ["0:00:33  [2/2] costs 100%"]),
        (
            shown.ALL,
            ["0:00:30  [1/2] fit begins", "0:00:30  [1/2] fit 100%",
             "0:00:30  [2/2] costs begins at 40%, done before", "0:00:33  [2/2] costs 100%"],
        ),
    ],
)  # fmt: skip
def test_lines_begin_with_the_commands_time_and_short_steps_have_none(level, lines, monkeypatch):
    time, out = Clock(monkeypatch), io.StringIO()
    with shown.showing(level), progress.phases("fit", "costs"):
        time.now += 30.0
        for label, done, seconds in (("fit", 0.0, 0.4), ("costs", 4.0, 2.6)):
            with Progress(10.0, label=label, done=done, stream=out) as bar:
                time.now += seconds
                bar.advance(10.0 - done)
    found = [re.sub(r"100%  .*", "100%", line) for line in out.getvalue().splitlines()]
    assert found == lines


def test_silent_when_disabled():
    out = io.StringIO()
    with Progress(10.0, label="x", stream=out, enabled=False) as bar:
        bar.advance(10.0)
    assert out.getvalue() == ""


def test_terminals_get_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    time, out = Clock(monkeypatch), Terminal()
    with Progress(100.0, label="evaluate", unit="windows", stream=out) as bar:
        time.now += 2.0
        bar.advance(100.0, "plan 3")
    assert "evaluate" in out.getvalue()
    assert "100%" in out.getvalue()
    assert "50 windows/s" in out.getvalue()
    assert "plan 3" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00:00"), (59.6, "0:01:00"), (3661.0, "1:01:01"), (float("inf"), "?")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
