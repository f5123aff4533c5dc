"""What a task is: a seeded writer of prompts with one right answer and wrong ones of its form."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt that ends where the answer begins.

    Args:
      answer: the right continuation, from the space or letter that follows the prompt on.
      wrong: continuations of the same form that the prompt makes tempting: to choose the likeliest
        of all at random is right in one of 1 + len(wrong).

    Raises:
      ValueError: no wrong answer, or two answers that are the same.
    """

    prompt: str
    answer: str
    wrong: tuple[str, ...]

    def __post_init__(self):
        if not self.wrong or len({self.answer, *self.wrong}) != 1 + len(self.wrong):
            raise ValueError(f"{self.answer=} and {self.wrong=} must be two or more that differ")


# write(rng, size, depth): a sample with `size` units of filling (sentences, entries, lines), what
# decides it after the first `depth` (0 to 1) of them.
Write = Callable[[random.Random, int, float], Sample]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """`has_depth`: there is one place that decides, which can be anywhere in the prompt."""

    name: str
    write: Write
    has_depth: bool = True


def placed(filling: list[str], depth: float, what: str) -> list[str]:
    """The filling with `what` behind the first `depth` of it."""
    at = round(depth * len(filling))
    return [*filling[:at], what, *filling[at:]]
