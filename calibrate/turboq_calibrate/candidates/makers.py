"""Which candidates a plan is chosen from: named on the command line, or what an engine holds.

transform:2,2.5,3      learned transforms at so many bits per channel, gains included
per_head:2,3,4         any codec at several values of its first field after `dim` (bits)
ggml:type=q4_0,q8_0    or of a field that is named
exact                  as it is
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from turboq.cache.layer import TokenPolicy
from turboq.codecs import CODECS, Codec, from_config
from turboq.errors import TurboqError
from turboq.export import Options, engine
from turboq.plan import ModelGeometry
from turboq.plan.constraints import Constraints
from turboq_calibrate.candidates.table import Maker, data_free, fitted, learned
from turboq_calibrate.choose import learn
from turboq_calibrate.choose.budget import Budget


def makers_of(words: Sequence[str], geometry: ModelGeometry) -> list[Maker]:
    """Makers of candidates that were named.

    Raises:
      TurboqError: unknown codec or field, or a value that it does not take.
    """
    return [maker for word in words for maker in _makers(word, geometry)]


def default_makers(budget: Budget, geometry: ModelGeometry) -> list[Maker]:
    """`learn.default_makers` around the budget, taken to an eighth of a bit and within 1..6."""
    channels = sum(x.kv_heads * (x.k_dim + x.v_dim) for x in geometry.cache_layers)
    bits = budget.bits_near(channels) / channels
    return learn.default_makers(min(max(math.floor(8 * bits) / 8, 1.0), 6.0))


def _makers(word: str, geometry: ModelGeometry) -> list[Maker]:
    name, _, rest = word.partition(":")
    field, equals, listed = rest.rpartition("=")
    values = [value.strip() for value in listed.split(",")] if listed else []
    if name in ("transform", "trellis"):
        if equals or not values:
            raise TurboqError(f"candidates {word!r}: name bits per channel, as in {name}:2,2.5")
        quantizer = "scalar" if name == "transform" else "trellis"
        return [learned(f"{name} {v}", _number(word, v), quantizer=quantizer) for v in values]
    if name not in CODECS:
        raise TurboqError(f"candidates {word!r}: known codecs are {', '.join(sorted(CODECS))}")
    if not values:
        return [_maker(name, *_codecs(geometry, {"codec": name}))]
    field = field or "bits"
    return [
        _maker(
            f"{name} {value}",
            *_codecs(geometry, {"codec": name, field: int(value) if value.isdecimal() else value}),
        )
        for value in values
    ]


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TurboqError(f"candidates {word!r}: {text!r} is no number of bits") from None


def _codecs(geometry: ModelGeometry, config: dict) -> tuple[Codec, Codec]:
    """K's and V's at the head dims of the first cache."""
    first = geometry.cache_layers[0]
    return (
        from_config(config | {"dim": first.k_dim}),
        from_config(config | {"dim": first.v_dim}),
    )


def _maker(label: str, k: Codec, v: Codec) -> Maker:
    return (fitted if k.array_shapes or v.array_shapes else data_free)(label, k, v)


@dataclasses.dataclass(frozen=True)
class EngineMenu:
    """What one engine can be given: makers, any one of `constraints`, and its token policy.

    `left_out` names formats that no candidate can stand for, because they store blocks of tokens.
    """

    makers: list[Maker]
    constraints: tuple[Constraints, ...]
    policy: TokenPolicy
    left_out: tuple[str, ...]

    def notes(self, wanted: TokenPolicy) -> list[str]:
        """What is not as asked for, one line each."""
        out = []
        if self.left_out:
            out.append(f"not among the candidates (blocks of tokens): {', '.join(self.left_out)}")
        if self.policy != wanted:
            kept = f"sinks={self.policy.sinks} recent={self.policy.recent}"
            out.append(f"exact tokens as the engine keeps them: {kept}")
        return out


def engine_menu(name: str, geometry: ModelGeometry, policy: TokenPolicy) -> EngineMenu:
    """Formats and rules of an engine.

    Raises:
      TurboqError: unknown engine, or one with no format that stores token by token.
    """
    exporter = engine(name)
    options = Options()
    formats = exporter.formats(geometry, options)
    blocks = tuple(f for f, pair in formats.items() if any(c.block != 1 for c in pair))
    makers = [_maker(f, k, v) for f, (k, v) in formats.items() if f not in blocks]
    if not makers:
        why = f"all store blocks of tokens ({', '.join(blocks)})" if blocks else "there are none"
        raise TurboqError(
            f"engine {name}: no candidates for {geometry.name} among what it holds exactly: {why}"
        )
    rules = exporter.constraints(geometry, options)
    return EngineMenu(makers, tuple(rules), exporter.policy(policy), blocks)
