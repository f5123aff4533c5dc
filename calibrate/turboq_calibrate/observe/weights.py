"""Weights of texts, written behind their names: chat.jsonl@3 counts three times what b.txt does.

A text's weight is its share of the windows, and what its loss counts for where texts are averaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fractions import Fraction

from turboq.errors import TurboqError

_WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)", re.DOTALL)


def weighted(source: str) -> tuple[str, Fraction]:
    """A source without its weight, and the weight; 1 where none is named.

    A file of exactly that name is a file.

    Raises:
      TurboqError: a weight of 0.
    """
    match = None if os.path.exists(source) else _WEIGHTED.fullmatch(source)
    if match is None:
        return source, Fraction(1)
    weight = Fraction(match[2])
    if not weight:
        raise TurboqError(f"text {source}: a weight must be more than 0; leave the text out")
    return match[1], weight


def in_turn(weights: Sequence[Fraction], count: int) -> list[int]:
    """Whose turn it is, `count` times, so that every beginning is shared as the weights say.

    Text i takes its turn j = 0, 1, ... at (j + 1/2) / w_i, the earlier text first where two meet:
    the method of Webster (Balinski and Young, Fair Representation, 1982).
    """
    taken, turns = [0] * len(weights), []
    for _ in range(count):
        i = min(range(len(weights)), key=lambda i: (place(taken[i], weights[i]), i))
        turns.append(i)
        taken[i] += 1
    return turns


def place(turn: int, weight: Fraction) -> Fraction:
    """Where turn j of a text comes, times 2."""
    return (2 * turn + 1) / weight
