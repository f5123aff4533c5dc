"""Budgets: the grammar, what is refused, and memory at a context against the plan's own count."""

from __future__ import annotations

import dataclasses
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
from allocate_cases import KINDS, random_problem
from plan_cases import geometry, random_fit
from unchecked import unchecked

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, Ggml, PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan.constraints import Constraints, match
from turboq_calibrate.candidates.makers import named
from turboq_calibrate.candidates.table import Maker, Option, build_table
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.solver.problem import Problem
from turboq_calibrate.choose.within import record, report, within

POLICY = TokenPolicy(sinks=4, recent=16)


@pytest.mark.parametrize(
    ("text", "nbytes", "bpc", "context", "batch"),
    [
        ("4680B", 4680, None, None, 1),
        ("4680 B/token", 4680, None, None, 1),
        ("4.5KiB", 4608, None, None, 1),
        ("4.5kB", 4500, None, None, 1),
        ("3.25bpc", None, Fraction(13, 4), None, 1),
        ("0.1 bpc", None, Fraction(1, 10), None, 1),
        ("131072@4GiB", 4 * 2**30, None, 131072, 1),
        ("131072x8@40GB", 40 * 10**9, None, 131072, 8),
        ("context 131072 in 4GiB", 4 * 2**30, None, 131072, 1),
        ("1000@512mib", 512 * 2**20, None, 1000, 1),
    ],
)
def test_grammar(text, nbytes, bpc, context, batch):
    found = Budget.parse(text)
    assert (found.nbytes, found.bpc) == (nbytes, bpc)
    assert (found.context, found.batch) == (context, batch)
    assert Budget.parse(found.text) == found


@pytest.mark.parametrize(
    "text",
    ["", "3.25", "bpc", "-3bpc", "3bpc@4GiB", "128k@4GiB", "1e3B", "4iB", "4680B per token",
     "131072@", "131072@4", "0bpc", "0B", "0@4GiB", "5x0@4GiB"],
)  # fmt: skip
def test_what_is_no_budget(text):
    with pytest.raises(TurboqError, match="budget"):
        Budget.parse(text)


def test_bits_of_a_token_are_never_rounded_up():
    assert Budget.parse("3.1bpc").bits(64) == 198  # 198.4
    assert Budget.parse("10.06B").bits(64) == 80  # 80.48
    with pytest.raises(ValueError, match="not per token"):
        Budget.parse("9@1MiB").bits(64)


def test_default_candidates_lie_around_the_bits_of_a_context():
    assert Budget.parse("3.1bpc").bits_near({None: 64}) == 198
    # Whole pages: 257 tokens take the room of 512, in each of three sequences.
    assert Budget.parse("257@512B").bits_near({None: 64}) == 8
    assert Budget.parse("257x3@3072B").bits_near({None: 64}) == 16


@pytest.mark.parametrize("kind", ["none", "uniform", "two_formats", "one_per_layer", "skip_list"])
def test_a_refusal_names_a_budget_that_is_just_enough(kind):
    of = random_problem(3, 2, 2)
    of = dataclasses.replace(of, sizes=of.sizes * 100_003)  # no digit may be dropped
    for text in ("1bpc", "3B"):
        with pytest.raises(TurboqError, match="the smallest feasible budget is") as error:
            within(of, Budget.parse(text), KINDS[kind])
        found = re.search(r"budget is ([\d.]+)B per token \(([\d.]+) bits", str(error.value))
        assert found is not None
        least = float(found[1])
        assert least > 10**6
        assert within(of, Budget.parse(f"{found[1]}B"), KINDS[kind]).used == 8 * least
        assert within(of, Budget.parse(f"{found[2]}bpc"), KINDS[kind]).used == 8 * least
        with pytest.raises(TurboqError, match="smallest"):
            within(of, Budget.parse(f"{least - 0.125:.3f}B"), KINDS[kind])


def test_constraints_that_nothing_obeys_are_no_matter_of_budget():
    of = random_problem(3, 2, 1, ("q4", "fp8"))
    for budget in ("99bpc", "1000@1GiB"):
        with pytest.raises(TurboqError, match=r"no budget helps: .* layer 0 v head 0"):
            within(of, Budget.parse(budget), Constraints(v=(match("exact"),)))


def test_a_budget_above_everything_is_said():
    of = random_problem(3, 2, 2)
    budget = Budget.parse("99bpc")
    found = within(of, budget)
    assert found.cost == of.costs.min(axis=1).sum()
    assert "a larger one gains nothing" in report(of, found, budget)
    tight = Budget.parse("5bpc")
    assert "gains nothing" not in report(of, within(of, tight), tight)


def test_report_and_record():
    of = random_problem(1, 2, 1)
    budget = Budget.parse("8bpc")
    found = within(of, budget, KINDS["per_kv"], gap=0.0)
    text = report(of, found, budget)
    assert f"{of.bits(found.chosen) // 8} B per token" in text
    assert f"lower bound     {found.bound:.6g} (gap {100 * found.gap:.2g} %)" in text
    kept = record(found, budget)
    assert kept["used"] == found.used <= kept["limit"] == 8 * of.channels
    assert kept["constraints"] == KINDS["per_kv"].config()


