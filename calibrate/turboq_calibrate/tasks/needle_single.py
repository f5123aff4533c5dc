"""One needle: a number for a key, anywhere in text about nothing.

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.1, "single NIAH"; the filling is ours.
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import different, name, number, sentence

WRONG = 3


def needle(key: str, value: str) -> str:
    """The sentence that states a number."""
    return f"The special number of the {key} is {value}."


def ask(text: list[str], keys: list[str], values: list[str]) -> Sample:
    """The question for the first key, whose value the others' stand against."""
    question = f"\n\nThe text says it: the special number of the {keys[0]} is"
    return Sample(
        prompt=" ".join(text) + question, answer=f" {values[0]}.",
        wrong=tuple(f" {value}." for value in values[1 : 1 + WRONG]),
    )  # fmt: skip


def write(rng: random.Random, size: int, depth: float) -> Sample:
    values = different(rng, 1 + WRONG, lambda r: number(r, 7))
    key = name(rng)
    text = placed([sentence(rng) for _ in range(size)], depth, needle(key, values[0]))
    return ask(text, [key], values)


TASK = Task(name="needle_single", write=write)
