"""Invented words whose frequencies fall as 1/rank^2: the three most frequent, in order.

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.3, "frequent words extraction".
"""

from __future__ import annotations

import random
from collections import Counter

from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.words import different

WORDS, EXPONENT = 30, 2.0


def invented(rng: random.Random) -> str:
    """Three syllables."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


def write(rng: random.Random, size: int, depth: float) -> Sample:
    words = different(rng, WORDS, invented)
    weights = [(1 + i) ** -EXPONENT for i in range(WORDS)]
    drawn = [*words, *rng.choices(words, weights, k=size)]
    # The order asked for must not be a tie: the first four stand apart by at least one.
    counts = Counter(drawn)
    for i, word in enumerate(words[3::-1]):
        least = counts[words[3]] + i
        drawn += [word] * max(0, least - counts[word])
        counts[word] = max(counts[word], least)
    ranked = [word for word, _ in sorted(counts.items(), key=lambda x: -x[1])]
    rng.shuffle(drawn)
    a, b, c, d = ranked[:4]
    return Sample(
        prompt=f"Words:\n{' '.join(drawn)}\n\nThe three most frequent words, in order, are",
        answer=f" {a}, {b}, {c}.",
        wrong=(f" {a}, {c}, {b}.", f" {b}, {a}, {d}.", f" {d}, {c}, {a}."),
    )


TASK = Task(name="frequent_words", write=write, has_depth=False)
