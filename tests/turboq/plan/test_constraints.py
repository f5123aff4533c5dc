"""Constraints: what they say, what they refuse, JSON, and finding where a plan breaks them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from plan_cases import geometry, hybrid

from turboq.codecs import FP8, Codec, Exact, Ggml, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import head_plan, uniform_plan
from turboq.plan.constraints import (
    Boundary,
    Constraints,
    FirstLast,
    Match,
    Scheme,
    format_of,
    from_config,
    match,
)
from turboq.plan.rules import boundary, resolve, sides, skip_layers
from turboq.plan.violations import violations, violations_of

DIM = 32
Q8, Q4 = Ggml(dim=DIM, type="q8_0"), Ggml(dim=DIM, type="q4_0")
EXACT, FLOAT8 = Exact(dim=DIM), FP8(dim=DIM)
TQ3, TQ4 = TurboQuantMSE(dim=DIM, bits=3), TurboQuantMSE(dim=DIM, bits=4)

Q8_OR_Q4 = match("ggml", type=("q8_0", "q4_0"))
FP8_SCHEME = Scheme(name="fp8", k=(match("fp8"),), v=(match("fp8"),))
Q4_SCHEME = Scheme(name="q4", k=(match("ggml", type="q4_0"),), v=(match("ggml", type="q4_0"),))
AUTO = Scheme(name="auto", k=(match("exact"),), v=(match("exact"),))


def plan_of(choose, layers: int = 6, heads: int = 2):
    layout = geometry(layers=layers, kv_heads=heads, k_dim=DIM, v_dim=DIM)
    return head_plan(layout, resolve(layout, choose(layout) if callable(choose) else choose))


def rows(k: list[Codec], v: list[Codec] | None = None) -> dict:
    """One head per layer."""
    v = k if v is None else v
    return {(i, s, 0): c for s, row in (("k", k), ("v", v)) for i, c in enumerate(row)}


def test_match_is_exact_in_value_and_type():
    assert match("turboquant_mse", bits=(2, 3))(TQ3)
    assert not match("turboquant_mse", bits=(2, 3))(TQ4)
    assert not match("turboquant_mse", bits=3)(Q4)
    assert not match("turboquant_mse", bits=True)(TurboQuantMSE(dim=DIM, bits=1))
    assert match("ggml", type=("q8_0",), rotation="identity")(Q8)
    assert match("ggml") == Match(codec="ggml", fields={})


def test_format_is_all_but_the_head_dim():
    assert format_of(TQ3) == format_of(TurboQuantMSE(dim=64, bits=3))
    assert format_of(TQ3) != format_of(TQ4)
    assert dict(format_of(Q8))["codec"] == "ggml"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: match("q8_0"), "codec='q8_0' must be one of"),
        (lambda: match("ggml", kind="q8_0"), "no field 'kind'"),
        (lambda: match("ggml", type=()), "type=\\(\\) must list"),
        (lambda: Match(codec="ggml", fields={"type": "q8_0"}), "must list the values"),
        (lambda: Scheme(name="x", k=(), v=(Q8_OR_Q4,)), "needs a name and codecs"),
        (lambda: Boundary(first=0, last=0, k=(Q8_OR_Q4,)), "must name some layers"),
        (lambda: Boundary(first=1, last=1), "codecs of k or of v"),
        (lambda: FirstLast(first=-1), "first=-1 must be 0 or more"),
        (lambda: Constraints(max_formats=0), "max_formats=0 must be at least 1"),
        (lambda: Constraints(min_bits=-1.0), "min_bits=-1.0"),
        (lambda: Constraints(schemes=(AUTO, AUTO)), "names of their own"),
        (lambda: Constraints(uncounted=("exact",)), "needs max_formats"),
        (lambda: Constraints(max_formats=1, uncounted=("auto",)), "'auto' is none of"),
        (
            lambda: Constraints(max_formats=1, uncounted=("exact",), schemes=(AUTO,)),
            "'exact' is none of",
        ),
        (
            lambda: Constraints(granularity="per_kv", max_head_formats=2),
            "max_head_formats needs per_head",
        ),
        (lambda: Constraints(first_last=FirstLast()), "needs per_layer or per_kv"),
        (
            lambda: Constraints(granularity="per_kv", first_last=FirstLast(), max_formats=3),
            "cannot be combined",
        ),
    ],
)
def test_contradictions_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_json_round_trip():
    full = Constraints(
        granularity="per_layer",
        k=(Q8_OR_Q4, match("exact")),
        v=(match("turboquant_mse", bits=(2, 3)),),
        schemes=(FP8_SCHEME, AUTO),
        same_k_v=True,
        min_bits=3.0,
        boundary=Boundary(first=2, last=1, k=(match("exact"),)),
        max_formats=1,
        uncounted=("auto",),
    )
    for one in (
        full,
        Constraints(),
        Constraints(granularity="per_kv", first_last=FirstLast(last=2, outer=(Q8_OR_Q4,))),
        Constraints(max_head_formats=3),
        Constraints(k_rope=("before",)),
    ):
        assert from_config(json.loads(json.dumps(one.config()))) == one
    bad = full.config()
    bad["schemes"][1]["k"][0]["codec"] = "nothing"
    with pytest.raises(TurboqError, match=r"schemes\[1\]\.k\[0\]\.codec"):
        from_config(bad)
    with pytest.raises(TurboqError, match="granularity"):
        from_config(full.config() | {"granularity": "per_token"})


# What engines load (vLLM, llama.cpp, ik_llama.cpp, ModelOpt, mlx-lm), as plans that do and do not.
VLLM = Constraints(
    granularity="per_layer", schemes=(FP8_SCHEME, Q4_SCHEME, AUTO), max_formats=1,
    uncounted=("auto",),
)  # fmt: skip
PRESETS = dataclasses.replace(
    VLLM, boundary=Boundary(first=2, last=2, k=(match("exact"),), v=(match("exact"),))
)
MAINLINE = Constraints(granularity="uniform", k=(Q8_OR_Q4,), v=(Q8_OR_Q4,))
IK = Constraints(granularity="per_kv", first_last=FirstLast(), k=(Q8_OR_Q4,), v=(Q8_OR_Q4,))
MODELOPT = Constraints(
    granularity="per_layer",
    schemes=(FP8_SCHEME, AUTO, Scheme(name="mix", k=(match("fp8"),), v=Q4_SCHEME.v)),
)
SAME_BITS = Constraints(granularity="per_layer", k=(match("turboquant_mse", bits=(2, 3, 4)),))


def _skip(codec, names):
    return lambda layout: skip_layers(layout, codec, names)


@pytest.mark.parametrize(
    ("constraints", "good", "bad", "says"),
    [
        (VLLM, _skip(Q4, [0, 3]), sides(k=FLOAT8, v=Q4), "none of fp8, q4, auto"),
        (VLLM, FLOAT8, lambda g: boundary(g, Q4, FLOAT8), "2 formats, at most 1"),
        (PRESETS, lambda g: boundary(g, Q4, EXACT), _skip(Q4, [0, 1, 4]), "layer 5 k head 0"),
        (MAINLINE, sides(k=Q8, v=Q4), lambda g: boundary(g, Q4, Q8), "all layers must have one"),
        (MAINLINE, Q4, TQ3, "is not allowed"),
        (
            IK,
            lambda g: sides(k=boundary(g, Q4, Q8, first=3, last=1), v=boundary(g, Q8, Q4)),
            lambda g: sides(k=Q4, v=lambda i, s, h: Q8 if i % 2 else Q4),
            "one format for the first n",
        ),
        (MODELOPT, sides(k=FLOAT8, v=Q4), sides(k=Q4, v=FLOAT8), "none of fp8, auto, mix"),
        (SAME_BITS, TQ3, sides(k=TQ3, v=TQ4), "not the same format"),
        (SAME_BITS, lambda g: boundary(g, TQ3, TQ4), lambda i, s, h: TQ4 if h else TQ3,
         "all heads of layer 0"),
        (
            Constraints(max_head_formats=1),
            lambda i, s, h: TQ3 if i % 2 else TQ4,
            lambda i, s, h: TQ3 if h else TQ4,
            "layer 0 k: 2 formats, at most 1",
        ),
        (Constraints(min_bits=4.0), Q4, TQ3, "is not allowed"),
        (
            Constraints(max_formats=1, uncounted=("exact",)),
            sides(k=TQ3, v=EXACT),
            sides(k=TQ3, v=TQ4),
            "2 formats",
        ),
    ],
)  # fmt: skip
def test_engine_shapes(constraints, good, bad, says):
    def made(choose):
        takes_geometry = callable(choose) and choose.__code__.co_argcount == 1
        return plan_of(choose if takes_geometry else lambda _: choose)

    assert violations(constraints, made(good)) == []
    found = violations(constraints, made(bad))
    assert any(says in line for line in found), found


@pytest.mark.parametrize(
    ("rule", "row", "fits"),
    [
        (FirstLast(), "aabbc", True),
        (FirstLast(), "aaaaa", True),
        (FirstLast(), "abcba", False),
        (FirstLast(), "abab", False),
        (FirstLast(same_ends=True), "aabba", True),
        (FirstLast(same_ends=True), "aabbc", False),
        (FirstLast(same_ends=True), "aabb", True),  # no last layers
        (FirstLast(first=1), "abbcc", True),
        (FirstLast(first=2), "abbcc", False),
        (FirstLast(first=2, last=2), "abbbc", False),
        (FirstLast(first=0, last=0), "aabb", False),
        (FirstLast(first=3, last=3), "aaaaa", False),  # more than there are
        (FirstLast(outer=(match("ggml", type="q8_0"),)), "abbb", True),
        (FirstLast(outer=(match("ggml", type="q8_0"),)), "abbc", False),
    ],
)
def test_first_and_last(rule, row, fits):
    palette = {"a": Q8, "b": Q4, "c": TQ3}
    constraints = Constraints(granularity="per_kv", first_last=rule)
    plain = [Q4] * len(row) if not (rule.first or rule.last) else [palette[c] for c in row]
    found = violations_of(constraints, rows([palette[c] for c in row], plain))
    assert (not found) is fits


def test_keys_before_rope_are_allowed_by_name_only():
    plan = uniform_plan(hybrid(), k=TQ3, v=TQ3, k_rope="before")
    says = ["layer 0 k: stored before RoPE is not allowed"]
    assert violations(Constraints(), plan)[:1] == says
    assert violations(Constraints(k_rope=("after", "before")), plan) == []
    with pytest.raises(ValueError, match="k_rope="):
        Constraints(k_rope=())
    with pytest.raises(TurboqError, match=r"k_rope\[0\]"):
        from_config(Constraints().config() | {"k_rope": ["never"]})


def test_together_shares_the_numbers_of_layers():
    k, v = [Q8, Q4, Q4, Q4], [TQ3, TQ3, TQ4, TQ4]
    apart = Constraints(granularity="per_kv", first_last=FirstLast(last=0))
    assert not violations_of(apart, rows(k, v))
    together = dataclasses.replace(apart, first_last=FirstLast(last=0, together=True))
    assert violations_of(together, rows(k, v))
    assert not violations_of(together, rows(k, [TQ3, TQ4, TQ4, TQ4]))
