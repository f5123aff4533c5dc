"""Typed access to a model's `config.json`: errors name the field, the value and the model."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

from turboq.errors import TurboqError, quoted

LARGEST = 2**48
# What works instead of weights in a format that is not read.
OTHER_WEIGHTS = "give the checkpoint that they were made from, or a GGUF file"


class Reader:
    """Typed access to a configuration; errors name the field and the value."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where = config, where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise TurboqError(f"{self.where}: {key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST:
            raise TurboqError(
                f"{self.where}: {key}={quoted(value)} must be a positive whole number below 2^48"
            )
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number that may be 0, as which null counts."""
        value = self.config.get(key, default)
        return 0 if value is None or (value == 0 and value is not False) else self.integer(key)

    def number(self, key: str, default: float) -> float:
        return positive(self.config.get(key, default), key, self.where)

    def optional(self, key: str) -> float | None:
        """A positive number, None where it is absent or null."""
        return None if self.config.get(key) is None else self.number(key, 1.0)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise TurboqError(f"{self.where}: {key}={quoted(value)} must be true or false")
        return value


def nearest(name: object, known: Iterable[str]) -> str:
    """The name of `known` that is like `name`, or all of them, for an error."""
    known = list(known)
    close = difflib.get_close_matches(str(name)[:99], known, n=1, cutoff=0.7)
    return f"nearest: {close[0]}" if close else f"supported: {', '.join(known)}"


def contradiction(where: str, said: str, used: str = "") -> TurboqError:
    """The error for two fields that say one thing differently.

    Args:
      said: both, with their values.
      used: the one that transformers reads, if it is the same one for every model type.
    """
    way = "the model's authors must mend the file"
    if used:
        way = f"transformers reads {used}, as does a copy of the file without the other here"
    return TurboqError(f"{where}: {said} contradict each other: {way}")


def positive(value: Any, key: str, where: str) -> float:
    """`value` as a positive finite float, or a TurboqError naming `key`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise TurboqError(f"{where}: {key}={quoted(value)} must be a positive number")
    return float(value)
