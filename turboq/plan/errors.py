"""Errors of a plan: always a path into the document, always one line."""

from __future__ import annotations

import json
import re
from typing import Any

from turboq.errors import TurboqError, shortened

_MAX_REASON = 320
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")


class PlanError(TurboqError):
    """One field is wrong by itself; the published JSON Schema refuses it too."""

    def __init__(self, path: str, reason: str):
        self.path = path
        self.reason = shortened(reason, _MAX_REASON)
        text = f"{path}: {self.reason}" if path else self.reason
        super().__init__(" ".join(text.split()))

    def under(self, path: str) -> PlanError:
        """The same error seen from an object further out."""
        return type(self)(join(path, self.path), self.reason)

    def in_file(self, file: str) -> PlanError:
        """The same error with the file's name in front."""
        return type(self)(f"{file}: {self.path}" if self.path else file, self.reason)


class PlanConflict(PlanError):
    """Every field is well formed, but fields, files or models disagree. No schema can tell."""


def join(path: str, key: str) -> str:
    """Path of a member: `join("layers[3]", "k.bits")` is "layers[3].k.bits"."""
    if not path or not key or key.startswith("["):
        return path + key
    return f"{path}.{key}"


def member(path: str, key: str | int) -> str:
    """Path of an array item or of an object's field, quoted when the name is not a plain word."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return join(path, key if _PLAIN_KEY.fullmatch(key) else f"[{shown(key)}]")


def shown(value: Any) -> str:
    """A value in an error: JSON on one line, at most 60 characters."""
    return shortened(json.dumps(value, default=str), 60)
