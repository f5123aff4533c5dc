"""Invented words whose frequencies fall as 1/rank^2: the three most frequent, in order.

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.3, "frequent words extraction".
"""

from __future__ import annotations

import itertools
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
    counts = Counter(drawn)
    ranked = [word for word, _ in counts.most_common(4)]
    for first, then in reversed(list(itertools.pairwise(ranked))):  # no tie in what is asked for
        more = max(0, counts[then] + 1 - counts[first])
        drawn += [first] * more
        counts[first] += more
    rng.shuffle(drawn)
    a, b, c, d = ranked
    return Sample(
        prompt=f"Words:\n{' '.join(drawn)}\n\nThe three most frequent words, in order, are",
        answer=f" {a}, {b}, {c}.",
        wrong=(f" {a}, {c}, {b}.", f" {b}, {a}, {d}.", f" {d}, {c}, {a}."),
    )


TASK = Task(name="frequent_words", write=write, has_depth=False)
