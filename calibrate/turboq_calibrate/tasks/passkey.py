"""A pass key between two stretches of the same few sentences, over and over.

Source: Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), section 4.2; words are ours.
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import different, number

FILLING = "The lake is cold. The hill is green. The road is long. On we walk, and home again."


def write(rng: random.Random, size: int, depth: float) -> Sample:
    key, *wrong = different(rng, 4, lambda r: number(r, 5))
    text = placed([FILLING] * size, depth, f"The pass key is {key}. Remember it: {key}.")
    return Sample(
        prompt=(
            "Somewhere in this text there is a pass key. Find it and keep it in mind.\n\n"
            + " ".join(text)
            + "\n\nWhat is the pass key? The pass key is"
        ),
        answer=f" {key}.",
        wrong=tuple(f" {one}." for one in wrong),
    )


TASK = Task(name="passkey", write=write)
