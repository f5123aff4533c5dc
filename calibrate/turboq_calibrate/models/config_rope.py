"""Rotary embeddings from a `config.json`: v5's `rope_parameters`, v4's `rope_theta` and
`rope_scaling`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from turboq.errors import TurboqError, quoted
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models.config_fields import Reader, contradiction, positive
from turboq_calibrate.models.config_longrope import TYPES, longrope
from turboq_calibrate.models.config_windows import FULL, SLIDING
from turboq_calibrate.models.config_yarn import yarn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """How a model type rotates; `theta` and `partial` where the file does not say."""

    theta: float = 10000.0
    sliding_theta: float | None = None  # sliding layers have a rotary embedding of their own
    partial: float | None = None  # of a head's channels; None: all, and no other part is supported
    layout: Literal["half", "interleaved"] = "half"
    unscaled_sliding: bool = False  # sliding layers rotate with the same base, not scaled
    defaults: Mapping[str, Any] | None = None  # rope parameters of a file that names none
    long: bool = False  # longrope is read in its form for long sequences
    proportional: bool = False  # full layers may turn slower pairs not at all (`_proportional`)


class Turn(NamedTuple):
    """A rotary embedding, the factor on what it rotates, and for how many tokens it holds."""

    rope: Rope
    magnitude: float = 1.0
    context: int | None = None  # longer sequences would rotate otherwise
    all_dims: float = 1.0  # factor on whole queries and keys (latent attention)
    forms: int = 1  # of longrope one is for short sequences, one for long ones


def read_ropes(
    read: Reader, head_dim: int, context: int, rotation: Rotation, full_dim: int | None = None
) -> tuple[Turn, Turn]:
    """Rotary embeddings of full and of sliding layers; the same where a family has but one.

    Scaling that v4 names without a kind of layer is that of full layers, whose head dimension is
    `full_dim` where theirs is another.
    """
    full_dim = head_dim if full_dim is None else full_dim
    for dim in (head_dim, full_dim):
        if dim % 2:
            raise TurboqError(f"{read.where}: head_dim={dim} must be even for rotary embedding")
    if rotation.sliding_theta is None and not rotation.unscaled_sliding:
        both = _rope(read, head_dim, context, rotation)
        return both, both
    by_kind = read.config.get("rope_parameters") or {}
    if not isinstance(by_kind, dict) or not set(by_kind) <= {FULL, SLIDING}:
        raise TurboqError(
            f"{read.where}: rope_parameters={quoted(by_kind)} must be given for {FULL} and "
            f"{SLIDING} apart"
        )
    full = read.config | {"rope_parameters": by_kind.get(FULL)}
    base = "rope_theta" if rotation.unscaled_sliding else "rope_local_base_freq"
    sliding = {"rope_parameters": by_kind.get(SLIDING), "rope_theta": read.config.get(base)}
    theta = rotation.sliding_theta or rotation.theta
    other = dataclasses.replace(rotation, theta=theta, defaults=None, proportional=False)
    return (
        _rope(Reader(full, read.where), full_dim, context, rotation),
        _rope(Reader(sliding, f"{read.where}, sliding layers"), head_dim, context, other),
    )


GROWTH = "llama_4_scaling_beta"


def query_growth(read: Reader, rotation: Rotation, *, grows: bool) -> tuple[float, float] | None:
    """(b, n): queries at position p are multiplied by 1 + b ln(1 + floor(p / n)), as Llama 4 does.

    Raises:
      TurboqError: a family that does it has no b or n, or another has b.
    """
    names = [k for k in ("rope_parameters", "rope_scaling") if read.config.get(k)]
    fields = read.config[names[0]] if names else rotation.defaults or {}
    said = fields.get(GROWTH) if isinstance(fields, Mapping) else None
    if not grows:
        if said:
            raise TurboqError(f"{read.where}: {GROWTH}={quoted(said)} is not supported")
        return None
    original = "original_max_position_embeddings"
    return (
        positive(said, f"rope {GROWTH}", read.where),
        positive(fields.get(original), f"rope {original}", read.where),
    )


def _rope(read: Reader, head_dim: int, context: int, rotation: Rotation) -> Turn:
    """The rotary embedding; where v4's and v5's names both describe it, they must agree."""
    names = [k for k in ("rope_parameters", "rope_scaling") if read.config.get(k) not in (None, {})]
    if not names and rotation.defaults is not None:
        return _rope_of(read, dict(rotation.defaults), head_dim, context, rotation)
    found = {n: _rope_of(read, read.config[n], head_dim, context, rotation) for n in names}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name}={quoted(read.config[name])}" for name in names)
        by_kind = rotation.sliding_theta is not None or rotation.unscaled_sliding  # merged there
        raise contradiction(read.where, said, "" if by_kind else "rope_scaling")
    return found[names[0]] if names else _rope_of(read, {}, head_dim, context, rotation)


def _rope_of(read: Reader, fields: Any, head_dim: int, context: int, rotation: Rotation) -> Turn:
    if not isinstance(fields, dict) or any(isinstance(v, dict) for v in fields.values()):
        raise TurboqError(f"{read.where}: rope parameters {quoted(fields)} are not supported")
    theta = _said_once(read, fields, "rope_theta")
    theta = rotation.theta if theta is None else positive(theta, "rope_theta", read.where)
    kind = _rope_type(read, fields)
    if kind == "proportional" and rotation.proportional:
        return Turn(_proportional(read, fields, Rope(theta=theta, dim=head_dim)))
    rope = Rope(theta=theta, dim=_rotated(read, fields, head_dim, rotation), layout=rotation.layout)

    def need(key: str, default: Any = None) -> float:
        return positive(fields.get(key, default), f"rope {key}", read.where)

    match kind:
        case "default":
            return Turn(rope)
        case _ if kind in TYPES:
            return Turn(*longrope(read, fields, rope, context, long=rotation.long), forms=2)
        case "yarn":
            rope, magnitude, all_dims = yarn(read, fields, rope, context)
            return Turn(rope, magnitude, all_dims=all_dims)
        case "dynamic":  # longer sequences have another base: read as up to the context
            need("factor")
            return Turn(rope, context=context)
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
                "linear, dynamic, llama3, yarn, longrope)"
            )
    return Turn(dataclasses.replace(rope, scaling=scaling))


def _proportional(read: Reader, fields: dict[str, Any], rope: Rope) -> Rope:
    """The first part of a whole head's frequencies (divided by `factor`); other pairs stand still.

    Unlike partial rotation the exponents are those of the whole head.
    """
    part = positive(fields.get("partial_rotary_factor", 1.0), "partial_rotary_factor", read.where)
    turned = int(part * rope.dim // 2)
    if part > 1 or not turned:
        raise TurboqError(
            f"{read.where}: partial_rotary_factor={quoted(part)} of head_dim={rope.dim} must be at "
            "least one pair of channels, at most all"
        )
    factor = positive(fields.get("factor", 1.0), "rope factor", read.where)
    inv_freq = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim) / factor
    inv_freq[turned:] = 0.0
    return dataclasses.replace(rope, inv_freq=tuple(float(f) for f in inv_freq))


def _rotated(read: Reader, fields: dict[str, Any], head_dim: int, rotation: Rotation) -> int:
    """How many channels are rotated."""
    partial = _said_once(read, fields, "partial_rotary_factor")
    if rotation.partial is None:
        if partial not in (None, 1, 1.0):
            raise TurboqError(
                f"{read.where}: partial_rotary_factor={quoted(partial)} is not supported"
            )
        return head_dim
    if partial is None:
        partial = rotation.partial
    part = positive(partial, "partial_rotary_factor", read.where)
    dim = int(head_dim * part)
    if part > 1 or dim % 2 or not dim:
        raise TurboqError(
            f"{read.where}: partial_rotary_factor={quoted(partial)} of head_dim={head_dim} must be "
            "an even number of channels, at most all"
        )
    return dim


def _said_once(read: Reader, fields: dict[str, Any], key: str) -> Any:
    """A field of v5's `rope_parameters` that v4 has beside it; None where neither says it."""
    inside, beside = fields.get(key), read.config.get(key)
    if None not in (inside, beside) and inside != beside:
        said = f"{key}={quoted(beside)} and {quoted(inside)} among the rope parameters"
        raise contradiction(read.where, said, "the latter")
    return beside if inside is None else inside


def _rope_type(read: Reader, fields: dict[str, Any]) -> Any:
    kinds = [fields[key] for key in ("rope_type", "type") if fields.get(key) is not None]
    if kinds[1:] and kinds[0] != kinds[1]:
        said = f"rope_type={quoted(kinds[0])} and type={quoted(kinds[1])}"
        raise contradiction(read.where, said, "rope_type")
    if not kinds and fields.get("factor") is not None:
        raise TurboqError(
            f"{read.where}: {quoted(fields)} names no rope type: the "
            "model's authors must add it (transformers would not scale)"
        )
    return kinds[0] if kinds else "default"
