"""A task of another package: `turboq tasks --plan=OUT --tasks=my_codecs.birthday --out=RUN`."""

import random

from turboq_calibrate.tasks.contract import Sample, Task, placed


def write(rng: random.Random, size: int, depth: float) -> Sample:
    """A date between `size` others, asked for at the end."""
    day, *wrong = rng.sample(range(1, 29), 4)
    filling = [f"In June, day {rng.randint(1, 28)} was wet." for _ in range(size)]
    text = placed(filling, depth, f"My birthday is May {day}.")
    prompt = " ".join([*text, "So my birthday is May"])
    return Sample(prompt=prompt, answer=f" {day}.", wrong=tuple(f" {other}." for other in wrong))


BIRTHDAY = Task(name="my_codecs.birthday", write=write)
