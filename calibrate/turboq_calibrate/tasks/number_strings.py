"""A long string of digits, with as many repeated ones as chance gives, from a table of such.

Source: Zhang et al., InfiniteBench (arXiv 2402.13718), section 3.2, "Retrieve.Number".
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import different, name, number

WRONG, DIGITS = 3, 20


def write(rng: random.Random, size: int, depth: float) -> Sample:
    count = max(size, WRONG) + 1
    keys, values = different(rng, count, name), different(rng, count, lambda r: number(r, DIGITS))
    rows = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    text = "\n".join(placed(rows[1:], depth, rows[0]))
    # One digit wrong, each time another: a copy that goes astray late.
    changed = [
        values[0][:i] + str((int(values[0][i]) + rng.randrange(1, 10)) % 10) + values[0][i + 1 :]
        for i in rng.sample(range(1, DIGITS), WRONG)
    ]
    return Sample(
        prompt=f"Serial numbers:\n{text}\n\nOne of them again, digit by digit.\n{keys[0]}:",
        answer=f" {values[0]}\n",
        wrong=tuple(f" {one}\n" for one in changed),
    )


TASK = Task(name="number_strings", write=write)
