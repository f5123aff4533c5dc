"""Chains of assignments, strewn over the text: which variables hold a value in the end?

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.2, "variable tracking".
"""

from __future__ import annotations

import itertools
import random

from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.words import different, number, sentence

HOPS, CHAINS = 3, 3


def chain(names: list[str], value: str) -> list[str]:
    """Assignments that bring the value to every name."""
    return [f"VAR {names[0]} = {value}."] + [
        f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)
    ]


def write(rng: random.Random, size: int, depth: float) -> Sample:
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    names = different(rng, HOPS * CHAINS, lambda r: "".join(r.sample(letters, 3)))
    values = different(rng, CHAINS, lambda r: number(r, 5))
    text = [sentence(rng) for _ in range(size)]
    owned = [names[i * HOPS : (i + 1) * HOPS] for i in range(CHAINS)]
    for some, value in zip(owned, values, strict=True):
        places = sorted((rng.randrange(size + 1) for _ in some), reverse=True)
        for place, line in zip(places, reversed(chain(some, value)), strict=True):
            text.insert(place, line)
    one = owned[0]
    wrong = [[one[0], one[1], owned[1][2]], [one[0], owned[2][1], one[2]], owned[1]]
    return Sample(
        prompt=" ".join(text) + f"\n\nThe variables that hold {values[0]} are, in order,",
        answer=f" {', '.join(one)}.",
        wrong=tuple(f" {', '.join(some)}." for some in wrong),
    )


TASK = Task(name="variable_tracking", write=write, has_depth=False)
