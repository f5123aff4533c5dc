"""How much a command says while it runs, and since when it runs; imports nothing heavy."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator

QUIET, USUAL, ALL = -1, 0, 1  # results and errors; progress; every step as it begins, every file


@dataclasses.dataclass(frozen=True)
class Shown:
    """`since`: when the command began (`time.monotonic`); None outside of one."""

    level: int = USUAL
    since: float | None = None


_OUTSIDE = Shown()
CURRENT: contextvars.ContextVar[Shown] = contextvars.ContextVar("shown", default=_OUTSIDE)


@contextlib.contextmanager
def showing(level: int) -> Iterator[None]:
    """A command that begins here and says so much; at ALL also what `turboq.files` writes."""
    token = CURRENT.set(Shown(level, time.monotonic()))
    logger, handler = logging.getLogger("turboq"), logging.StreamHandler(sys.stderr)
    before = logger.level, logger.propagate
    if level >= ALL:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # absl has a handler of its own
    try:
        yield
    finally:
        CURRENT.reset(token)
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
