"""Code: a call whose keyword arguments stand in a definition far above.

Source: Liu et al., RepoBench (arXiv 2306.03091), and LongBench (arXiv 2308.14508), "code
completion": the next line follows from a definition elsewhere.
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import ADJECTIVES, NOUNS, VERBS, different

WRONG, ARGUMENTS = 3, 3


def function(rng: random.Random) -> str:
    return f"{rng.choice(VERBS)}_{rng.choice(ADJECTIVES)}_{rng.choice(NOUNS)}"


def definition(name: str, arguments: tuple[str, ...], rng: random.Random) -> str:
    first, second, third = rng.sample(arguments, ARGUMENTS)
    return (
        f"def {name}({', '.join(arguments)}):\n"
        f"    {first} = {second} * {rng.randrange(2, 100)}\n"
        f"    return {first} - {third}\n"
    )


def call(arguments: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={i}" for i, name in enumerate(arguments, 1)) + ")"


def write(rng: random.Random, size: int, depth: float) -> Sample:
    count = max(size, WRONG + 1) + 1
    names = different(rng, count, function)
    lists = different(rng, count, lambda r: tuple(r.sample(NOUNS, ARGUMENTS)))
    code = [definition(name, args, rng) for name, args in zip(names, lists, strict=True)]
    text = "\n".join(placed(code[1:], depth, code[0]))
    return Sample(
        prompt=(
            f"{text}\n\n# All arguments by name.\n{names[1]}({call(lists[1])}\n"
            f"{names[2]}({call(lists[2])}\n{names[0]}("
        ),
        answer=call(lists[0]),
        wrong=tuple(call(lists[i]) for i in range(1, 1 + WRONG)),
    )


TASK = Task(name="distant_code", write=write)
