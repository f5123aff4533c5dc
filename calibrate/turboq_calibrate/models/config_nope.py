"""Layers without a rotary embedding (NoPE), from a `config.json`."""

from __future__ import annotations

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader

LIST, INTERVAL = "no_rope_layers", "no_rope_layer_interval"


def rotated_layers(read: Reader, count: int) -> list[bool]:
    """Whether each layer rotates queries and keys: as `no_rope_layers` says (1: it does), or all
    but every `no_rope_layer_interval`-th (default: 4th).

    Raises:
      TurboqError: a list that does not say 0 or 1 of every layer, or an interval that is no number.
    """
    said = read.config.get(LIST)
    if said is None:
        interval = read.integer(INTERVAL, 4)
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(said, list) or len(said) != count or any(x not in (0, 1) for x in said):
        raise TurboqError(
            f"{read.where}: {LIST}={quoted(said)} must hold 0 or 1 for each of the {count} layers"
        )
    return [bool(x) for x in said]
