"""Verbatim copying: numbered lines of unrelated words, one of them again from its number on.

Source: Jelassi et al., Repeat After Me (arXiv 2402.01032), section 4.1 (copying and n-gram lookup).
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import ADJECTIVES, NOUNS, VERBS, different, number

WRONG, WORDS = 3, 10


def line(rng: random.Random) -> str:
    """Words that nothing but memory puts together."""
    return " ".join(rng.choice(NOUNS + ADJECTIVES + VERBS) for _ in range(WORDS))


def write(rng: random.Random, size: int, depth: float) -> Sample:
    count = max(size, WRONG) + 1
    lines, numbers = different(rng, count, line), different(rng, count, lambda r: number(r, 4))
    written = [f"Line {n}: {text}." for n, text in zip(numbers, lines, strict=True)]
    text = "\n".join(placed(written[1:], depth, written[0]))
    return Sample(
        prompt=f"{text}\n\nOne of these lines again, word for word.\nLine {numbers[0]}:",
        answer=f" {lines[0]}.",
        wrong=tuple(f" {other}." for other in lines[1 : 1 + WRONG]),
    )


TASK = Task(name="copying", write=write)
