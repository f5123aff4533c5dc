"""One needle among needles: every second sentence is a number of some other key.

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3.1, "multi-keys NIAH".
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.needle_single import WRONG, ask, needle
from turboq_calibrate.tasks.words import different, name, number, sentence


def write(rng: random.Random, size: int, depth: float) -> Sample:
    count = max(size // 2, WRONG) + 1
    keys, values = different(rng, count, name), different(rng, count, lambda r: number(r, 7))
    others = [needle(*pair) for pair in zip(keys[1:], values[1:], strict=True)]
    filling = others + [sentence(rng) for _ in range(size - len(others))]
    rng.shuffle(filling)
    return ask(placed(filling, depth, needle(keys[0], values[0])), keys, values)


TASK = Task(name="needle_multi_key", write=write)
