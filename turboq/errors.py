"""The one error that is meant for the user: says what is wrong, the value, and the fix."""

# pyright: strict

import reprlib

LONGEST = 80  # characters quoted of a value that somebody else wrote

_REPR = reprlib.Repr()  # never builds the whole of a large value
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = LONGEST


class TurboqError(ValueError):
    """Bad input. Commands print it as one line and exit with 1.

    What a terminal would obey instead of showing it (control characters of a name that somebody
    else wrote) is escaped. It is a ValueError, and everything that a user can cause is one.

    Examples:
      >>> import turboq
      >>> try:
      ...     turboq.load("no/such/folder")
      ... except turboq.TurboqError as error:
      ...     print(error)
      no/such/folder: no such plan: write one with `turboq plan`
    """

    def __init__(self, message: object = ""):
        super().__init__(_visible(str(message)))


class TurboqWarning(UserWarning):
    """Input that is used, though not as it says of itself. Commands print it as one line."""


def quoted(value: object) -> str:
    """A value from a file as errors show it: its repr on one line, at most `LONGEST` characters."""
    return shortened(_REPR.repr(value), LONGEST)


def shortened(text: object, longest: int = 2 * LONGEST) -> str:
    """Words of a file or of another package on one line, at most `longest` characters."""
    # An escape is longer than what it stands for: cut before, and after.
    line = _visible(" ".join(str(text).split())[: longest + 1])
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in text
    )
