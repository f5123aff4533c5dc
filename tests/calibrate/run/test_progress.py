"""Progress bars and their plain fallback."""

import io

import pytest

from turboq_calibrate.run import progress
from turboq_calibrate.run.progress import Progress, clock


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_show_rate_and_eta(monkeypatch):
    time, out = Clock(monkeypatch), io.StringIO()
    with Progress(1000.0, label="capture", done=200.0, stream=out) as bar:
        for _ in range(8):
            time.now += 4.0
            bar.advance(100.0, "layer 1 of 2")
    lines = out.getvalue().splitlines()
    # At 8 s: 400 of 1000 done, 200 of them by this run, 600 left at 25 a second.
    assert lines[0] == "capture  40%  25 tokens/s  ETA 0:00:24  layer 1 of 2"
    assert lines[-1] == "capture 100%  25 tokens/s  ETA 0:00:00  layer 1 of 2"
    assert len(lines) == 4  # one per 5 s at most, and the last


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
