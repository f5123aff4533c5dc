"""The one error that is meant for the user: says what is wrong, the value, and the fix."""

import itertools
import reprlib

LONGEST = 80  # characters quoted of a value that somebody else wrote

_REPR = reprlib.Repr()  # never builds the whole of a large value
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = LONGEST


class TurboqError(ValueError):
    """Bad input. Commands print it as one line and exit with 1."""


class TurboqWarning(UserWarning):
    """Input that is used, though not as it says of itself. Commands print it as one line."""


def quoted(value: object) -> str:
    """A value from a file as errors show it: its repr on one line, at most `LONGEST` characters."""
    return shortened(_REPR.repr(value), LONGEST)


def shortened(text: object, longest: int = 2 * LONGEST) -> str:
    """Words of a file or of another package on one line, at most `longest` characters.

    What a terminal would obey instead of showing it (control characters) is escaped.
    """
    line = " ".join(str(text).split())
    if not line.isprintable():
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        line = "".join(itertools.islice(shown, longest + 1))
    return line if len(line) <= longest else line[: longest - 3] + "..."
