"""Which candidates a plan is chosen from: named on the command line, or what an engine holds.

transform:2,2.5,3      learned transforms at so many bits per channel, gains included
trellis:2,2.5,3        the same with trellis codes: less error, slower to encode
window:2,2.5,3         with window codes, linear in their bits (window16, window256: of such states)
window                 any of these without numbers: in steps around the budget
per_head:2,3,4,exact   anything else of `turboq.words`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from turboq import words
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec
from turboq.codecs.fit_synthesis import free_synthesis
from turboq.codecs.fit_transform import HeadFit, TransformOptions, arrays_of, fit_heads, head_rates
from turboq.codecs.observed import Observed
from turboq.codecs.water_filling import BLOCK, Rates
from turboq.errors import TurboqError
from turboq.export import Options, engine
from turboq.export.llama_cpp import rotates
from turboq.plan import LayerGeometry, ModelGeometry
from turboq.plan.build import Side, at_dim
from turboq.plan.constraints import Constraints
from turboq_calibrate.candidates.table import Maker, Option

STEP = 0.25  # bits per channel between the default candidates
AROUND = 3.0  # bits per channel below and above the budget that they reach
MOST = 8.0


def named(label: str, k: Codec, v: Codec | None = None) -> Maker:
    """A codec at each layer's own head dim, which fits itself (`v`: another one for values)."""

    def make(layer: LayerGeometry, side: Side, seen: Observed | None) -> Option:
        codec = at_dim(k if side == "k" else v or k, layer.k_dim if side == "k" else layer.v_dim)
        # At once: what was observed is far larger than the arrays, and need not be kept for them.
        arrays = codec.fit(_needed(label, seen)) if codec.array_shapes else {}
        return Option.shared(codec, layer.kv_heads, lambda: arrays)

    return Maker(label, make)


def learned(
    rates: Mapping[str, float | int], options: TransformOptions | None = None
) -> list[Maker]:
    """`transform` at several sizes (label -> bits per channel), bases fitted once for all.

    Every head takes its own best segments within the size. Costs are known from the fit.
    """
    options = TransformOptions() if options is None else options
    known: dict[tuple[int, Side, int], tuple[list[HeadFit], list[Rates]]] = {}

    def fits_of(layer: int, side: Side, seen: Observed) -> tuple[list[HeadFit], list[Rates]]:
        key = (layer, side, id(seen))
        if key not in known:
            known.clear()  # makers of one side of a layer are called in a row
            fits = fit_heads(seen, options)
            known[key] = (fits, head_rates(fits, options))
        return known[key]

    def maker(label: str, bits: float | int) -> Maker:
        def make(layer: LayerGeometry, side: Side, seen: Observed | None) -> Option:
            seen = _needed(label, seen)
            fits, tables = fits_of(layer.index, side, seen)
            most = int(bits * seen.dim + 1e-9) - options.overhead(seen.dim)
            segments = [table.segments[table.at(most)] for table in tables]
            codecs = tuple(options.codec(seen.dim, s) for s in segments)
            samples = seen.x if options.samples else [None] * seen.heads
            whole = seen if options.free_synthesis else None

            def fit() -> list[dict[str, np.ndarray]]:
                each = zip(codecs, fits, samples, strict=True)
                arrays = [arrays_of(codec, head, x) for codec, head, x in each]
                return arrays if whole is None else free_synthesis(codecs, arrays, whole)

            costs = np.stack([f.cost(s) for f, s in zip(fits, segments, strict=True)])
            return Option(codecs, fit, costs)

        return Maker(label, make)

    return [maker(label, bits) for label, bits in rates.items()]


def _needed(label: str, seen: Observed | None) -> Observed:
    if seen is None:
        raise TurboqError(f"candidate {label!r} is fitted to data: run `turboq calibrate` first")
    return seen


