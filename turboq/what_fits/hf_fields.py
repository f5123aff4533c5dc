"""Typed access to the fields of a `config.json`: one name per thing, and errors that name it.

A field that may change the cache and is not understood is refused wherever it stands, nested ones
by their path (`attn_config.kv_magic`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turboq.errors import TurboqError, quoted, shortened
from turboq.what_fits import field_names

# The way out for any model; said in full, as other advice (leaving the field out) changes counts.
BY_HAND = (
    "name --geometry=LAYERSxKVHEADSxDIM, with LAYERS the layers that keep every token and KVHEADS "
    "the heads that are stored"
)
ENCODER_DECODER = (
    "is an encoder with a decoder: what the decoder keeps of itself and of the encoder's output is "
    "not counted here: name a model that is a decoder alone"
)


class Fields:
    """Fields of one configuration under their main names (`field_names.ALIASES`)."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where
        self.asked: set[str] = set()  # fields that decided something, or could have
        self.given = {field: name for field in field_names.ALIASES if (name := self._given(field))}

    def _given(self, field: str) -> str | None:
        """The name under which `field` is given.

        Raises:
          TurboqError: two names of it have different values.
        """
        found = [n for n in field_names.aliases_of(field) if self._at(n) is not None]
        for other in found[1:]:
            if self._at(other) != self._at(found[0]):
                raise TurboqError(
                    f"{self.where}: {found[0]}={quoted(self._at(found[0]))} and "
                    f"{other}={quoted(self._at(other))} are at odds"
                )
        return found[0] if found else None

    def _at(self, path: str) -> Any:
        """The value at `path`, None where it or a folder of it is absent."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def get(self, key: str) -> Any:
        """The value of `key` under any of its names; None if absent."""
        self.asked.add(key)
        return self._at(self.given.get(key, key))

    def fail(self, key: str, why: str) -> TurboqError:
        key = self.given.get(key, key)
        return TurboqError(f"{self.where}: {shortened(key)}={quoted(self._at(key))} {why}")

    def optional(self, *keys: str, high: int) -> int | None:
        self.asked.update(keys)
        key = next((k for k in keys if self.get(k) is not None), None)
        return None if key is None else self.number(key, self.get(key), high)

    def integer(self, *keys: str, high: int, default: int | None = None) -> int:
        found = self.optional(*keys, high=high)
        if found is None and default is None:
            raise TurboqError(f"{self.where}: {keys[0]} is missing")
        return default if found is None else found  # pyright: ignore[reportReturnType]

    def number(self, key: str, value: Any, high: int, low: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"must be a whole number of {low}..{high}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def names(self, key: str, count: int) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(key, f"must list one kind for each of the {count} layers")
        return value

    def switches(self, key: str, count: int) -> list[bool]:
        """A list of 0 or 1 (or true and false), one per layer."""
        value = self.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(x not in (0, 1) for x in value)
        ):
            raise self.fail(key, f"must be 0 or 1 for each of the {count} layers")
        return [bool(x) for x in value]

    def inner(self, key: str) -> Fields:
        """The fields of a nested object; without any if it is absent."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.fail(key, "must be an object")
        return Fields(value, f"{self.where}: {key}")

    def refuse_unasked(self, file: Mapping[str, Any], model_type: str) -> None:
        """Raises TurboqError for the first known field of `file` that no layer asked for."""
        quiet = self.asked | field_names.QUIET
        for name in self.config.keys() & file.keys() & field_names.READ:
            if field_names.main_name(name) not in quiet and not is_off(file[name]):
                raise TurboqError(
                    f"{self.where}: {name}={quoted(file[name])} may change the cache, and is not "
                    f"what layers of model_type {quoted(model_type)} use: {BY_HAND}"
                )

    def refuse_unknown(self, beside: frozenset[str] = frozenset()) -> None:
        """Raises TurboqError for the first field that may change the cache and is not known.

        Args:
          beside: further names that are harmless in this file.
        """
        for path, value in _unknown(self.config, field_names.READ | beside):
            raise TurboqError(
                f"{self.where}: {shortened(path)}={quoted(value)} is not understood and may change "
                f"the cache: {BY_HAND}"
            )


def refuse_beside(config: Mapping[str, Any], parts: tuple[str, ...], where: str) -> None:
    """Raises TurboqError for an unknown field beside the language model's part of a file."""
    rest = {k: v for k, v in config.items() if k not in parts}
    Fields(rest, where).refuse_unknown()


def is_off(value: Any) -> bool:
    """Whether a field is switched off: null, false, 0 or empty."""
    return value is None or value is False or value in (0, "", [], {})


def _unknown(
    config: Mapping[str, Any], known: frozenset[str], path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Fields, with their paths, that may change the cache and are neither known nor harmless."""
    for key, value in config.items():
        if not isinstance(key, str) or is_off(value) or key in field_names.OTHER_PARTS:
            continue
        here = f"{path}.{key}" if path else key
        if field_names.is_harmless(key):
            if key not in field_names.FREE:
                yield from _within(value, here)
        elif key in known:
            if key in field_names.CONTAINERS and key != "per_layer_config":
                yield from _parts(value, field_names.CONTAINERS[key], here)
        elif (
            field_names.speaks(key)
            or (path and key in field_names.READ)
            or field_names.lists_layers(key, value)
        ):
            yield here, value
        else:
            yield from _parts(value, frozenset(), here)


def _parts(value: Any, known: frozenset[str], path: str) -> Iterator[tuple[str, Any]]:
    """`_unknown` of an object, or of the objects in a list."""
    if isinstance(value, Mapping):
        yield from _unknown(value, known, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parts(item, known, f"{path}[{index}]")


def _within(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Fields of the cache inside a harmless object or list."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _within(item, f"{path}[{index}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in field_names.OTHER_PARTS or is_off(item):
                continue
            if field_names.speaks_within(str(key)):
                yield f"{path}.{key}", item
            yield from _within(item, f"{path}.{key}")
