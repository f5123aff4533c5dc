"""Rotary embeddings from a `config.json`: v5's `rope_parameters`, v4's `rope_theta` and
`rope_scaling`."""

from __future__ import annotations

from typing import Any

from turboq.errors import TurboqError, quoted
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models.config_fields import Reader, positive
from turboq_calibrate.models.config_windows import FULL, SLIDING


def read_ropes(
    read: Reader, head_dim: int, context: int, theta: float, sliding_theta: float | None
) -> tuple[Rope, Rope]:
    """Rotary embeddings of full and of sliding layers; the same without a `sliding_theta`.

    `theta` and `sliding_theta` are the bases where the file names none. Scaling that v4 names
    without a kind of layer is that of full layers.
    """
    if head_dim % 2:
        raise TurboqError(f"{read.where}: head_dim={head_dim} must be even for rotary embedding")
    if sliding_theta is None:
        both = _rope(read, head_dim, context, theta)
        return both, both
    by_kind = read.config.get("rope_parameters") or {}
    if not isinstance(by_kind, dict) or not set(by_kind) <= {FULL, SLIDING}:
        raise TurboqError(
            f"{read.where}: rope_parameters={quoted(by_kind)} must be given for {FULL} and "
            f"{SLIDING} apart"
        )
    full = read.config | {"rope_parameters": by_kind.get(FULL)}
    sliding = {
        "rope_parameters": by_kind.get(SLIDING),
        "rope_theta": read.config.get("rope_local_base_freq"),
    }
    return (
        _rope(Reader(full, read.where), head_dim, context, theta),
        _rope(Reader(sliding, f"{read.where}, sliding layers"), head_dim, context, sliding_theta),
    )


def _rope(read: Reader, head_dim: int, context: int, base: float) -> Rope:
    """The rotary embedding; where v4's and v5's names both describe it, they must agree."""
    names = [k for k in ("rope_parameters", "rope_scaling") if read.config.get(k) not in (None, {})]
    found = {name: _rope_of(read, read.config[name], head_dim, context, base) for name in names}
    if len(set(found.values())) > 1:
        said = " but ".join(f"{name}={quoted(read.config[name])}" for name in names)
        raise TurboqError(f"{read.where}: {said}: leave one of them out of a copy of the file")
    return found[names[0]] if names else _rope_of(read, {}, head_dim, context, base)


def _rope_of(read: Reader, fields: Any, head_dim: int, context: int, base: float) -> Rope:
    if not isinstance(fields, dict) or any(isinstance(v, dict) for v in fields.values()):
        raise TurboqError(f"{read.where}: rope parameters {quoted(fields)} are not supported")
    partial = _said_once(read, fields, "partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise TurboqError(f"{read.where}: partial_rotary_factor={quoted(partial)} is not supported")
    theta = _said_once(read, fields, "rope_theta")
    theta = base if theta is None else positive(theta, "rope_theta", read.where)

    def need(key: str, default: Any = None) -> float:
        return positive(fields.get(key, default), f"rope {key}", read.where)

    kind = _rope_type(read, fields)
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = Scaling(type="linear", factor=need("factor"))
        case "llama3":
            low, high = need("low_freq_factor"), need("high_freq_factor")
            if low >= high:
                raise TurboqError(f"{read.where}: rope {low=} must be below {high=}")
            original = need("original_max_position_embeddings", context)
            scaling = Scaling(
                type="llama3", factor=need("factor"), low_freq_factor=low, high_freq_factor=high,
                original_context=original,
            )  # fmt: skip
        case _:
            raise TurboqError(
                f"{read.where}: rope type {quoted(kind)} is not supported (supported: default, "
                "linear, llama3)"
            )
    return Rope(theta=theta, dim=head_dim, scaling=scaling)


def _said_once(read: Reader, fields: dict[str, Any], key: str) -> Any:
    """A field of v5's `rope_parameters` that v4 has beside it; None where neither says it."""
    inside, beside = fields.get(key), read.config.get(key)
    if None not in (inside, beside) and inside != beside:
        raise TurboqError(
            f"{read.where}: {key}={quoted(beside)} but {quoted(inside)} among the rope parameters: "
            "leave one of them out of a copy of the file"
        )
    return beside if inside is None else inside


def _rope_type(read: Reader, fields: dict[str, Any]) -> Any:
    kinds = [fields[key] for key in ("rope_type", "type") if fields.get(key) is not None]
    if kinds[1:] and kinds[0] != kinds[1]:
        raise TurboqError(f"{read.where}: {quoted(fields)} names two rope types: name one")
    if not kinds and fields.get("factor") is not None:
        raise TurboqError(f"{read.where}: {quoted(fields)} names no rope type: add rope_type")
    return kinds[0] if kinds else "default"
