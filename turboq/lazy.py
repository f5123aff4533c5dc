"""Public names of a package, imported when first used."""

# pyright: strict

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def find(package: str, names: Mapping[str, str], name: str) -> Any:
    """The object `name` of `names[name]`, then kept.

    That is a module (which has it, or holds it as a submodule), or "module:other_name".

    Raises:
      AttributeError: the package offers no such name.
    """
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    place, _, other = names[name].partition(":")
    found = getattr(importlib.import_module(place), other or name, None)
    if found is None:
        found = importlib.import_module(f"{place}.{name}")
    setattr(sys.modules[package], name, found)
    return found