@pytest.fixture(scope="module")
def table():
    """Candidates that differ in everything a context counts: codes, scales, arrays, tables."""
    layout = geometry(layers=2, kv_heads=1, k_dim=16, v_dim=16)
    fit = random_fit(layout)

    def learned(layer, side, samples):
        codec = PerHead(dim=16, bits=4)
        return Option.shared(codec, layer.kv_heads, lambda: fit(layer.index, side, codec))

    makers = [
        named("haar 2", TurboQuantMSE(dim=16, bits=2, rotation="haar")),
        named("haar 3", TurboQuantMSE(dim=16, bits=3, rotation="haar", seed=1)),
        Maker("learned 4", learned),
        named("exact", Exact(dim=16)),
    ]
    return layout, build_table(layout, makers)


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (300, 1), (256, 3)])
def test_memory_at_a_context_is_what_the_plan_will_take(table, context, batch, rng):
    layout, made = table
    costs = np.sort(rng.random((4, 4)), axis=1)[:, ::-1].copy()
    of = Problem.of(made, costs)
    every = [np.array(c) for c in itertools.product(range(4), repeat=4)]
    taken = []
    with unchecked():
        for chosen in every:
            plan, _ = made.to_plan(layout, chosen, policy=POLICY)
            taken.append(plan.residency(context, batch).total)
    low, high = min(taken), max(taken)
    met = 0
    for nbytes in np.linspace(low, high, 9).astype(int):
        budget = Budget.parse(f"{context}x{batch}@{nbytes}B")
        found = within(of, budget, policy=POLICY, gap=0.0)
        best = min(of.cost(c) for c, size in zip(every, taken, strict=True) if size <= nbytes)
        plan, _ = made.to_plan(layout, found.chosen, policy=POLICY)
        assert plan.residency(context, batch).total == found.used <= nbytes
        assert found.bound <= best + 1e-12 <= found.cost + 2e-12
        met += found.cost == pytest.approx(best)
    assert met >= 6  # tables are shared, so that what they leave is not searched exhaustively
    with pytest.raises(TurboqError, match=rf"smallest feasible budget is {low}B \("):
        within(of, Budget.parse(f"{context}x{batch}@{low - 1}B"), policy=POLICY)


SLIDING: dict[int, int] = {1: 300, 2: 2}  # layer -> window; layer 0 keeps all tokens
PAGES = {1: 3, 2: 2}  # ceil((W - 1) / 256) + 1


@pytest.fixture(scope="module")
def sliding():
    """Candidates without arrays or tables, of a model whose layers 1 and 2 slide."""
    plain = geometry(layers=3, kv_heads=1, k_dim=32, v_dim=32)
    layers = tuple(dataclasses.replace(x, window=SLIDING.get(x.index)) for x in plain.layers)
    layout = dataclasses.replace(plain, layers=layers)
    formats = [Ggml(dim=32, type="q4_0"), Ggml(dim=32, type="q8_0"), Exact(dim=32)]
    return layout, build_table(layout, [named(str(i), codec) for i, codec in enumerate(formats)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("context", "batch"), [(4096, 1), (700, 3)])
def test_windows_take_their_part_of_a_context(sliding, context, batch, seed):
    """The best of all choices, with bytes counted by hand: 4.5, 8.5 and 16 bits of 32 channels."""
    layout, made = sliding
    rng = np.random.default_rng(seed)
    of = Problem.of(made, rng.uniform(0.5, 1.5, (6, 1)) * 0.3 ** np.arange(3) + rng.random((6, 3)))
    pages = -(-context // 256)
    tokens = [256 * batch * min(pages, PAGES.get(unit.layer, 99)) for unit in of.units]
    each = np.outer(tokens, [18, 34, 64])  # bytes of a block of 32 numbers
    every = np.array(list(itertools.product(range(3), repeat=6)))
    taken = each[np.arange(6), every].sum(1)
    costs = of.costs[np.arange(6), every].sum(1)
    without = dataclasses.replace(of, windows=(None,) * 6)
    better = 0
    for nbytes in np.linspace(taken.min(), taken.max() - 1, 9).astype(int):
        budget = Budget.parse(f"{context}x{batch}@{nbytes}B")
        found = within(of, budget, gap=0.0)
        best = costs[taken <= nbytes].min()
        assert found.cost == pytest.approx(best, abs=1e-12)
        assert found.used == each[np.arange(6), found.chosen].sum() <= nbytes
        plan, _ = made.to_plan(layout, found.chosen)
        assert plan.residency(context, batch).total == found.used
        try:
            better += best < within(without, budget, gap=0.0).cost - 1e-9
        except TurboqError:  # nothing fits that keeps all tokens everywhere
            better += 1
    assert better >= 3


def test_exact_tokens_of_the_policy_take_their_part(table, rng):
    _, made = table
    of = Problem.of(made, rng.random((4, 4)))
    budget = Budget.parse("256@100kB")
    plain = within(of, budget, policy=TokenPolicy())
    more = within(of, budget, policy=TokenPolicy(recent=64, exact_dtype="float32"))
    assert more.used - plain.used == 64 * 4 * 64  # tokens, float32, channels of the model
