"""The strict reader of every JSON file that this project writes and reads again.

The file stays what it is, dicts and lists; a dataclass says which fields there are, of what type
and within what bounds (`turboq.plan.read`). A missing, unknown or mistyped field is one line with
its path, and so is anything that is no JSON. Own fields begin with `x-`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError
from turboq.plan.errors import PlanError
from turboq.plan.read import read
from turboq.plan.strict import parse_json


def read_json(
    path: Path, kind: type, *, otherwise: str, first: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """The JSON object in a file, after every field of it has been checked against `kind`.

    `first` looks at the value before that (a version); it raises `PlanError`.

    Raises:
      TurboqError: the file is missing, is not JSON (NaN is not), or has a missing, unknown or
        mistyped field; `otherwise` is the advice that ends the message.
    """
    try:
        value = parse_json(path.read_bytes())
        if first is not None:
            first(value)
        read(kind, value, "", {})
    except FileNotFoundError:
        raise TurboqError(f"{path} does not exist: {otherwise}") from None
    except OSError as error:
        raise TurboqError(f"cannot read {path}: {error.strerror or error}") from None
    except PlanError as error:
        raise TurboqError(f"{error.in_file(str(path))}: {otherwise}") from None
    return value
