"""What fits: inverses of one another, the choice by context, the estimate; and refusals."""

import pytest

from turboq.errors import TurboqError
from turboq.what_fits import (
    GIB,
    Budget,
    Formula,
    LayerSize,
    Option,
    Ours,
    by_quality,
    card_table,
    choose,
    decode_estimate,
    formula,
    head_bits,
    weights_bytes,
)
from turboq.what_fits.geometries import geometry

K32 = 32768
LLAMA = geometry("llama-3-8b")


def budget(name: str = "f16", **more) -> Budget:
    return Budget(cache=formula(LLAMA, head_bits(name, name)), **more)


@pytest.mark.parametrize(
    ("name", "gib", "tokens"),
    [("llama-3-8b", 4, K32), ("qwen2.5-32b", 8, K32), ("60x4x128", 15, 131072)],
)
def test_longest_context_of_a_memory(name, gib, tokens):
    plain = Budget(cache=formula(geometry(name), head_bits("f16", "f16")))
    assert plain.max_context(gib * GIB) == tokens
    assert plain.max_context(gib * GIB - 1) == tokens - 1
    assert plain.max_sessions(3 * gib * GIB, tokens) == 3
    assert plain.max_sessions(3 * gib * GIB - 1, tokens) == 2


@pytest.mark.parametrize(
    "made",
    [
        budget("q8_0", weights=4 * GIB, working=GIB // 2, overhead=0.03, state=1000),
        budget("q4_0", sessions=4, prefix=3000),
        Budget(cache=formula(geometry("gemma-3-27b"), head_bits("f16", "q8_0"), page_tokens=16)),
        Budget(cache=Ours(page_bytes=3 << 20, exact_bytes=12345, fixed_bytes=1 << 20), sessions=3),
    ],
)
def test_the_longest_fits_and_one_page_more_does_not(made):
    page = made.cache.page_tokens
    for memory in (6 * GIB, 8 * GIB, 24 * GIB + 1):
        longest = made.max_context(memory)
        assert longest % page == 0
        assert made.needed(longest) <= memory < made.needed(longest + page)
        sessions = made.max_sessions(memory, 5000)
        assert made.needed(5000, sessions) <= memory < made.needed(5000, sessions + 1)


def test_every_part_is_in_what_is_needed():
    made = budget(weights=7, working=11, state=13, overhead=0.5, sessions=2)
    held = 2 * 131072 * 100 + 2 * 13
    assert made.needed(100) == 7 + 11 + held + held // 2


def test_what_never_grows_has_no_limit():
    window = Budget(cache=Formula(layers=(LayerSize(kind="sliding", bits=8, window=10),)))
    assert window.max_context(10) is None
    assert window.max_context(9) == 9


def test_too_small_a_memory():
    assert budget().max_context(1000) == 0
    with pytest.raises(TurboqError, match=r"weights \(4.00 GiB\).*3.00 GiB.*--memory_gib"):
        budget(weights=4 * GIB).max_context(3 * GIB)
    with pytest.raises(TurboqError, match="must be 0 or more"):
        budget().max_sessions(-1, 5)


@pytest.mark.parametrize("bad", [{"sessions": 0}, {"weights": -1}, {"overhead": float("nan")}])
def test_budget_refuses(bad):
    with pytest.raises(ValueError, match="must be"):
        budget(**bad)


def test_cards():
    rows = {row.gib: row for row in card_table(budget(weights=5 * GIB), K32, (4, 8, 16))}
    assert not rows[4].fits
    assert (rows[8].fits, rows[8].max_context, rows[8].sessions) == (True, 3 * 8192, 0)
    assert (rows[16].max_context, rows[16].sessions) == (11 * 8192, 2)


def test_llama_3_8b_q4_k_m_on_8_gb():
    """32k: f16 is too large (4 GiB beside 4.58 GiB of weights), q8_0 is the best that fits."""
    weights = weights_bytes(LLAMA, "Q4_K_M")
    assert weights == pytest.approx(4.92e9, rel=2e-3)  # the file: 4.92 GB
    options = [
        Option(name=n, budget=budget(n, weights=weights, working=GIB // 2))
        for n in ("f16", "q8_0", "q4_0")
    ]
    for context, best in ((16384, "f16"), (K32, "q8_0"), (65536, "q4_0")):
        chosen, verdicts = choose(options, context=context, memory=8 * GIB)
        assert verdicts[chosen].name == best
    chosen, verdicts = choose(options, context=131072, memory=8 * GIB)
    assert chosen == -1
    assert not any(v.fits for v in verdicts)
    spans = [(v.first, v.last) for v in verdicts]
    assert spans[0][0] == 1
    assert [s[0] for s in spans[1:]] == [s[1] + 1 for s in spans[:-1]]
    for (_, last), option in zip(spans, options, strict=True):
        assert option.budget.needed(last) <= 8 * GIB < option.budget.needed(last + 1)


def test_an_option_that_another_beats_everywhere_is_never_the_choice():
    options = [Option(name=n, budget=budget(n)) for n in ("q8_0", "f16", "q4_0")]
    _, verdicts = choose(options, context=K32, memory=8 * GIB)
    assert verdicts[1].fits
    assert (verdicts[1].first, verdicts[1].last) == (None, None)
    assert verdicts[2].first == verdicts[0].last + 1


def test_measured_quality_orders_the_options():
    options = [Option(name=n, budget=budget(n)) for n in ("q4_0", "f16", "q8_0")]
    rows = [{"name": n, "kl_mean": kl} for n, kl in (("f16", 0.0), ("q4_0", 0.05), ("q8_0", 2e-4))]
    ranked = by_quality(options, rows)
    assert [(o.name, o.kl) for o in ranked] == [("f16", 0.0), ("q8_0", 2e-4), ("q4_0", 0.05)]
    with pytest.raises(TurboqError, match=r"no row named 'q4_0'.*rows are f16"):
        by_quality(options, rows[:1])
    with pytest.raises(TurboqError, match="nothing to choose from"):
        choose([], context=1, memory=1)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("llama-3-8b", "Q4_K_N", "unknown weight type 'Q4_K_N' .did you mean"),
        ("60x4x128", "f16", "how many parameters 60x4x128 has is not known"),
        ("llama-3-8b", "auto", "no weight files were seen; name a type"),
    ],
)
def test_weights_that_are_not_known(name, kind, words):
    with pytest.raises(TurboqError, match=words):
        weights_bytes(geometry(name), kind)


def test_roofline_by_hand():
    # 100 GB/s over 5 GB of weights and 2 sessions of 2.5 GB: 10 steps per second of 2 tokens.
    found = decode_estimate(bandwidth=100e9, weights=5 * 10**9, cache_read=25 * 10**8, sessions=2)
    assert found.tokens_per_second == 20
    assert found.step_bytes == 10**10
    # A tenth of the weights per token, 4 sessions: at most four tenths; all of them from 10 on.
    sparse = {"bandwidth": 8e9, "weights": 10**10, "cache_read": 0, "active_share": 0.1}
    assert decode_estimate(**sparse, sessions=4).tokens_per_second == 8
    assert decode_estimate(**sparse, sessions=20).weights_read == 10**10
    half = decode_estimate(bandwidth=100e9, weights=10**9, cache_read=0, efficiency=0.5)
    assert half.tokens_per_second == 50
    assert any("50%" in line for line in half.assumptions)
    assert any("real engines are slower" in line for line in half.assumptions)


@pytest.mark.parametrize(
    "bad", [{"bandwidth": 0.0}, {"efficiency": 1.5}, {"active_share": 0.0}, {"weights": 0}]
)
def test_roofline_refuses(bad):
    with pytest.raises(TurboqError, match=r"must be|nothing is read"):
        decode_estimate(**({"bandwidth": 1e9, "weights": 1, "cache_read": 0} | bad))
