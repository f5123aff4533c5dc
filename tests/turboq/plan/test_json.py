"""Strict JSON in, canonical JSON out (RFC 8785)."""

import json
import struct

import pytest

from turboq.plan import PlanError
from turboq.plan.canonical import canonical, digest, number
from turboq.plan.document import pretty
from turboq.plan.strict import MAX_DEPTH, MAX_INT, MAX_JSON_BYTES, MAX_TEXT, parse_json


@pytest.mark.parametrize(
    ("bits", "text"),  # RFC 8785 appendix B
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555555", "333333333.3333333"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_numbers_as_ecmascript_prints_them(bits, text):
    (x,) = struct.unpack(">d", bytes.fromhex(bits))
    assert number(x) == text
    assert float(text) == x


def test_canonical_order_and_escapes():
    # RFC 8785 section 3.2.3: sorted by UTF-16 code units, so the emoji precedes U+FB33.
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\x80", "\xf6"]
    text = canonical(dict.fromkeys(keys, 0))
    assert list(json.loads(text)) == ["\r", "1", "\x80", "\xf6", "\u20ac", "\U0001f600", "\ufb33"]
    assert canonical({"b": [1, 1.0, True, None], "a": '\u20ac$\x0f\n"\\/'}) == (
        '{"a":"\u20ac$\\u000f\\n\\"\\\\/","b":[1,1,true,null]}'
    )
    # sha256 of '{"a":1}' by another program
    due = "sha256:015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert digest({"a": 1.0}) == due


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_canonical_refuses_what_json_lacks(x):
    with pytest.raises(ValueError, match="no JSON form"):
        canonical([x])
    with pytest.raises(TypeError, match="bytes is not"):
        canonical(b"x")


def test_pretty_changes_nothing_but_space():
    value = {"a": [{"b": list(range(100))}, {}, [], "é\u2028"], "c": {"d": {"e": None}}}
    assert json.loads(pretty(value, width=20)) == value
    assert max(map(len, pretty(value, width=20).split("\n"))) <= 20


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON: Extra data"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
        (b'{"a": [1, {"b": 2, "b": 2}]}', r"^a\[1\]\.b: given twice"),
        (b'{"a": [NaN]}', r"^a\[0\]: NaN is not a finite number"),
        (b'{"a": {"b": -Infinity}}', r"^a\.b: -Infinity is not a finite"),
        (b'{"a": 1e999}', "^a: not a finite number"),
        (b'{"a": -9007199254740992}', r"^a: integer beyond 2\*\*53 - 1"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"^a: integer beyond"),
        (b'{"a b.c": NaN}', r'^\["a b\.c"\]: NaN'),
        (b'{"a": "\\ud800"}', "^a: text holds half"),
        (b'{"\\udfff": 1}', "half of a surrogate"),
        (b'{"a": "' + b"x" * (MAX_TEXT + 1) + b'"}', "^a: text of 4097 characters"),
        (b"[" * (MAX_DEPTH + 1), "nested deeper than the limit of 32"),
        (b"[" * 1_000_000, "nested deeper"),
        (b'{"a":' * 1_000_000, "nested deeper"),
        (b"[" * 40 + b"]" * 40, "nested deeper"),
        (b" " * (MAX_JSON_BYTES + 1), "more than the limit"),
    ],
)
def test_hostile_json_is_one_error(raw, message):
    with pytest.raises(PlanError, match=message) as info:
        parse_json(raw)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 500


def test_limits_are_inclusive():
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep) is not None
    assert parse_json(b'{"a": %d, "b": "%s"}' % (MAX_INT, b"x" * MAX_TEXT))["a"] == MAX_INT
    brackets = json.dumps({"a": '[["\\[' * 100, "b": "\U0001f600"})
    assert parse_json(brackets.encode()) == json.loads(brackets)
