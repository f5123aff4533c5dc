"""Tasks against solvers that read the prompt alone; prompts of exactly the length asked for."""

import random
import re

import numpy as np
import pytest
import task_solvers

from turboq.errors import TurboqError
from turboq_calibrate.tasks import OURS, TASKS, tasks_of
from turboq_calibrate.tasks.contract import Sample, Task
from turboq_calibrate.tasks.examples import ROOM, examples


class Characters:
    """A tokenizer whose tokens are characters."""

    adds_bos, bos_id, chat = True, 0, None

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Fours(Characters):
    """Of four characters each: about as many tokens as a tokenizer of a model makes of English."""

    def encode(self, text):
        return np.frombuffer(text.encode("ascii") + bytes(-len(text) % 4), "<i4").tolist()

    def decode(self, ids):
        return np.asarray(ids, "<i4").tobytes().replace(b"\0", b"").decode()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [0, 1, 7, 60])
def test_the_right_answer_follows_from_the_prompt(name, size):
    for seed, depth in ((0, 0.0), (1, 0.5), (2, 1.0)):
        sample = TASKS[name].write(random.Random(seed), size, depth)
        assert getattr(task_solvers, name)(sample.prompt) == sample.answer
        assert sample == TASKS[name].write(random.Random(seed), size, depth)
        assert sample.prompt != TASKS[name].write(random.Random(seed + 9), size, depth).prompt


@pytest.mark.parametrize("name", OURS)
def test_prompts_are_full_and_of_one_length(name):
    task = TASKS[name]
    few, many = (
        examples(task, Characters(), length=length, count=3, depths=[0.0, 1.0], room=150)
        for length in (2200, 4000)
    )
    assert {len(x.prompt) for x in few} == {2200 - 150}
    assert [x.depth for x in many] == ([0.0, 1.0, 0.0] if task.has_depth else [None] * 3)
    for some in (few, many):
        for x in some:
            assert x.prompt[0] == Characters.bos_id
            text, (right, *wrong) = Characters().decode(x.prompt[1:]), x.answers
            front = re.match(r"([A-Za-z ]*\.\n)*", text)
            assert getattr(task_solvers, name)(text[front.end() :]) == Characters().decode(right)
            assert front.end() < 300  # one more unit does not fit
            assert right not in wrong


@pytest.mark.parametrize("name", OURS)
def test_a_prompt_of_32768_tokens_is_full(name):
    """No name, key or number runs out, and what decides it still stands there once."""
    (x,) = examples(TASKS[name], Fours(), length=32768, count=1, depths=[0.5])
    assert len(x.prompt) == 32768 - ROOM
    text, (right, *_) = Fours().decode(x.prompt[1:]), x.answers
    front = re.match(r"([A-Za-z ]*\.\n)*", text)
    assert front.end() < 300
    assert getattr(task_solvers, name)(text[front.end() :]) == Fours().decode(right)


def test_depth_is_where_the_needle_stands():
    depths = [0.0, 0.3, 1.0]
    for name in ("passkey", "needle_single", "copying", "number_strings", "key_value"):
        found = examples(TASKS[name], Characters(), length=6000, count=3, depths=depths, room=150)
        for x, depth in zip(found, depths, strict=True):
            text = Characters().decode(x.prompt)
            at = text.index(Characters().decode(x.answers[0])[1:-1]) / len(text)
            assert at == pytest.approx(depth, abs=0.08), name


def test_bad_tasks_are_one_clear_line():
    with pytest.raises(TurboqError, match="unknown task 'needles': known are all, passkey"):
        tasks_of(["needles"])
    with pytest.raises(TurboqError, match="each named once"):
        tasks_of(["passkey", "passkey"])
    assert [task.name for task in tasks_of(["all"])] == [*OURS]
    assert len(OURS) == 13
    with pytest.raises(TurboqError, match=r"copying: its shortest prompt is \d+ tokens, and a len"):
        examples(TASKS["copying"], Characters(), length=200, count=1, depths=[0.5])
    with pytest.raises(TurboqError, match=r"an answer of \d+ tokens does not fit the 8"):
        examples(TASKS["copying"], Characters(), length=2000, count=1, depths=[0.5], room=8)
    with pytest.raises(ValueError, match="must be two or more that differ"):
        Sample(prompt="a", answer="b", wrong=("b",))


def test_seeds_and_indices_differ():
    task = Task(name="x", write=lambda r, size, d: Sample(
        prompt="." * size + str(r.random()), answer="a", wrong=("b",)))  # fmt: skip
    prompts = [
        np.asarray(x.prompt).tolist()
        for seed in (0, 1)
        for x in examples(task, Characters(), length=300, count=2, depths=[0.0], seed=seed, room=9)
    ]
    assert len({tuple(p[-15:]) for p in prompts}) == 4


def test_arithmetic_asks_the_end_of_a_chain_as_long_as_the_prompt():
    """Four totals, each of which needs its step: the last one turned round changes the last."""
    for size in (0, 50):
        sample = TASKS["arithmetic"].write(random.Random(5), size, 0.0)
        assert len(re.findall(r"Add|Take away", sample.prompt)) == 8 + size
        assert [x.count("\n") for x in (sample.answer, *sample.wrong)] == [4] * 4
        assert {len(x) for x in sample.wrong} == {len(sample.answer)}
        before, _, by = sample.prompt.rpartition("Add")
        found = task_solvers.arithmetic(f"{before}Take away{by}").split("\n")
        assert found != sample.answer.split("\n")
        assert len(found) == 5
