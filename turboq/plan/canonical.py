"""One byte string per JSON value: RFC 8785 (JCS), so that any language computes the same hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_quote = json.encoder.encode_basestring  # RFC 8785 escapes exactly what JSON must escape


def canonical(value: Any) -> str:
    """RFC 8785 text: members sorted by UTF-16 code units, no spaces, ECMAScript numbers.

    Integers are printed exactly, which equals the RFC within +-(2**53 - 1); readers refuse larger.

    Raises:
      TypeError: not a JSON value.
      ValueError: NaN or an infinity.
    """
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, dict):
        # Code units of ASCII are its characters, which sort many times faster.
        ascii_only = all(map(str.isascii, value))
        keys = sorted(value, key=None if ascii_only else lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{_quote(k)}:{canonical(value[k])}" for k in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return number(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def digest(value: Any) -> str:
    """`sha256:` and the hex SHA-256 of `canonical(value)` in UTF-8."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()


def number(x: float) -> str:
    """ECMAScript's Number::toString: the shortest digits that read back, exponent outside
    1e-6 <= |x| < 1e21. Python's repr has the same digits but other exponent rules.

    Raises:
      ValueError: NaN and the infinities have no JSON form.
    """
    if x != x or x in (float("inf"), float("-inf")):
        raise ValueError(f"{x} has no JSON form")
    if x == 0:
        return "0"
    sign = "-" if x < 0 else ""
    mantissa, _, exponent = repr(abs(x)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    leading_zeros = len(whole + fraction) - len(digits)
    point = len(whole) - leading_zeros + int(exponent or 0)  # digits before the decimal point
    digits = digits.rstrip("0")
    n = len(digits)
    if n <= point <= 21:
        return sign + digits + "0" * (point - n)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = f".{digits[1:]}" if n > 1 else ""
    return f"{sign}{digits[0]}{rest}e{point - 1:+d}"
