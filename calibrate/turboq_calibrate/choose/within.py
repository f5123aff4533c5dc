"""From a budget to a choice: the limit it leaves, errors that say what would do, a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from turboq.cache import accounting
from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.plan.constraints import Constraints
from turboq_calibrate.choose.budget import Budget, Memory
from turboq_calibrate.choose.solver import solve
from turboq_calibrate.choose.solver.problem import Infeasible, Problem
from turboq_calibrate.choose.solver.solve import GAP, SECONDS, Allocation


class NoPlan(TurboqError):
    """No plan fits the budget, or none that fits passes the check."""


def within(
    problem: Problem,
    budget: Budget,
    constraints: Constraints | Sequence[Constraints] = Constraints(),  # noqa: B008
    *,
    policy: TokenPolicy | None = None,
    gap: float = GAP,
    seconds: float = SECONDS,
) -> Allocation:
    """The cheapest choice within a budget.

    At a context, `used` and `limit` are bytes of everything, else bits of one token.

    Args:
      policy: exact tokens, counted in a budget at a context.
      gap, seconds: as in `solve.allocate`.

    Raises:
      NoPlan: nothing fits; the message names the smallest budget that does.
    """
    if budget.context is not None:
        return _at_context(problem, budget, constraints, policy or TokenPolicy(), gap, seconds)
    limit = budget.bits(problem.channels)
    try:
        return solve.allocate(problem, limit, constraints, gap=gap, seconds=seconds)
    except Infeasible as error:
        least = error.smallest
        need = None if least is None else _per_token(least, problem)
        raise _refused(f"{budget.text} is {_per_token(limit, problem)}", need, error) from None


def _at_context(
    problem: Problem, budget: Budget, constraints, policy: TokenPolicy, gap: float, seconds: float
) -> Allocation:
    """Solves without what depends on the whole choice (tables, what joined heads share), then with
    less as long as that exceeds.

    The first bound holds throughout, because it allows more. A refusal names the smallest choice.
    """
    memory = Memory.of(problem, budget, policy)
    total = int(budget.nbytes or 0)

    def at(limit: int) -> Allocation:
        return solve.allocate(
            problem, limit, constraints, sizes=memory.sizes, gap=gap, seconds=seconds
        )

    def used(found: Allocation) -> int:
        return memory.used(problem, found.chosen)

    limit, bound = total - memory.fixed, None
    while True:
        try:
            found = at(limit)
        except Infeasible as error:
            if error.smallest is None:
                raise _refused(budget.text, None, error) from None
            found = at(error.smallest)
            if used(found) > total:
                given = f"{budget.text} is {_memory(total)}"
                raise _refused(given, _memory(used(found)), error) from None
        bound = found.bound if bound is None else bound
        if used(found) <= total:
            bound = min(bound, found.cost)
            return dataclasses.replace(found, used=used(found), limit=total, bound=bound)
        limit = min(limit, found.used) - (used(found) - total)


def _refused(given: str, need: str | None, error: Infeasible) -> NoPlan:
    if need is None:
        return NoPlan(f"no budget helps: {error.why or 'the constraints allow no plan'}")
    return NoPlan(f"budget {given}: the smallest feasible budget is {need}")


def _per_token(bits: int, problem: Problem) -> str:
    return f"{_bytes(bits)}B per token ({_up(Fraction(bits, problem.channels))} bits per channel)"


def _bytes(bits: int) -> str:
    """Bits in bytes, exactly: 12 -> 1.5."""
    return f"{bits // 8}" if bits % 8 == 0 else f"{bits / 8:.3f}".rstrip("0")


def _up(value: Fraction) -> str:
    """Four decimals, rounded up, so that the number can be given as a budget."""
    return f"{-(-value * 10**4 // 1) / 10**4:.4f}"


def _memory(nbytes: int) -> str:
    return f"{nbytes}B ({accounting.readable(nbytes)}) in all"


def record(allocation: Allocation, budget: Budget) -> dict[str, Any]:
    """What a plan keeps of its allocation, JSON-ready."""
    return {
        "budget": budget.text,
        "limit": allocation.limit,
        "used": allocation.used,
        "unit": "bits per token" if budget.context is None else "bytes at the context",
        "predicted": allocation.cost,
        "bound": allocation.bound,
        "method": allocation.method,
        "constraints": allocation.constraints.config(),
    }


def report(problem: Problem, allocation: Allocation, budget: Budget) -> str:
    """Lines for people: what was used, what it is predicted to cost, how near the optimum."""
    bits = problem.bits(allocation.chosen)
    used = f"{_bytes(bits)} B per token, {bits / problem.channels:.4f} bits per channel"
    if budget.context is not None:
        sequences = f"{budget.batch} x " if budget.batch > 1 else ""
        used += (
            f"; {accounting.readable(allocation.used)} of {accounting.readable(allocation.limit)}"
            f" at {sequences}{budget.context:,} tokens"
        )
    rows = {
        "budget": budget.text,
        "used": used,
        "predicted loss": f"{allocation.cost:.6g}",
        "lower bound": f"{allocation.bound:.6g} (gap {100 * allocation.gap:.2g} %)",
        "granularity": allocation.constraints.granularity,
        "solved by": allocation.method,
    }
    if not allocation.binding:
        rows["note"] = (
            "the budget is above what the best of these candidates need: a larger one gains nothing"
        )
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
