"""The value of one key of a JSON object of UUIDs.

Source: Liu et al., Lost in the Middle (arXiv 2307.03172), section 4.
"""

from __future__ import annotations

import random
import uuid

from turboq_calibrate.tasks.contract import Sample, Task, placed

WRONG = 3


def unique(rng: random.Random) -> str:
    """A random (version 4) UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def write(rng: random.Random, size: int, depth: float) -> Sample:
    pairs = [(unique(rng), unique(rng)) for _ in range(max(size, WRONG) + 1)]
    lines = [f'"{key}": "{value}"' for key, value in pairs]
    text = ",\n ".join(placed(lines[1:], depth, lines[0]))
    return Sample(
        prompt=f'JSON data:\n{{{text}}}\n\nThe value of one key of this data:\n"{pairs[0][0]}": "',
        answer=f'{pairs[0][1]}"',
        wrong=tuple(f'{value}"' for _, value in pairs[1 : 1 + WRONG]),
    )


TASK = Task(name="key_value", write=write)
