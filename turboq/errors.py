"""The one error that is meant for the user: says what is wrong, the value, and the fix."""


class TurboqError(ValueError):
    """Bad input. Commands print it as one line and exit with 1."""
