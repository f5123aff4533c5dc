"""Exact tokens as part of the search: bits for all tokens, or more tokens kept exact?

A policy's sinks and recent window cost memory once per sequence, so they can only be weighed
against bits per token at a stated context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq_calibrate.choose.budget import Budget

DEFAULT = ("4:0", "4:32", "4:128")  # tried at a context where none is named


def policies_of(words: Sequence[str], default: TokenPolicy, budget: Budget) -> list[TokenPolicy]:
    """Policies from "SINKS:RECENT" words, the exact type taken from `default`, which alone is left
    without words.

    Raises:
      TurboqError: a word of another form, one given twice, or several without a context.
    """
    if not words:
        return [default]
    found = []
    for word in words:
        sinks, colon, recent = word.partition(":")
        if not (colon and sinks.isdecimal() and recent.isdecimal()):
            raise TurboqError(f"policy {word!r} must be SINKS:RECENT, for example 4:32")
        found.append(dataclasses.replace(default, sinks=int(sinks), recent=int(recent)))
    if len(set(found)) != len(found):
        raise TurboqError(f"policies {','.join(words)} name one twice")
    if len(found) > 1 and budget.context is None:
        raise TurboqError(
            f"{budget.text} has no context, at which exact tokens could be counted: give a budget "
            "like 131072@4GiB to choose among policies"
        )
    return found
