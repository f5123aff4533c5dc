"""A JSON object from a file of somebody else: whatever is wrong with it is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError, shortened


def read_object(path: Path, fix: str = "") -> dict[str, Any]:
    """The object that a file holds; `fix` ends every error.

    Raises:
      TurboqError: unreadable, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    fix = f": {fix}" if fix else ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TurboqError(f"cannot read {path}: {error.strerror or error}{fix}") from error
    except ValueError as error:
        raise TurboqError(f"{path} is not valid JSON: {shortened(error)}{fix}") from error
    except RecursionError:
        raise TurboqError(f"{path} is not valid JSON: nested too deeply{fix}") from None
    if not isinstance(value, dict):
        raise TurboqError(f"{path} must hold a JSON object, not {type(value).__name__}{fix}")
    return value
