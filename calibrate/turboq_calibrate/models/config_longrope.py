"""LongRoPE scaling (arXiv 2402.13753, Phi-3) from a `config.json`.

Sequences up to the original context divide each frequency by `short_factor`, longer ones all of
theirs by `long_factor`. Keys of one cache cannot be both, so a model is read in one form: the short
one up to the original context, or the long one for all lengths, as engines do that are given a
longer context.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from turboq.errors import TurboqError, quoted
from turboq.numbers.rope import Rope
from turboq_calibrate.models.config_fields import Reader, contradiction, positive

ORIGINAL = "original_max_position_embeddings"
TYPES = ("longrope", "su")  # one, by its new and its old name


def longrope(
    read: Reader, fields: dict[str, Any], rope: Rope, context: int, *, long: bool
) -> tuple[Rope, float, int]:
    """The rotary embedding of long or of short sequences, the factor on what it rotates, and how
    long such a sequence may be.

    Raises:
      TurboqError: a list that does not count the frequencies, a number that is not positive.
    """
    original = original_context(read, fields)
    factor = positive(fields.get("factor") or context / original, "rope factor", read.where)
    magnitude = fields.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = positive(magnitude, "rope attention_factor", read.where)
    divisors = [_divisors(read, fields, f"{form}_factor", rope) for form in ("short", "long")]
    return divided(rope, divisors[long]), magnitude, context if long else original


def original_context(read: Reader, fields: dict[str, Any], default: int | None = None) -> int:
    """The context that a model was trained on before it was stretched."""
    beside, inside = read.config.get(ORIGINAL), fields.get(ORIGINAL)
    if None not in (beside, inside) and beside != inside:
        said = f"{ORIGINAL}={quoted(beside)} and {quoted(inside)} among the rope parameters"
        raise contradiction(read.where, said)
    said = Reader({ORIGINAL: inside if beside is None else beside}, read.where)
    return said.integer(ORIGINAL, default)


def divided(rope: Rope, divisors: np.ndarray) -> Rope:
    """`rope` with each of its frequencies divided."""
    inv_freq = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim) / divisors
    return dataclasses.replace(rope, inv_freq=tuple(float(f) for f in inv_freq))


def _divisors(read: Reader, fields: dict[str, Any], key: str, rope: Rope) -> np.ndarray:
    said = fields.get(key)
    if not isinstance(said, list) or len(said) != rope.dim // 2:
        raise TurboqError(
            f"{read.where}: rope {key}={quoted(said)} must hold {rope.dim // 2} numbers, one for "
            "each frequency"
        )
    return np.array([positive(x, f"rope {key}", read.where) for x in said])
