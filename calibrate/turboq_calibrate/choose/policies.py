"""Exact tokens as part of the search: bits for all tokens, or more tokens kept exact?

A policy's sinks and recent window cost memory once per sequence, so they can only be weighed
against bits per token at a stated context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Found
from turboq_calibrate.choose.within import NoPlan


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


def best_policy(
    policies: Sequence[TokenPolicy], search: Callable[[TokenPolicy], Found]
) -> tuple[Found, list[str]]:
    """The plan of the policy with the least KL on the windows held back, and a line on each.

    `search` finds and checks the plan of one policy (`plan_within`). A policy that leaves too
    little for any plan, or whose plans all fail the check, is said to, and is out.

    Raises:
      NoPlan: no policy leaves room for a plan.
    """
    tried: list[tuple[float, Found]] = []
    lines = []
    for policy in policies:
        name = f"sinks {policy.sinks}, recent {policy.recent}"
        try:
            found = search(policy)
        except NoPlan as error:
            lines.append(f"{name}: {error}")
            continue
        if found.checked is None:
            raise ValueError("policies are compared by what the check measured")
        loss = found.checked.loss(found.checked.kept)
        tried.append((loss, found))
        lines.append(f"{name}: KL on the windows held back {loss:.6g}")
    if not tried:
        raise NoPlan("; ".join(lines))
    return min(tried, key=lambda pair: pair[0])[1], lines