# The word of a learned transform -> what it is quantized by, and states.
LEARNED: dict[str, tuple[str, int]] = {
    "transform": ("scalar", 8),
    "trellis": ("trellis", 8),
    "window": ("window", 64),
    "window16": ("window", 16),
    "window256": ("window", 256),
}
# Of the plans that nobody chose candidates for: a reader needs one product with the bits of window
# codes, and at 2 to 4 bits they err 1.3 to 1.7 dB less than scalar codes.
DEFAULT = "window"


def default_makers(
    bits: float | int, dim: int, options: TransformOptions | None = None, word: str = DEFAULT
) -> list[Maker]:
    """`word` in steps of a quarter bit up to three bits on both sides of the budget.

    `dim`: the smallest head dim, which says how small a size can be (a run of 8 coordinates).
    """
    own = options_of(word, options)
    least = (BLOCK + own.overhead(dim)) / dim
    bits = max(min(bits, MOST), least)
    low, high = max(least, bits - AROUND), min(MOST, bits + AROUND)
    steps = np.arange(np.ceil(low / STEP - 1e-9), np.ceil(high / STEP) + 1)
    return learned({f"{word} {r:g}": float(r) for r in steps * STEP if r <= MOST}, own)


def makers_of(
    named_as: Sequence[str],
    geometry: ModelGeometry,
    options: TransformOptions | None = None,
    bits: float | int | None = None,
) -> list[Maker]:
    """Makers of candidates that were named; `bits` per channel of the budget, if there is one.

    Raises:
      TurboqError: unknown codec or field, or a value that it does not take.
    """
    found: dict[str, list[str]] = {}  # sizes of a learned word together: bases are fitted once
    for item in words.split(named_as):
        word = item.partition(":")[0] if learned_word(item) else item
        found.setdefault(word, []).append(item.removeprefix(word))
    return [
        maker
        for word, rates in found.items()
        for maker in _makers(word, rates, geometry, options, bits)
    ]


def learned_word(word: str) -> bool:
    """Whether a candidate's word names learned transforms."""
    return word.partition(":")[0] in LEARNED


def smallest_dim(geometry: ModelGeometry) -> int:
    """The smallest head dim of K and V."""
    return min(min(x.k_dim, x.v_dim) for x in geometry.cache_layers)


def options_of(word: str, options: TransformOptions | None = None) -> TransformOptions:
    """The options with what a learned word is quantized by."""
    quantizer, states = LEARNED[word]
    return dataclasses.replace(options or TransformOptions(), quantizer=quantizer, states=states)


def _makers(
    word: str,
    rates: Sequence[str],
    geometry: ModelGeometry,
    options: TransformOptions | None,
    bits: float | int | None,
) -> list[Maker]:
    if not learned_word(word):
        found = words.parse(word)
        first, at = geometry.cache_layers[0], found.at(rotates(geometry))
        return [named(found.label, at("k", first.k_dim), at("v", first.v_dim))]
    if rates == [""] and bits is not None:
        return default_makers(bits, smallest_dim(geometry), options, word)
    if not set(rates).isdisjoint(("", ":")):
        raise TurboqError(f"candidates {word!r}: name bits per channel, as in {word}:2,2.5")
    known = {f"{word} {rate[1:]}": _number(word, rate[1:]) for rate in rates}
    return learned(known, options_of(word, options))


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TurboqError(f"candidates {word!r}: {text!r} is no number of bits") from None


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
    exporter.check_model(geometry)
    options = Options()
    formats = exporter.formats(geometry, options)
    blocks = tuple(f for f, pair in formats.items() if any(c.block != 1 for c in pair))
    makers = [named(f, k, v) for f, (k, v) in formats.items() if f not in blocks]
    if not makers:
        why = f"all store blocks of tokens ({', '.join(blocks)})" if blocks else "there are none"
        raise TurboqError(
            f"engine {name}: no candidates for {geometry.name} among what it holds exactly: {why}"
        )
    rules = exporter.constraints(geometry, options)
    return EngineMenu(makers, tuple(rules), exporter.policy(policy), blocks)
