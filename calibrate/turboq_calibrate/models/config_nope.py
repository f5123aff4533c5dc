"""Layers without a rotary embedding (NoPE), from a `config.json`."""

from __future__ import annotations

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader

LIST, INTERVAL = "no_rope_layers", "no_rope_layer_interval"
SWITCH = "position_embedding_type"


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


def all_or_none(read: Reader, count: int) -> list[bool]:
    """The same of models in which all do if `position_embedding_type` is "rope", else none."""
    kind = read.config.get(SWITCH)
    if kind not in (None, "nope", "rope"):
        raise TurboqError(f"{read.where}: {SWITCH}={quoted(kind)} must be rope, nope or null")
    return [kind == "rope"] * count
