"""Small allocation problems that the allocator's tests share, and their optima by enumeration."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from unchecked import unchecked

from turboq.codecs import FP8, Codec, Exact, Ggml, TurboQuantMSE
from turboq.plan.constraints import Boundary, Constraints, FirstLast, Scheme, match
from turboq.plan.violations import violations_of
from turboq_calibrate.candidates.table import Unit
from turboq_calibrate.choose.solver.problem import Problem

DIM = 32
PALETTE: dict[str, Codec] = {
    "q4": Ggml(dim=DIM, type="q4_0"),
    "tq3": TurboQuantMSE(dim=DIM, bits=3),
    "fp8": FP8(dim=DIM, scale="token"),
    "exact": Exact(dim=DIM),
}
ALL = tuple(PALETTE)

_EXACT = (match("exact"),)
SCHEMES = (
    Scheme(name="four", k=(match("ggml", type="q4_0"),), v=(match("ggml", type="q4_0"),)),
    Scheme(name="mixed", k=(match("fp8"),), v=(match("turboquant_mse", bits=(2, 3)),)),
    Scheme(name="auto", k=_EXACT, v=_EXACT),
)

# Every kind of rule, and the combinations that engines have.
KINDS: dict[str, Constraints] = {
    "none": Constraints(),
    "per_kv": Constraints(granularity="per_kv"),
    "per_layer": Constraints(granularity="per_layer"),
    "uniform": Constraints(granularity="uniform"),
    "uniform_same": Constraints(granularity="uniform", same_k_v=True),
    "same_per_head": Constraints(same_k_v=True),
    "codecs_of_k": Constraints(k=(match("ggml"), match("exact"))),
    "codecs_of_v": Constraints(granularity="per_kv", v=(match("fp8"),)),
    "min_bits": Constraints(min_bits=4.0),
    "schemes_per_layer": Constraints(granularity="per_layer", schemes=SCHEMES),
    "schemes_per_head": Constraints(schemes=SCHEMES),
    "schemes_uniform": Constraints(granularity="uniform", schemes=SCHEMES),
    "boundary": Constraints(boundary=Boundary(first=1, last=1, v=_EXACT)),
    "skip_list": Constraints(
        granularity="per_layer", schemes=SCHEMES, max_formats=1, uncounted=("auto",)
    ),
    "skip_list_and_boundary": Constraints(
        granularity="per_layer",
        schemes=SCHEMES,
        max_formats=1,
        uncounted=("auto",),
        boundary=Boundary(first=1, last=0, k=_EXACT, v=_EXACT),
    ),
    "one_format": Constraints(max_formats=1),
    "two_formats": Constraints(max_formats=2),
    "one_beside_exact": Constraints(granularity="per_kv", max_formats=1, uncounted=("exact",)),
    "one_per_layer": Constraints(max_head_formats=1),
    "both_counts": Constraints(max_formats=2, max_head_formats=1),
    "first_last": Constraints(granularity="per_kv", first_last=FirstLast()),
    "first_last_pairs": Constraints(granularity="per_layer", first_last=FirstLast()),
    "first_last_schemes": Constraints(
        granularity="per_layer", schemes=SCHEMES, first_last=FirstLast(outer=_EXACT)
    ),
    "first_last_together": Constraints(
        granularity="per_kv", first_last=FirstLast(together=True, same_ends=True)
    ),
    "first_fixed": Constraints(
        granularity="per_kv", first_last=FirstLast(first=1, last=0, outer=(match("fp8"),))
    ),
    "same_ends": Constraints(granularity="per_kv", first_last=FirstLast(last=1, same_ends=True)),
}


def units(layers: int, heads: int) -> tuple[Unit, ...]:
    return tuple(
        Unit(layer=3 * layer, side=side, head=head)  # not 0..L-1: a hybrid model has gaps
        for layer in range(layers)
        for side in ("k", "v")
        for head in range(heads)
    )


def problem(
    costs: np.ndarray, sizes: np.ndarray, layers: int, heads: int, names: tuple[str, ...] = ()
) -> Problem:
    """Candidates are those named, or the first of `PALETTE`, whatever sizes are given."""
    names = names or tuple(PALETTE)[: costs.shape[1]]
    places = units(layers, heads)
    row = tuple(PALETTE[name] for name in names)
    return Problem(
        units=places, labels=names, codecs=(row,) * len(places), costs=costs, sizes=sizes
    )


def random_problem(
    seed: int, layers: int, heads: int, names: tuple[str, ...] = ALL, *, forbidden: float = 0.0
) -> Problem:
    """Larger candidates mostly cost less. Costs are multiples of 2^-10, so sums are exact."""
    rng = np.random.default_rng(seed)
    candidates = len(names)
    shape = (2 * layers * heads, candidates)
    sizes = rng.integers(2, 9, shape).cumsum(axis=1) * 16
    loss = rng.integers(1, 2000, (shape[0], 1)) * 0.3 ** np.arange(candidates)
    costs = np.round(loss + rng.integers(0, 60, shape)) / 1024
    costs[rng.random(shape) < forbidden] = np.inf
    costs[np.isinf(costs).all(axis=1), 0] = 1.0
    return problem(costs, sizes, layers, heads, names)


def legal(of: Problem, constraints: Constraints, chosen: np.ndarray) -> bool:
    placed = {(u.layer, u.side, u.head): of.codecs[i][chosen[i]] for i, u in enumerate(of.units)}
    return not violations_of(constraints, placed)


class Enumerated:
    """All choices of a problem that obey the constraints: the oracle.

    `known` remembers which choices are legal, which does not depend on costs and sizes.
    """

    def __init__(self, of: Problem, constraints: Constraints, known: dict[bytes, bool]):
        self.of, self.constraints, self.known = of, constraints, known
        self.choices = every_choice(len(of.units), len(of.labels))
        rows = np.arange(len(of.units))
        self.costs = of.costs[rows, self.choices].sum(axis=1)
        self.sizes = of.sizes[rows, self.choices].sum(axis=1)

    def _first(self, order: np.ndarray) -> int | None:
        for i in order:
            if np.isfinite(self.costs[i]) and self._legal(self.choices[i]):
                return int(i)
        return None

    def _legal(self, chosen: np.ndarray) -> bool:
        key = chosen.tobytes()
        if key not in self.known:
            with unchecked():
                self.known[key] = legal(self.of, self.constraints, chosen)
        return self.known[key]

    def best(self, limit: int) -> float | None:
        """The least cost within a limit; None if nothing fits."""
        fit = np.flatnonzero(self.sizes <= limit)
        found = self._first(fit[np.argsort(self.costs[fit], kind="stable")])
        return None if found is None else float(self.costs[found])

    def smallest(self) -> int | None:
        """The least size of all."""
        found = self._first(np.argsort(self.sizes, kind="stable"))
        return None if found is None else int(self.sizes[found])


@functools.cache
def every_choice(units: int, candidates: int) -> np.ndarray:
    return np.array(list(itertools.product(range(candidates), repeat=units)))
