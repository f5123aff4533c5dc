"""Public names of a package, imported when first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def find(package: str, names: Mapping[str, str], name: str) -> Any:
    """The object `name` of its module `names[name]` (or that module's submodule), then kept.

    Raises:
      AttributeError: the package offers no such name.
    """
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(names[name])
    found = getattr(module, name, None)
    if found is None:
        found = importlib.import_module(f"{names[name]}.{name}")
    setattr(sys.modules[package], name, found)
    return found
