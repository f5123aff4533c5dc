"""A call of one tool in JSON, with the argument names and allowed values of its distant schema.

Source: Patil et al., Gorilla (arXiv 2305.15334) and the Berkeley Function-Calling Leaderboard.
"""

from __future__ import annotations

import json
import random

from turboq_calibrate.tasks.contract import Sample, Task, placed
from turboq_calibrate.tasks.words import ADJECTIVES, NOUNS, VERBS, different

WRONG = 3
Tool = tuple[str, str, str, str]  # name, argument, its one allowed value, what it is for


def tool(rng: random.Random) -> Tool:
    """A schema that could not be guessed from the request."""
    noun, other = rng.sample(NOUNS, 2)
    verb = rng.choice(VERBS)
    name = f"{verb}_{noun}_{rng.choice('abcdefghij')}{rng.randrange(10, 100)}"
    allowed = f"{rng.choice(ADJECTIVES)}-{rng.randrange(100, 1000)}"
    return name, f"{other}_{rng.choice(ADJECTIVES)}", allowed, f"{verb} {noun} {other}"


def schema(name: str, argument: str, allowed: str, purpose: str) -> str:
    """As models are told of a tool."""
    said = {"name": name, "description": purpose, "parameters": {argument: {"enum": [allowed]}}}
    return json.dumps(said)


def call(name: str, argument: str, allowed: str) -> str:
    return json.dumps({"name": name, "arguments": {argument: allowed}})


def write(rng: random.Random, size: int, depth: float) -> Sample:
    one, shown, *others = different(rng, max(size, WRONG) + 2, tool)
    text = "\n".join(placed([schema(*t) for t in (shown, *others)], depth, schema(*one)))
    begin = json.dumps({"name": one[0]})[:-1]
    wrong = [(one[1], others[0][2]), (others[0][1], one[2]), others[1][1:3]]
    return Sample(
        prompt=(
            f"Tools:\n{text}\n\nRequest: {shown[3]}\nCall: {call(*shown[:3])}\n"
            f"Request: {one[3]}\nCall: {begin}"
        ),
        answer=call(*one[:3])[len(begin) :],
        wrong=tuple(call(one[0], *pair)[len(begin) :] for pair in wrong),
    )


TASK = Task(name="tool_calls", write=write)
