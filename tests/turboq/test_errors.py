"""What errors quote of others' files: exact where it is short, cut and on one line where not."""

import pytest

from turboq.errors import LONGEST, TurboqError, quoted, shortened

LONG = "ab" * 10_000


@pytest.mark.parametrize(
    "value",
    [
        "a",
        'it\'s "so"',
        b"\xff",
        3,
        -0.5,
        None,
        True,
        [1, "x", None],
        {"a": [1], "b": {"c": 2}},
        (),
    ],
)
def test_short_values_are_their_repr(value):
    assert quoted(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [LONG, LONG.encode(), [LONG] * 99, {LONG: LONG}, 10**4000, "\n" * 999, [[[[[[LONG]]]]]]],
    ids=["text", "bytes", "list", "object", "number", "lines", "deep"],
)
def test_long_values_are_cut_and_never_break_the_line(value):
    assert len(quoted(value)) <= LONGEST
    assert "\n" not in quoted(value)
    assert quoted(value)[:8] == repr(value)[:8] or isinstance(value, list)


def test_text_of_others():
    assert shortened("two\n  lines\t.") == "two lines ."
    assert shortened(LONG, 10) == "abababa..."
    assert shortened(ValueError("why")) == "why"


def test_what_a_terminal_would_obey_is_escaped():
    assert (
        shortened("red \x1b[31m and \u202e back \ud800") == r"red \x1b[31m and \u202e back \ud800"
    )
    assert shortened("\x00" * 100, 10) == r"\x00\x0..."
    assert shortened("Grüße \U0001f600") == "Grüße \U0001f600"
    assert str(TurboqError("field \x1b[31m of\n a file")) == "field \\x1b[31m of\n a file"
    assert str(TurboqError()) == ""
