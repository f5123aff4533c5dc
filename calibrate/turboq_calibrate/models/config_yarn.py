"""YaRN scaling (Peng et al., arXiv 2309.00071) from a `config.json`.

Frequencies that turn more than `beta_fast` times within the original context are kept, those that
turn less than `beta_slow` times divided by `factor`, with a linear ramp over the pairs between.
What is rotated is multiplied by 0.1 ln(factor) + 1 (section 3.4), or as `mscale` says (DeepSeek).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from turboq.numbers.rope import Rope
from turboq_calibrate.models.config_fields import Reader, positive
from turboq_calibrate.models.config_longrope import original_context

ALL_DIMS = "mscale_all_dim"


def yarn(
    read: Reader, fields: dict[str, Any], rope: Rope, context: int
) -> tuple[Rope, float, float]:
    """The rotary embedding, the factor on what it rotates, and that on whole queries and keys,
    which latent attention alone has.

    Raises:
      TurboqError: a number that is missing or not positive.
    """
    inner = Reader(fields, f"{read.where}, rope")
    original = original_context(read, fields, context)
    factor = positive(fields.get("factor") or context / original, "rope factor", read.where)
    fast, slow = (inner.number(k, d) for k, d in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    scaled = yarn_frequencies(
        rope, factor, original, fast, slow, truncate=inner.boolean("truncate", True)
    )
    magnitude = inner.optional("attention_factor")
    over, under = (fields.get(key) and inner.number(key, 1.0) for key in ("mscale", ALL_DIMS))
    if magnitude is None:
        if over and under:
            magnitude = temperature(factor, over) / temperature(factor, under)
        else:
            magnitude = temperature(factor)
    return scaled, magnitude, temperature(factor, under) if under else 1.0


def temperature(factor: float, scale: float = 1.0) -> float:
    """0.1 scale ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_frequencies(
    rope: Rope, factor: float, original: int, fast: float, slow: float, *, truncate: bool
) -> Rope:
    """`rope` with stretched frequencies; `truncate` rounds the ramp's ends to whole pairs."""

    def pair(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0.0
    plain = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0.0, 1.0)
    scaled = plain / factor * ramp + plain * (1 - ramp)
    return dataclasses.replace(rope, inv_freq=tuple(float(f) for f in scaled))
