"""One chain of additions and subtractions as long as the prompt; its last totals are asked.

All steps stand first, then what stands after each; every total that is asked needs its step, half
of the prompt away, and the total before it.

Source: Cobbe et al., GSM8K (arXiv 2110.14168) and Nye et al., Scratchpads (arXiv 2112.00114):
several steps in words, and their intermediate results in order; here the steps alone, so that any
length can be had.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from turboq_calibrate.tasks.contract import Sample, Task

SHORTEST = 8  # steps
ASKED = 4  # totals


def chain(rng: random.Random, steps: int) -> tuple[list[str], list[int]]:
    """Steps in words, and what stands before the first and after each."""
    words, totals = list[str](), [rng.randrange(20, 80)]
    for _ in range(steps):
        by, last = rng.randrange(2, 10), totals[-1]
        add = last < 20 or (last < 80 and rng.random() < 0.5)
        words.append(f"{'Add' if add else 'Take away'} {by}")
        totals.append(last + (by if add else -by))
    return words, totals


def numbered(items: Sequence[object], first: int) -> str:
    return "\n".join(f"{n}. {x}" for n, x in enumerate(items, first))


def write(rng: random.Random, size: int, depth: float) -> Sample:
    words, (start, *totals) = chain(rng, SHORTEST + size)
    shown = len(totals) - ASKED

    def answer(asked: Sequence[int]) -> str:
        first, *others = asked
        return f" {first}\n{numbered(others, shown + 2)}\n"

    # One step misread: every total from there on is off by as much.
    misread = [
        [total + by * (i >= at) for i, total in enumerate(totals[shown:])]
        for at, by in itertools.product(range(ASKED), range(-9, 10))
        if by
    ]
    same_form = [asked for asked in misread if all(9 < total < 100 for total in asked)]
    return Sample(
        prompt=f"Start with {start}.\n{numbered(words, 1)}\nTotals:\n"
        f"{numbered(totals[:shown], 1)}\n{shown + 1}.",
        answer=answer(totals[shown:]),
        wrong=tuple(map(answer, rng.sample(same_form, 3))),
    )


TASK = Task(name="arithmetic", write=write, has_depth=False)
