"""The allocator against enumeration of all choices, and its bound against a linear program."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
import scipy.optimize
from allocate_cases import (
    ALL,
    KINDS,
    Enumerated,
    every_choice,
    legal,
    problem,
    random_problem,
    units,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from turboq.errors import TurboqError
from turboq.plan.constraints import Constraints
from turboq_calibrate.choose.solver import exact, formats, hull, solve
from turboq_calibrate.choose.solver.problem import Infeasible, Problem
from turboq_calibrate.choose.solver.solve import allocate

FLOAT = 1e-9  # relative: HiGHS proves optima to its tolerances, sums are rounded


def _limits(of: Problem, rng: np.random.Generator, count: int) -> list[int]:
    low, high = int(of.sizes.min(axis=1).sum()), int(of.sizes.max(axis=1).sum())
    return [int(x) for x in rng.integers(low, high + 1, count)]


def _shape(constraints: Constraints) -> tuple[int, int, tuple[str, ...]]:
    """Layers, heads and candidates that show the rule and can still be enumerated."""
    if constraints.first_last is not None:
        if constraints.joint or constraints.first_last.outer:
            return 4, 1, ("q4" if constraints.schemes else "fp8", "exact")
        return 4, 1, ("q4", "fp8", "exact")
    many_heads = constraints.same_k_v or constraints.max_head_formats
    if constraints == Constraints() or many_heads:
        return 2, 2, ("q4", "fp8", "exact")
    return 3, 1, ALL


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_constraints_against_enumeration(kind):
    constraints = KINDS[kind]
    seen, known = 0, {}
    for seed in range(4):
        of = random_problem(seed, *_shape(constraints), forbidden=0.1 * (seed % 2))
        oracle = Enumerated(of, constraints, known)
        for limit in _limits(of, np.random.default_rng(seed), 3):
            best = oracle.best(limit)
            if best is None:
                with pytest.raises(Infeasible) as error:
                    allocate(of, limit, constraints, gap=0.0)
                assert error.value.smallest == oracle.smallest()
                continue
            found = allocate(of, limit, constraints, gap=0.0)
            assert legal(of, constraints, found.chosen)
            assert found.used == of.bits(found.chosen) <= limit
            assert found.cost == of.cost(found.chosen) == pytest.approx(best, rel=FLOAT)
            assert found.bound <= best * (1 + FLOAT)
            assert found.gap <= FLOAT
            seen += 1
    assert seen >= 4


@st.composite
def _instances(draw):
    layers, candidates = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    count = 2 * layers * candidates
    entry = st.tuples(st.integers(0, 3000), st.integers(0, 40), st.booleans())
    rows = np.array(draw(st.lists(entry, min_size=count, max_size=count)))
    costs, sizes, barred = (rows[:, i].reshape(2 * layers, -1) for i in range(3))
    barred[:, draw(st.integers(0, candidates - 1))] = 0
    limit = draw(st.integers(0, int(sizes.max(axis=1).sum()) + 1))
    return np.where(barred, np.inf, costs / 1024), sizes, layers, limit


@settings(max_examples=60, deadline=None)
@given(_instances(), st.sampled_from(["none", "per_layer", "uniform", "two_formats"]))
def test_random_instances_ties_and_zeros(instance, kind):
    costs, sizes, layers, limit = instance
    of = problem(costs, sizes, layers, 1)
    oracle = Enumerated(of, KINDS[kind], {})
    best = oracle.best(limit)
    if best is None:
        with pytest.raises(Infeasible) as error:
            allocate(of, limit, KINDS[kind], gap=0.0)
        assert error.value.smallest == oracle.smallest()
        return
    found = allocate(of, limit, KINDS[kind], gap=0.0)
    assert found.used <= limit
    assert found.cost == pytest.approx(best, rel=FLOAT, abs=FLOAT)
    assert found.bound <= best + FLOAT


@pytest.mark.parametrize("seed", range(6))
def test_bound_is_the_linear_program(seed):
    of = random_problem(seed, 5, 3, forbidden=0.2)
    for limit in _limits(of, np.random.default_rng(seed), 4):
        rows, columns = of.costs.shape
        allowed = np.isfinite(of.costs)
        if limit < np.where(allowed, of.sizes, 10**9).min(axis=1).sum():
            continue
        program = scipy.optimize.linprog(
            np.where(allowed, of.costs, 0).ravel(),
            A_ub=of.sizes.reshape(1, -1).astype(float),
            b_ub=[limit],
            A_eq=np.kron(np.eye(rows), np.ones(columns)),
            b_eq=np.ones(rows),
            bounds=[(0, 1 if ok else 0) for ok in allowed.ravel()],
        )
        answer = hull.greedy(of.costs, of.sizes, limit)
        assert answer.bound == pytest.approx(program.fun, rel=FLOAT)
        assert answer.bound <= answer.cost
        # A limit that whole segments fill leaves nothing to split: greed is optimal there.
        filled = hull.greedy(of.costs, of.sizes, of.bits(answer.chosen))
        assert filled.cost == answer.cost == pytest.approx(filled.bound, rel=FLOAT)


def test_rounding_does_not_turn_collinear_segments_around(rng):
    # Candidates on a line: gains of a row's segments differ by rounding alone, up or down.
    sizes = rng.integers(1, 50, (500, 6)).cumsum(axis=1)
    costs = rng.random((500, 1)) + rng.random((500, 1)) * (400 - sizes)
    answer = hull.greedy(costs, sizes, int(sizes.max(axis=1).sum()))
    assert np.array_equal(answer.chosen, np.full(500, 5))
    assert answer.cost == pytest.approx(answer.bound, rel=FLOAT)


@pytest.mark.parametrize("seed", range(8))
def test_reported_gap_is_honest_whenever_the_search_stops(seed):
    # Coarse stops: nothing is searched after the greedy step, or only for the first subset.
    of = random_problem(seed, 6, 1, ALL[:2])
    every = every_choice(12, 2)
    costs = of.costs[np.arange(12), every].sum(axis=1)
    sizes = of.sizes[np.arange(12), every].sum(axis=1)
    for limit in _limits(of, np.random.default_rng(seed), 4):
        best = costs[sizes <= limit].min()
        greedy = hull.greedy(of.costs, of.sizes, limit)
        swapped = hull.exchange(of.costs, of.sizes, limit, greedy)
        closed = exact.close(of.costs, of.sizes, limit, swapped, seconds=10.0)
        for answer in (greedy, swapped, closed):
            assert answer.bound <= best + FLOAT
            assert best <= answer.cost + FLOAT
            assert of.bits(answer.chosen) <= limit
        assert swapped.cost <= greedy.cost
        assert closed.cost == pytest.approx(best, rel=FLOAT)
        assert closed.bound == pytest.approx(best, rel=FLOAT)


def test_stops_early_only_when_the_gap_asked_for_is_reached():
    of = random_problem(3, 6, 2)
    found = [allocate(of, 5000, gap=gap) for gap in (0.0, 0.5)]
    assert found[0].gap <= FLOAT
    assert all(f.bound <= found[0].cost for f in found)
    assert found[1].gap <= 0.5


def test_few_formats_by_subsets_and_by_integer_program_agree():
    of = random_problem(11, 6, 2)
    counted = np.ones(4, bool)
    rows = np.arange(len(of.units))
    for most, limit in itertools.product((1, 2, 3), (3800, 4600)):
        subsets = formats.allocate(of.costs, of.sizes, limit, counted, most, gap=0.0, seconds=10.0)
        rule = exact.Distinct(rows, counted, most)
        program = exact.search(of.costs, of.sizes, limit, rules=[rule], seconds=10.0)
        assert len(set(subsets.chosen.tolist())) <= most
        assert len(set(program.chosen.tolist())) <= most
        assert subsets.cost == pytest.approx(program.cost, rel=FLOAT)
        assert subsets.bound == pytest.approx(program.bound, rel=1e-6)


def test_too_many_subsets_go_to_the_integer_program():
    rng = np.random.default_rng(0)
    costs = rng.random((400, 30))
    assert formats.countable(costs, np.ones(30, bool), 3)
    assert not formats.countable(costs, np.ones(30, bool), 12)


def test_the_best_of_several_sets_of_constraints():
    of = random_problem(5, 3, 1)
    limit = int(of.sizes[:, 2].sum())
    several = [KINDS["uniform"], KINDS["per_layer"]]
    found = allocate(of, limit, several, gap=0.0)
    apart = [allocate(of, limit, one, gap=0.0) for one in several]
    assert found.cost == min(a.cost for a in apart)
    assert found.bound == min(a.bound for a in apart)
    # One that nothing fits into does not spoil the others.
    barred = dataclasses.replace(KINDS["uniform"], min_bits=99.0)
    assert allocate(of, limit, [barred, several[0]], gap=0.0).cost == apart[0].cost
    with pytest.raises(Infeasible) as error:
        allocate(of, limit, barred)
    assert "layer 0 k head 0" in error.value.why


def test_same_label_ties_codecs_that_differ_by_side():
    # llama.cpp rotates q8_0 keys and values in different blocks: one type, two codecs.
    of = random_problem(2, 2, 1, ALL[:3])
    flipped = tuple(
        row if unit.side == "k" else (row[1], row[0], row[2])
        for unit, row in zip(of.units, of.codecs, strict=True)
    )
    odd = dataclasses.replace(of, codecs=flipped)
    found = allocate(odd, 10**6, Constraints(granularity="per_layer"), gap=0.0)
    plain = allocate(of, 10**6, Constraints(granularity="per_layer"), gap=0.0)
    assert np.array_equal(found.chosen, plain.chosen)


def test_room_beyond_the_best_choice_is_said_not_used():
    of = random_problem(4, 3, 2)
    best = float(of.costs.min(axis=1).sum())
    for constraints in (Constraints(), KINDS["two_formats"]):
        found = allocate(of, 10**9, constraints, gap=0.0)
        assert not found.binding
        assert found.used <= of.sizes.max(axis=1).sum()
    assert allocate(of, 10**9).cost == best
    tight = allocate(of, int(of.sizes.min(axis=1).sum()))
    assert tight.binding
    assert np.array_equal(tight.chosen, of.sizes.argmin(axis=1))


def test_same_input_same_choice_and_order_of_units_does_not_matter():
    of = random_problem(9, 8, 3, forbidden=0.1)
    limit = int(np.median(of.sizes) * len(of.units))
    rng = np.random.default_rng(1)
    for constraints in (Constraints(), KINDS["two_formats"], KINDS["one_per_layer"]):
        first, second = (allocate(of, limit, constraints) for _ in range(2))
        assert np.array_equal(first.chosen, second.chosen)
        assert first == dataclasses.replace(second, chosen=first.chosen)
        order = rng.permutation(len(of.units))
        shuffled = dataclasses.replace(
            of,
            units=tuple(of.units[i] for i in order),
            codecs=tuple(of.codecs[i] for i in order),
            costs=of.costs[order],
            sizes=of.sizes[order],
        )
        found = allocate(shuffled, limit, constraints, gap=0.0)
        assert found.cost == pytest.approx(
            allocate(of, limit, constraints, gap=0.0).cost, rel=FLOAT
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": np.zeros((4, 3))}, r"costs \[4, 3\] must be \[units, candidates\] \[4, 2\]"),
        ({"sizes": np.zeros((3, 2), int)}, r"sizes \[3, 2\]"),
        ({"costs": np.array([[0, np.nan]] * 4)}, "cost of layer 0 k head 0, candidate 'tq3'"),
        ({"costs": np.array([[0, -np.inf]] * 4)}, "must be a number or \\+inf"),
        ({"sizes": np.array([[1, 1], [1, -1], [1, 1], [1, 1]])}, "size of layer 0 v head 0"),
        ({"costs": np.array([[0.0, 1.0]] * 3 + [[np.inf] * 2])}, "layer 3 v head 0 has no cand"),
        ({"units": units(1, 1) * 2}, "appears twice"),
        ({"codecs": ((),) * 4}, "codecs must be 4 rows of 2"),
    ],
)
def test_a_bad_problem_is_refused(change, message):
    good = problem(np.ones((4, 2)), np.ones((4, 2), int), 2, 1)
    with pytest.raises(TurboqError, match=message):
        dataclasses.replace(good, **change)


def _large(seed: int) -> Problem:
    """64 layers x 8 heads x K and V x 10 candidates, heavy-tailed sensitivities."""
    rng = np.random.default_rng(seed)
    places = units(64, 8)
    bits = np.array([1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8])
    spread = np.exp(rng.normal(0, 1.5, (len(places), 1)))
    costs = 1e-4 * spread * 4.0**-bits * np.exp(rng.normal(0, 0.1, (len(places), 10)))
    sizes = np.broadcast_to((bits * 128 + 16).astype(np.int64), costs.shape)
    row = tuple(problem(np.ones((2, 4)), np.ones((2, 4), int), 1, 1).codecs[0][:1]) * 10
    return Problem(
        units=places,
        labels=tuple(f"{b} bits" for b in bits),
        codecs=(row,) * len(places),
        costs=costs,
        sizes=sizes,
    )


@pytest.mark.parametrize(
    ("constraints", "seconds", "gap"),
    [
        (Constraints(), 1.0, 1e-4),  # 0.03 s measured
        (Constraints(max_formats=3), 10.0, 1e-4),  # 0.4 s
        (Constraints(max_head_formats=2), 10.0, 1e-4),  # 0.4 s
        (Constraints(max_formats=3, max_head_formats=2), 10.0, 1e-4),  # 1.4 s
        (Constraints(granularity="per_kv"), 1.0, 1e-4),
    ],
    ids=["free", "three formats", "two per layer", "both", "per_kv"],
)
def test_a_large_model_in_the_time_that_is_promised(constraints, seconds, gap):
    of = _large(0)
    limit = int(3.125 * 128 * len(of.units))
    start = time.perf_counter()
    found = allocate(of, limit, constraints)
    assert time.perf_counter() - start < seconds
    assert found.used <= limit
    assert 0 <= found.gap <= gap


def test_finer_granularity_never_costs_more():
    of = random_problem(7, 6, 3)
    limit = int(of.sizes[:, 1].sum())
    cost = {g: allocate(of, limit, Constraints(granularity=g), gap=0.0).cost
            for g in ("uniform", "per_layer", "per_kv", "per_head")}  # fmt: skip
    assert cost["per_head"] <= cost["per_kv"] <= min(cost["uniform"], cost["per_layer"])
    assert cost["per_head"] < cost["per_kv"]


def test_relative_gap():
    assert solve.relative_gap(2.0, 1.0) == 0.5
    assert solve.relative_gap(-1.0, -2.0) == 1.0
    assert solve.relative_gap(0.0, 0.0) == 0.0
    assert solve.relative_gap(0.0, -1.0) == float("inf")


def test_costs_by_layer_are_sums_over_heads_of_a_side():
    places = units(2, 3)  # of layers 0 and 3
    costs = np.array([[100 * u.layer + 10 * (u.side == "v") + u.head + 1, 0.5] for u in places])
    chosen = np.array([int((u.layer, u.side, u.head) == (3, "v", 2)) for u in places])
    found = problem(costs, np.ones(costs.shape, int), 2, 3).cost_by_layer(chosen)
    assert found == [
        {"layer": 0, "k": 1 + 2 + 3, "v": 11 + 12 + 13},
        {"layer": 3, "k": 301 + 302 + 303, "v": 311 + 312 + 0.5},
    ]
