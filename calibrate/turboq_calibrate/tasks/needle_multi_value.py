"""Several numbers for one key, all of them asked for, in the order of the text.

The depth is that of the first one; the others follow at equal distances to the end.
Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.1, "multi-values NIAH".
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.needle_single import WRONG, needle
from turboq_calibrate.tasks.words import different, name, number, sentence

VALUES = 3


def write(rng: random.Random, size: int, depth: float) -> Sample:
    key, values = name(rng), different(rng, VALUES + WRONG, lambda r: number(r, 4))
    text = [sentence(rng) for _ in range(size)]
    for i in reversed(range(VALUES)):
        place = depth + (1 - depth) * i / VALUES
        text.insert(round(place * size), needle(key, values[i]))
    right = values[:VALUES]
    # Wrong answers have one of the numbers wrong, each another.
    wrong = [[*right[:i], values[VALUES + i], *right[i + 1 :]] for i in range(min(WRONG, VALUES))]
    return Sample(
        prompt=" ".join(text) + f"\n\nAll special numbers of the {key}, in order, are",
        answer=f" {', '.join(right)}.",
        wrong=tuple(f" {', '.join(some)}." for some in wrong),
    )


TASK = Task(name="needle_multi_value", write=write)
