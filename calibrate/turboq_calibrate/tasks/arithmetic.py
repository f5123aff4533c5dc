"""Chains of additions and subtractions, each step written out; the last step of the last is asked.

Source: Cobbe et al., GSM8K (arXiv 2110.14168) and Wei et al., Chain of Thought (arXiv 2201.11903):
several steps in words; here the steps alone, so that any length can be had.
"""

from __future__ import annotations

import random

from turboq_calibrate.tasks.contract import Sample, Task

STEPS = 8


def chain(rng: random.Random) -> list[tuple[str, int]]:
    """Steps in words, and what stands after each."""
    total = rng.randrange(10, 50)
    steps = [(f"Start with {total}.", total)]
    for _ in range(STEPS):
        by = rng.randrange(2, 10)
        add = total < 20 or (total < 80 and rng.random() < 0.5)
        total += by if add else -by
        steps.append((f"{'Add' if add else 'Take away'} {by}:", total))
    return steps


def shown(steps: list[tuple[str, int]]) -> str:
    first, *others = steps
    return " ".join([first[0], *(f"{words} {total}." for words, total in others)])


def write(rng: random.Random, size: int, depth: float) -> Sample:
    *lines, last = [chain(rng) for _ in range(size + 1)]
    words, total = last[-1]
    before = "\n".join([*map(shown, lines), shown(last[:-1])])
    near = [n for n in range(total - 9, total + 10) if n not in (total, last[-2][1]) and n > 9]
    return Sample(
        prompt=f"{before} {words}",
        answer=f" {total}.",
        wrong=tuple(f" {n}." for n in rng.sample(near, 3)),
    )


TASK = Task(name="arithmetic", write=write, has_depth=False)
