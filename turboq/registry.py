"""Codecs, engines and tasks by name: turboq's own, and those of other packages.

Another package names its own in `pyproject.toml`, or registers them in the running program:

    [project.entry-points."turboq.codecs"]          @CODECS.register
    "my_codecs.sign" = "my_codecs:Sign"             class Sign(Codec): name = "my_codecs.sign"

Such a name is PACKAGE.NAME: names never clash, and a plan says what must be installed to read it.
Packages are imported when a name is first asked for that is none of ours, or all are listed.
"""

# pyright: strict

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from turboq.errors import TurboqError, TurboqWarning, quoted, shortened

_NAME = re.compile(r"([a-z0-9_]{1,64})\.[a-z0-9_]{1,64}")


class Registry[T](Mapping[str, T]):
    """Ours by name, and what `group` of entry points and `register` add.

    A mapping name -> object. `check` gives the object to keep, or raises TurboqError for one that
    is none.

    Raises:
      KeyError: looked up a name that is not there (`missing` says what to install).
      TurboqError: registered what is none, or under a name that is taken.

    Examples:
      >>> from turboq import CODECS
      >>> CODECS["turboquant_mse"](dim=128, bits=3).bits_per_channel
      3.125
      >>> "per_head" in CODECS, "no_such_codec" in CODECS
      (True, False)
    """

    def __init__(self, group: str, ours: Iterable[T], check: Callable[[object], T]):
        self.group, self._check, self._loaded = group, check, False
        self._found: dict[str, T] = {x.name: x for x in ours}  # type: ignore[attr-defined]
        self._failed: dict[str, str] = {}  # package -> why

    def register[X](self, found: X) -> X:
        """Adds one; a decorator of its class.

        Raises:
          TurboqError: it is of another kind, its name is not PACKAGE.NAME, or the name is taken.
        """
        self._add(found, None)
        return found

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._found)

    def __len__(self) -> int:
        self._load()
        return len(self._found)

    def missing(self, name: str) -> str:
        """What to do about a name PACKAGE.NAME that is not here; "" for any other name."""
        match = _NAME.fullmatch(name)
        if match is None or name in self:
            return ""
        package = match[1]
        if package in self._failed:
            return f"{quoted(name)} is of package {package}, which failed: {self._failed[package]}"
        pip = package.replace("_", "-")
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{quoted(name)} is of package {package}: install it (pip install {pip})"
        return (
            f"package {package} {version} has no {quoted(name)} for {self.group}: "
            f"install a version that has (pip install --upgrade {pip})"
        )

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # a package may ask for ours while it is imported
        for entry in importlib.metadata.entry_points(group=self.group):
            package = re.sub(r"[-.]+", "_", entry.dist.name if entry.dist else entry.name).lower()
            try:
                self._add(entry.load(), package)
            except Exception as error:  # anything may happen in a module that is not ours
                why = shortened(f"{type(error).__name__}: {error}")
                self._failed[package] = why
                warnings.warn(
                    TurboqWarning(
                        f"package {package}: {entry.name} = {entry.value} ({self.group}) is left "
                        f"out: {why}"
                    ),
                    stacklevel=3,
                )

    def _add(self, found: object, package: str | None) -> None:
        kept = self._check(found)
        name = cast(object, kept.name)  # type: ignore[attr-defined]
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if not isinstance(name, str) or match is None or package not in (None, match[1]):
            raise TurboqError(
                f"name {quoted(name)} must be {package or 'PACKAGE'}.NAME in lower case, where "
                "PACKAGE is what is installed"
            )
        if name in self._found and _path(self._found[name]) != _path(kept):
            raise TurboqError(f"{name} is registered already, as {_path(self._found[name])}")
        self._found[name] = kept


def _path(thing: object) -> str:
    cls = thing if isinstance(thing, type) else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"
