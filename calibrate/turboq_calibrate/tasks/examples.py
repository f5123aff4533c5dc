"""Samples as tokens: as much filling as fits, so that every prompt has the same length."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from turboq.errors import TurboqError
from turboq_calibrate.observe.texts import Tokenizer
from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.words import sentence

ROOM = 64  # tokens kept free for an answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """answers: tokens of the right answer, then of the wrong ones; `length`: prompt and room."""

    task: str
    index: int
    length: int
    depth: float | None
    prompt: Int32[np.ndarray, "T"]
    answers: tuple[tuple[int, ...], ...]


def examples(
    task: Task,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    depths: Sequence[float],
    seed: int = 0,
    room: int = ROOM,
) -> list[Example]:
    """`count` examples whose prompts have exactly length - room tokens; depths take turns.

    Each has the most units of filling that fit; sentences about nothing in front, cut where they
    must be, make up the rest.

    Raises:
      TurboqError: the shortest prompt does not fit, or an answer is longer than the room.
    """
    return [
        _example(task, tokenizer, length, index, depths[index % len(depths)], seed, room)
        for index in range(count)
    ]


def _example(
    task: Task, tokenizer: Tokenizer, length: int, index: int, depth: float, seed: int, room: int
) -> Example:
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    free = length - room - len(begin)

    def written(size: int) -> tuple[Sample, list[int]]:
        sample = task.write(random.Random(f"{task.name} {seed} {index}"), size, depth)
        return sample, tokenizer.encode(sample.prompt)

    sample, ids = written(0)
    if len(ids) > free:
        raise TurboqError(
            f"task {task.name}: its shortest prompt is {len(ids)} tokens, and a length of {length} "
            f"leaves {max(free, 0)} beside {room} for the answer: give longer lengths"
        )
    fits, size = 0, 1
    while len(written(size)[1]) <= free:
        fits, size = size, 2 * size
    while size - fits > 1:
        half = (fits + size) // 2
        if len(written(half)[1]) <= free:
            fits = half
        else:
            size = half
    sample, ids = written(fits)
    answers = tuple(tuple(tokenizer.encode(x)) for x in (sample.answer, *sample.wrong))
    longest = max(map(len, answers))
    if longest > room:
        raise TurboqError(
            f"task {task.name}: an answer of {longest} tokens does not fit the {room} kept free"
        )
    gap, rng, front = free - len(ids), random.Random(f"filling {seed} {index}"), []
    while len(front) < gap:
        front += tokenizer.encode(sentence(rng) + "\n")
    return Example(
        task=task.name,
        index=index,
        length=length,
        depth=depth if task.has_depth else None,
        prompt=np.asarray([*begin, *front[len(front) - gap :], *ids], np.int32),
        answers=answers,
    )
