"""A numbered list of words in which one stands many times as often as any other: which?

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.3, "common words extraction" (there the
ten commonest are asked for, here the one).
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.words import NOUNS

WRONG = 3


def write(rng: random.Random, size: int, depth: float) -> Sample:
    some, size = rng.sample(NOUNS, len(NOUNS)), max(size, 10)
    rare = [some[1 + i % (len(some) - 1)] for i in range(size - size // 5)]
    words = [some[0]] * (size // 5 + 1) + rare
    rng.shuffle(words)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    return Sample(
        prompt=f"A list of words:\n{numbered}\n\nThe word that stands most often in the list is",
        answer=f" {some[0]}.",
        wrong=tuple(f" {word}." for word in some[1 : 1 + WRONG]),
    )


TASK = Task(name="common_words", write=write, has_depth=False)
