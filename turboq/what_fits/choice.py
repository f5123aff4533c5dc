"""The best quality that fits: the choice that users make by hand as the context grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from turboq.errors import TurboqError
from turboq.what_fits.budget import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A way of storing the cache; `kl` is measured (quality.json) or None."""

    name: str
    budget: Budget
    kl: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One option at one context and memory. `first` and `last`: contexts where it is the choice.

    `last` None: without limit; `first` None: another option is chosen at every context.
    """

    name: str
    kl: float | None
    needed: int
    fits: bool
    max_context: int | None
    first: int | None
    last: int | None


def choose(options: Sequence[Option], *, context: int, memory: int) -> tuple[int, list[Verdict]]:
    """Judges options given from best quality to worst.

    Returns:
      the position of the first that fits at `context` (-1: none does), and a verdict for each.

    Raises:
      TurboqError: no options, or weights alone do not fit.
    """
    if not options:
        raise TurboqError("nothing to choose from: name formats, best quality first")
    verdicts: list[Verdict] = []
    reached: int | None = 0  # the longest context that a better option serves
    for option in options:
        longest = option.budget.max_context(memory)
        serves = reached is not None and (longest is None or longest > reached)
        verdicts.append(
            Verdict(
                name=option.name,
                kl=option.kl,
                needed=(needed := option.budget.needed(context)),
                fits=needed <= memory,
                max_context=longest,
                first=reached + 1 if reached is not None and serves else None,
                last=longest if serves else None,
            )
        )
        if serves:
            reached = longest
    return next((i for i, v in enumerate(verdicts) if v.fits), -1), verdicts


def by_quality(options: Sequence[Option], rows: Sequence[dict[str, Any]]) -> list[Option]:
    """The options from lowest to highest mean KL: the mean of its rows (of quality.json).

    Raises:
      TurboqError: an option has no row.
    """
    by_name: dict[str, list[float]] = {}
    for row in rows:  # one per text
        by_name.setdefault(row["name"], []).append(row["kl_mean"])
    measured = {name: sum(kl) / len(kl) for name, kl in by_name.items()}
    missing = [option.name for option in options if option.name not in measured]
    if missing:
        raise TurboqError(
            f"no row named {missing[0]!r} in the quality files: rows are "
            f"{', '.join(measured) or 'none'}; name options as the rows are"
        )
    ranked = [dataclasses.replace(option, kl=measured[option.name]) for option in options]
    return sorted(ranked, key=lambda option: option.kl or 0.0)
