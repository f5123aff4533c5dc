"""Codecs: one file each, one registry, one way from a config to a codec and back."""

# pyright: strict

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from turboq.codecs.base import Arrays as Arrays
from turboq.codecs.base import Codec as Codec
from turboq.codecs.base import Field as Field
from turboq.codecs.base import Stored as Stored
from turboq.codecs.checks import check_finite_stored as check_finite_stored
from turboq.codecs.e8 import E8 as E8
from turboq.codecs.exact import Exact as Exact
from turboq.codecs.fp8 import FP8 as FP8
from turboq.codecs.ggml import Ggml as Ggml
from turboq.codecs.hadamard_per_head import HadamardPerHead as HadamardPerHead
from turboq.codecs.int_affine import IntAffine as IntAffine
from turboq.codecs.int_token_head import Int4TokenHead as Int4TokenHead
from turboq.codecs.int_token_head import Int8TokenHead as Int8TokenHead
from turboq.codecs.kivi import KiviKey as KiviKey
from turboq.codecs.kivi import KiviValue as KiviValue
from turboq.codecs.kvarn import KVarN as KVarN
from turboq.codecs.nuq import NUQ as NUQ
from turboq.codecs.nvfp4 import NVFP4 as NVFP4
from turboq.codecs.oscar import Oscar as Oscar
from turboq.codecs.outliers import TurboQuantOutliers as TurboQuantOutliers
from turboq.codecs.per_channel import PerChannel as PerChannel
from turboq.codecs.per_head import PerHead as PerHead
from turboq.codecs.polarquant import PolarQuant as PolarQuant
from turboq.codecs.qjl import QJL as QJL
from turboq.codecs.rope_block import RopeBlock as RopeBlock
from turboq.codecs.tcq import TCQ as TCQ
from turboq.codecs.transform import Transform as Transform
from turboq.codecs.turboquant_mse import TurboQuantMSE as TurboQuantMSE
from turboq.codecs.turboquant_prod import TurboQuantProd as TurboQuantProd
from turboq.codecs.vllm_turboquant import VLLMTurboQuantKey as VLLMTurboQuantKey
from turboq.codecs.vllm_turboquant import VLLMTurboQuantValue as VLLMTurboQuantValue
from turboq.errors import LONGEST, TurboqError, quoted, shortened
from turboq.registry import Registry


def _check(found: object) -> type[Codec]:
    kind = typing.cast(type[Any], found) if isinstance(found, type) else None
    if kind is None or not (issubclass(kind, Codec) and dataclasses.is_dataclass(kind)):
        raise TurboqError(f"{quoted(found)} must be a class on turboq.codecs.Codec")
    return kind


CODECS: Registry[type[Codec]] = Registry(
    "turboq.codecs",
    (
        Exact,
        TurboQuantMSE,
        TurboQuantProd,
        PerHead,
        IntAffine,
        KiviKey,
        KiviValue,
        KVarN,
        NUQ,
        Oscar,
        PerChannel,
        FP8,
        Int8TokenHead,
        Int4TokenHead,
        NVFP4,
        VLLMTurboQuantKey,
        VLLMTurboQuantValue,
        Ggml,
        TurboQuantOutliers,
        QJL,
        PolarQuant,
        TCQ,
        E8,
        Transform,
        RopeBlock,
        HadamardPerHead,
    ),
    _check,
)
"""All codecs by name, ours and those of installed packages: a `turboq.registry.Registry`."""


def from_config(config: Any) -> Codec:
    """The codec that `Codec.config()` describes: {"codec": name, field: value, ...}.

    Fields with a default may be left out. Types are exact: True is not 1, 3.0 is not 3.

    Raises:
      TurboqError: not a mapping, unknown codec or field, missing field, wrong type, bad value.
    """
    if not isinstance(config, Mapping):
        raise TurboqError(f"codec config must be an object, not {type(config).__name__}")
    config = typing.cast(Mapping[str, Any], config)
    name = config.get("codec")
    if not isinstance(name, str) or name not in CODECS:
        raise TurboqError(unknown_codec(name))
    cls = CODECS[name]
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {k: v for k, v in config.items() if k != "codec"}
    for key in given:
        if key not in fields:
            raise TurboqError(
                f"codec {name!r} has no field {quoted(key)}: it has {', '.join(fields)}"
            )
    for key, field in fields.items():
        if key not in given:
            if field.default is dataclasses.MISSING:
                raise TurboqError(f"codec {name!r} needs field {key!r}")
            continue
        given[key] = _tuples(given[key])
        if not _fits(given[key], types[key]):
            kind = str(types[key]) if typing.get_origin(types[key]) else types[key].__name__
            raise TurboqError(
                f"codec {name!r}: {key}={quoted(given[key])} must be {kind},"
                f" not {type(given[key]).__name__}"
            )
    try:
        return cls(**given)
    except ValueError as error:
        raise TurboqError(f"codec {name!r}: {shortened(error, 4 * LONGEST)}") from error


def unknown_codec(name: Any) -> str:
    """What an error says of a codec that is not here: what to install, or the nearest names."""
    if isinstance(name, str):
        if outside := CODECS.missing(name):
            return f"unknown codec: {outside}"
        near = difflib.get_close_matches(name[:LONGEST], CODECS, n=2)
        if near:
            return f"unknown codec {quoted(name)}: did you mean {' or '.join(near)}?"
    return f"unknown codec {quoted(name)}: known codecs are {', '.join(sorted(CODECS))}"


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples of a hashable codec."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(map(_tuples, typing.cast(list[Any], value)))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of exactly this type: a class, tuple[X, ...] or tuple[X, Y]."""
    if typing.get_origin(kind) is not tuple:
        return type(value) is kind
    if not isinstance(value, tuple):
        return False
    value = typing.cast(tuple[Any, ...], value)
    kinds = typing.get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    return len(kinds) == len(value) and all(map(_fits, value, kinds))
