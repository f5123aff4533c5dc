"""Exact tokens as part of the search: bits for all tokens, or more tokens kept exact?

A policy's sinks and recent window cost memory once per sequence, so they can only be weighed
against bits per token at a stated context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.plan.constraints import Constraints
from turboq_calibrate.candidates.table import Table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.refine import Costs
from turboq_calibrate.choose.search import Found, search
from turboq_calibrate.models import Model


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
    model: Model,
    table: Table,
    tokens: Int[np.ndarray, "N T"],
    budget: Budget,
    constraints: Sequence[Constraints],
    policies: Sequence[TokenPolicy],
    *,
    held_back: int = 1,
) -> tuple[TokenPolicy, Costs, list[str]]:
    """The policy whose plan has the least KL on the windows held back, the costs [U, C] of its
    candidates (for `search`), and a line on each.

    Each policy gets its own plan within the budget at the budget's context, exact tokens counted.
    A policy that leaves too little for any plan is said to, and is out.

    Raises:
      TurboqError: no policy leaves room for a plan.
    """
    tried: dict[TokenPolicy, Found] = {}
    lines = []
    for policy in policies:
        name = f"sinks {policy.sinks}, recent {policy.recent}"
        try:
            found = search(
                model,
                table,
                tokens,
                budget,
                constraints,
                policy=policy,
                held_back=held_back,
                rounds=0,
            )
        except TurboqError as error:
            lines.append(f"{name}: {error}")
            continue
        tried[policy] = found
        lines.append(f"{name}: KL on the windows held back {found.checked[found.kept]:.6g}")
    if not tried:
        raise TurboqError("; ".join(lines))
    best = min(tried, key=lambda policy: tried[policy].checked[tried[policy].kept])
    return best, tried[best].problem.costs, lines
