"""Public names of a package, imported when first used; those of the last version work once more."""

# pyright: strict

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any


def find(
    package: str, names: Mapping[str, str], name: str, *, renamed: Mapping[str, str] | None = None
) -> Any:
    """The object `name` of `names[name]`, then kept.

    That is a module (which has it, or holds it as a submodule), or "module:other_name". A name of
    `renamed` is found likewise, with a DeprecationWarning that says where it is, every time.

    Raises:
      AttributeError: the package offers no such name.
    """
    if renamed is not None and name in renamed:
        now = renamed[name].replace(":", ".")
        warnings.warn(
            f"{package}.{name} is {now} now; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=3,
        )
        return _load(renamed[name], name)
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = _load(names[name], name)
    setattr(sys.modules[package], name, found)
    return found


def _load(place: str, name: str) -> Any:
    module, _, other = place.partition(":")
    found = getattr(importlib.import_module(module), other or name, None)
    return importlib.import_module(f"{module}.{name}") if found is None else found
