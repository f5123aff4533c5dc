"""What scores of one task say, plan against exact cache: paired, with intervals and tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.tasks.score import Score

LEVEL = 0.05  # of the test against chance


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: of the pairs that differ, is either way likelier?

    With b pairs right before only and c right after only, b ~ Binomial(b + c, 1/2).
    Source: Q. McNemar, "Note on the sampling error of the difference...", Psychometrika 1947.
    """
    lost = sum(x and not y for x, y in zip(before, after, strict=True))
    won = sum(y and not x for x, y in zip(before, after, strict=True))
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def needed(answers: int) -> int:
    """Examples from which on all right ones are more than chance: answers^-n < LEVEL."""
    return next(n for n in itertools.count(1) if answers**-n < LEVEL)


def above_chance(chosen: Sequence[bool], answers: int) -> bool:
    """The right one of so many answers is chosen more often than by drawing lots (one-sided)."""
    test = stats.binomtest(sum(chosen), len(chosen), 1 / answers, alternative="greater")
    return bool(test.pvalue < LEVEL)


def at_chance(exact: Sequence[Score]) -> bool:
    """The exact cache does not choose the right answer more often than by drawing lots."""
    return not above_chance([x.chosen for x in exact], len(exact[0].logp))


def summary(plan: Sequence[Score], exact: Sequence[Score], *, seed: int = 0) -> dict[str, Any]:
    """One row of the results; shares are of the same examples under both caches.

    at_chance: nothing can be lost. examples_needed: fewer can never say so. logp: mean
      log-probability of the right answer, nats (logp_examples: of each); logp_change: plan less
      exact, with its paired bootstrap interval over examples. rank: geometric mean; rank_median.
      chosen, matches: shares with the right answer likeliest, and written by greedy decoding; *_p:
      exact McNemar tests. agrees: greedy decoding writes what it does with the exact cache.
    """
    change = np.array([a.logp[0] - b.logp[0] for a, b in zip(plan, exact, strict=True)])
    ci = bootstrap_ci(change, seed=seed)
    row: dict[str, Any] = {
        "examples": len(plan),
        "at_chance": at_chance(exact),
        "examples_needed": needed(len(exact[0].logp)),
        "logp_examples": [x.logp[0] for x in plan],
        "logp": float(np.mean([x.logp[0] for x in plan])),
        "logp_exact": float(np.mean([x.logp[0] for x in exact])),
        "logp_change": float(change.mean()),
        "logp_change_ci": None if ci is None else list(ci),
        "rank": float(stats.gmean([x.rank for x in plan])),
        "rank_exact": float(stats.gmean([x.rank for x in exact])),
        "rank_median": float(np.median([x.rank for x in plan])),
        "rank_median_exact": float(np.median([x.rank for x in exact])),
        "agrees": float(np.mean([x.agrees for x in plan])),
    }
    for name in ("chosen", "matches"):
        mine, theirs = ([getattr(x, name) for x in some] for some in (plan, exact))
        row |= {name: float(np.mean(mine)), f"{name}_exact": float(np.mean(theirs))}
        row[f"{name}_p"] = mcnemar(theirs, mine)
    return row
