"""Calibration and evaluation text from JSON lines, and weights of texts."""

import json
from fractions import Fraction

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq_calibrate.models.chat import ChatTemplate
from turboq_calibrate.observe.texts import load_text, mixed_windows
from turboq_calibrate.observe.weights import in_turn, weighted

CHAT = ChatTemplate(source="{{ bos_token }}{% for m in messages %}[{{ m.role }}:{{ m.content }}]"
                    "{% endfor %}{{ tools or '' }}", special={"bos_token": "\7"})  # fmt: skip
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


class Letters:
    """One token per character; BOS is 7."""

    def __init__(self, adds_bos: bool = False, chat: ChatTemplate | None = CHAT):
        self.bos_id, self.adds_bos, self.chat = 7, adds_bos, chat

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_documents_and_conversations_of_a_file(tmp_path):
    path = tmp_path / "mixed.JSONL"
    lines(path, {"text": "a\u2028b", "id": 3}, {"messages": TALK, "tools": [1]}, {"text": "c"})
    path.write_text("\ufeff" + path.read_text() + "\n\n")
    talk = "\7[user:hi][assistant:yo]"
    assert load_text(path, CHAT).text == f"a\u2028b\n\n{talk}[1]c\n\n"
    assert load_text(path, CHAT).source == "mixed.JSONL"
    lines(path, {"text": "a"}, {"text": None, "messages": TALK})
    assert load_text(path, CHAT).text == f"a\n\n{talk}"
    lines(path, {"text": "a"})
    assert load_text(path).text == "a\n\n"  # needs no template


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"', "is not valid JSON: "),
        ("[" * 100_000, "is not valid JSON: "),
        ("[1]", "must be a JSON object, not list"),
        ('{"conversations": [], "id": 1}', "has neither text nor messages, but 'conversations', "),
        ("{}", "has neither text nor messages, but nothing"),
        ('{"text": "a", "messages": [1]}', "has both text and messages: keep one"),
        ('{"text": 3}', "text=3 must be text"),
        ('{"text": " "}', "text=' ' must be text"),
        ('{"messages": []}', "messages must be a list of one message at least"),
        ('{"messages": [{"role": "user"}]}', "message 0 of role 'user' has content None"),
    ],
)
def test_bad_lines_are_named(tmp_path, row, message):
    path = lines(tmp_path / "bad.jsonl", {"text": "good"})
    path.write_text(path.read_text() + "\n" + row + "\n")
    with pytest.raises(TurboqError) as error:
        load_text(path, CHAT)
    assert str(error.value).startswith(f"{path}, line 3")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_model_or_its_template_cannot_write_is_named(tmp_path):
    path = lines(tmp_path / "chat.jsonl", {"messages": TALK})
    with pytest.raises(TurboqError, match=r"chat.jsonl, line 1 holds messages, and the model has"):
        mixed_windows([str(path)], Letters(chat=None), length=4, count=1)
    strict = ChatTemplate(source="{{ raise_exception('user first') }}")
    with pytest.raises(TurboqError, match=r"chat.jsonl, line 1: the model's chat template: user f"):
        load_text(path, strict)
    (tmp_path / "none.jsonl").write_text("\n \n\t\n")
    with pytest.raises(TurboqError, match=r"none.jsonl is empty"):
        load_text(tmp_path / "none.jsonl")


def test_windows_of_conversations_begin_with_one_bos(tmp_path):
    path = lines(tmp_path / "chat.jsonl", {"messages": TALK}, {"messages": TALK})
    one = [ord(c) for c in "[user:hi][assistant:yo]"]
    for adds in (True, False):  # the template's own, or the tokenizer's instead of it
        got = mixed_windows([str(path)], Letters(adds), length=48, count=1)
        np.testing.assert_array_equal(got.tokens[0], [7, *one, 7, *one])


# ---- weights


def test_weights_are_read_behind_a_name(tmp_path, monkeypatch):
    assert weighted("a.jsonl@3") == ("a.jsonl", 3)
    assert weighted("self:0@0.5") == ("self:0", Fraction(1, 2))
    assert weighted("me@home.txt") == ("me@home.txt", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b@2").write_text("x")
    assert weighted("b@2") == ("b@2", 1)
    assert weighted("b@2@4") == ("b@2", 4)
    with pytest.raises(TurboqError, match="text a@0: a weight must be more than 0"):
        weighted("a@0")


def test_turns_are_shared_as_weights_say():
    assert in_turn([Fraction(1)] * 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    for weights in ((3, 1), (1, 3), (5, 3, 2), (1, 1, 8)):
        turns = in_turn([Fraction(w) for w in weights], 2 * sum(weights))
        for n in range(1, len(turns) + 1):
            # Webster: no text could hand a window to another and both come nearer to their share.
            share = [turns[:n].count(i) for i in range(len(weights))]
            worst = [(s - 0.5) / w for s, w in zip(share, weights, strict=True)]
            best = [(s + 0.5) / w for s, w in zip(share, weights, strict=True)]
            assert max(worst) <= min(best)
        assert [turns.count(i) for i in range(len(weights))] == [2 * w for w in weights]


def test_windows_of_weighted_texts(tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / name).write_text(chr(256 * (i + 1)) * 100 + "x")
    a, b, c = (str(tmp_path / name) for name in "abc")
    equal = mixed_windows([a, b, c], Letters(), length=4, count=8)
    same = mixed_windows([f"{a}@2", f"{b}@2.0", f"{c}@2"], Letters(), length=4, count=8)
    assert (equal.weights, same.weights) == ((), ())
    np.testing.assert_array_equal(equal.tokens, same.tokens)
    got = mixed_windows([f"{a}@5", b, f"{c}@2"], Letters(), length=4, count=8)
    assert got.weights == (5, 1, 2)
    assert np.bincount(got.text).tolist() == [5, 1, 2]
    assert (got.tokens // 256 == got.text[:, None] + 1).all()
    assert got.text.tolist() == in_turn(got.weights, 8)
    for sources, count, message in (
        ([f"{a}@9", b], 2, "2 windows leave text .*b none of its weight 1"),
        ([f"{a}@9", b], None, "share a number of windows"),
        ([f"{a}@9", a], 4, "is given twice"),
    ):
        with pytest.raises(TurboqError, match=message):
            mixed_windows(sources, Letters(), length=4, count=count)
