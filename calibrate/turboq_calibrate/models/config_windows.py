"""Which layers slide, from a `config.json`: one function per habit, families name theirs.

Each returns the window of every layer in tokens, None where attention is full.
"""

from __future__ import annotations

from typing import Any

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader, contradiction
from turboq_calibrate.models.config_nope import rotated_layers

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = list[int | None]


def never(read: Reader, count: int) -> Windows:
    """No window is supported."""
    if read.config.get("sliding_window") is not None or read.config.get("layer_types"):
        raise TurboqError(f"{read.where}: sliding_window and layer_types are not supported")
    return [None] * count


def none(read: Reader, count: int) -> Windows:
    """No layer slides; `layer_types` says something else."""
    del read
    return [None] * count


def always(read: Reader, count: int, default: int | None) -> Windows:
    """Every layer slides where there is a window."""
    if read.config.get("layer_types"):
        raise TurboqError(f"{read.where}: layer_types is not supported")
    return [_window(read, default)] * count


def always_or_listed(read: Reader, count: int) -> Windows:
    """Every layer slides where there is a window, or as `layer_types` says."""
    window, types = _window(read, 4096), read.config.get("layer_types")
    if types is not None:
        return _by_type(read, count, types, window, "sliding_window is null")
    return [window] * count


def switched(read: Reader, count: int) -> Windows:
    """With `use_sliding_window` layers from `max_window_layers` on, or as `layer_types` says."""
    window = _switch(read)
    types = read.config.get("layer_types")
    if types is not None:
        return _by_type(read, count, types, window, "use_sliding_window is off")
    first = _first(read)
    return [window if i >= first else None for i in range(count)]


def switched_unrotated(read: Reader, count: int) -> Windows:
    """With `use_sliding_window` layers without rotary embedding, or as `layer_types` says."""
    window = _switch(read, None)
    types = read.config.get("layer_types")
    if types is not None:
        return _by_type(read, count, types, window, "use_sliding_window is off or has no window")
    return [None if rotated else window for rotated in rotated_layers(read, count)]


def switched_everywhere(read: Reader, count: int) -> Windows:
    """With `use_sliding_window` every layer."""
    if read.config.get("layer_types"):
        raise TurboqError(f"{read.where}: layer_types is not supported")
    return [_switch(read)] * count


def switched_alternating(read: Reader, count: int) -> Windows:
    """With `use_sliding_window` every other layer before `max_window_layers`, the first included,
    or as `layer_types` says."""
    window = _switch(read)
    types = read.config.get("layer_types")
    if types is not None:
        return _by_type(read, count, types, window, "use_sliding_window is off")
    first = _first(read)
    return [window if i < first and i % 2 == 0 else None for i in range(count)]


def every_nth_full(read: Reader, count: int, n: int) -> Windows:
    """All but every n-th layer, `sliding_window_pattern` other than n, or as `layer_types` says."""
    names = [k for k in ("sliding_window_pattern", "_sliding_window_pattern") if k in read.config]
    periods = {read.integer(name) for name in names} or {n}
    if len(periods) > 1:
        said = " and ".join(f"{name}={read.config[name]}" for name in names)
        raise contradiction(read.where, said, names[0])
    types = read.config.get("layer_types")
    if types is None:
        types = [SLIDING if (i + 1) % max(periods) else FULL for i in range(count)]
    return _by_type(read, count, types, _window(read, 4096), "sliding_window is null")


def last_full(read: Reader, count: int, n: int) -> Windows:
    """As `every_nth_full`, but that the last layer is full, as transformers makes it.

    Raises:
      TurboqError: `layer_types` says that it slides.
    """
    if read.config.get("layer_types") is None:
        return [*every_nth_full(read, count, n)[:-1], None]
    windows = every_nth_full(read, count, n)
    if windows[-1] is not None:
        raise TurboqError(f"{read.where}: layer_types must end with {FULL}")
    return windows


def _switch(read: Reader, default: int | None = 4096) -> int | None:
    return _window(read, default) if read.boolean("use_sliding_window", False) else None


def _window(read: Reader, default: int | None) -> int | None:
    """The window; a null in the file is none, an absent field `default`."""
    if read.config.get("sliding_window", default) is None:
        return None
    return read.integer("sliding_window", default)


def _first(read: Reader) -> int:
    first = read.config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise TurboqError(f"{read.where}: max_window_layers={quoted(first)} must be 0 or more")
    return first


def _by_type(read: Reader, count: int, types: Any, window: int | None, why: str) -> Windows:
    known = (FULL, SLIDING)
    if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
        raise TurboqError(
            f"{read.where}: layer_types must name one of {', '.join(known)} for each of the "
            f"{count} layers"
        )
    if window is None and SLIDING in types:
        raise TurboqError(f"{read.where}: layer_types names {SLIDING} but {why}")
    return [window if t == SLIDING else None for t in types]
