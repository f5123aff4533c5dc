"""Prefill: who computes what, "xla" against float64, and a whole prompt on interpreted kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prefill_cases as cases
import pytest
from tolerances import TOL

from turboq.cache import contiguous as kv_cache
from turboq.cache import paged as paged_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import IntAffine, TurboQuantMSE
from turboq.numbers.packing import PAGE
from turboq_kernels import prefill_attention
from turboq_kernels.attention import base
from turboq_kernels.prefill import kernels

# A program is run once or twice: it compiles faster without optimization.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS, GROUP = 24, 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prod", {"window": 90, "sinks": 2, "recent": 3, "padding": 2, "lengths": (257, 0)}),
        ("affine", {"page": 64, "paged": True, "bias": True, "softcap": 2.0}),
    ],
)
def test_xla_history_matches_float64(name, options):
    case = cases.history(name, dim=16, **options)
    cases.check(case, cases.run(case, implementation="xla"), tolerance="decode_stored")


@pytest.mark.parametrize(
    "options",
    [
        {"ring": 9, "starts": (3, 700), "counts": (40, 0), "window": 7, "v_dim": 8},
        {"softcap": 2.0, "dtype": "bfloat16"},
    ],
)
def test_xla_own_matches_float64(options):
    case = cases.own(dim=16, **options)
    cases.check(case, case.run(), tolerance="decode_stored")


@pytest.mark.parametrize("bad", ["lower", "upper", "positions"])
def test_the_checker_sees_one_entry_more_or_less(bad):
    case = cases.own(dim=16, window=5, starts=(9,), ring=5)
    wrong = case.replace(**{bad: getattr(case, bad) + 1})
    wrong = wrong.replace(k=jnp.nan_to_num(wrong.k), v=jnp.nan_to_num(wrong.v))
    with pytest.raises(AssertionError):
        cases.check(case, wrong.run(), tolerance="decode_stored")


def chosen(case, implementation):
    return kernels.choose(case.q, case.k, case.v, case.pages, implementation)


def test_named_kernels_never_fall_back():
    case = cases.history("turboquant_3", dim=24, lengths=(3,), heads=1, tokens=1)
    own = cases.own(tokens=2, dim=16)
    for call in (functools.partial(cases.run, case), own.run):
        with pytest.raises(ValueError, match="implementation='cuda'"):
            call(implementation="cuda")
        with pytest.raises(ValueError, match="interpret=True needs a named implementation"):
            call(interpret=True)
    with pytest.raises(ValueError, match="'triton' cannot run this case: 24 coordinates"):
        cases.run(case, implementation="triton")
    with pytest.raises(ValueError, match="the keys 24"):
        cases.run(case.replace(q=case.q[..., :8]))
    assert chosen(case, None) == "xla"


def test_kernels_of_a_platform(monkeypatch):
    """None takes the platform's kernel where it supports the case, else "xla"."""
    fine, odd = (cases.history("turboquant_3", dim=d, lengths=(3,), tokens=1) for d in (64, 24))
    for platform, names in {"tpu": ("mosaic_tpu", "mosaic_tpu"), "gpu": ("triton", "xla")}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        got = tuple(chosen(case, None) for case in (fine, odd))
        assert got == names
    monkeypatch.setitem(kernels._MODULES, "triton", "turboq_kernels.prefill.missing")
    for name in (None, "triton"):  # a JAX without the backend: not "xla" without a word
        with pytest.raises(ImportError, match="missing"):
            chosen(fine, name)


@pytest.mark.parametrize("name", ["mosaic_tpu", "triton"])
def test_a_named_kernel_encodes_too(rng, name):
    """A codec that kernels read but do not write is refused, not encoded by "xla"."""
    _, q, k, v = make(rng)
    codec = IntAffine(dim=64, bits=3)
    layer = uniform_layer(kv_heads=1, k=codec, v=codec, policy=TokenPolicy())
    cache = kv_cache.init(layer, batch=2, capacity=PAGE)
    with pytest.raises(ValueError, match="cannot encode this case"):
        prefill_attention(q, k, v, layer, cache, scale=0.2, implementation=name, interpret=True)


def make(rng):
    layer = uniform_layer(
        kv_heads=1, k=TurboQuantMSE(dim=64, bits=3), v=TurboQuantMSE(dim=64, bits=2),
        policy=TokenPolicy(sinks=3, recent=5),
    )  # fmt: skip
    k, v = rng.standard_normal((2, 2, 2 * TOKENS, 1, 64)).astype(np.float32)
    q = rng.standard_normal((2, 2 * TOKENS, GROUP, 64)).astype(np.float32)
    return layer, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def two_chunks(layer, q, k, v, paged: bool, begin=None, **options):
    """A prompt in two chunks: outputs of real tokens, and the caches before and after each chunk.

    The second sequence's last tokens of each chunk are padding. `begin` are caches to begin the
    chunks from, instead of each other's.
    """
    run = jax.jit(functools.partial(prefill_attention, scale=0.2, **options), compiler_options=FAST)
    pool = Pool([layer], pages=4, rows=2, per_sequence=2, page=64)
    names = [pool.pager.create(), pool.pager.create()]
    empty = pool.caches[0] if paged else kv_cache.init(layer, batch=2, capacity=PAGE)
    counts, outs, caches = [TOKENS, TOKENS - 5], [], [empty]
    for chunk in range(2):
        part = slice(chunk * TOKENS, (chunk + 1) * TOKENS)
        if paged:
            told = {"where": paged_cache.locate(pool.pager.plan(names, counts))}
        else:
            told = {"counts": jnp.asarray(counts, jnp.int32)}
        cache = (begin or caches)[chunk]
        out, cache = run(q[:, part], k[:, part], v[:, part], layer, cache, **told)
        outs += [out[0], out[1, : counts[1]]]
        caches.append(cache)
    return outs, caches


@pytest.mark.parametrize(("name", "paged"), [("mosaic_tpu", False), ("triton", True)])
def test_a_prompt_on_kernels(rng, name, paged):
    """History, own tokens and encoding, each by the kernel: outputs and words of "xla"."""
    inputs = make(rng)
    assert TOKENS * GROUP > base.KERNEL_ROWS
    want, plain = two_chunks(*inputs, paged, implementation="xla")
    # From the same caches: a code that rounding decides would show in all later outputs.
    got, caches = two_chunks(*inputs, paged, plain, implementation=name, interpret=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOL["prompt_bfloat16"])
        assert np.any(np.asarray(a) != np.asarray(b))  # another kernel did run
    for ours, theirs in zip(caches[1:], plain[1:], strict=True):
        for side in ("k", "v"):
            a, b = (np.asarray(getattr(c.groups[0], side)["codes"]) for c in (ours, theirs))
            assert np.sum(a != b) <= TOL["unclear_words"]
            assert np.any(b)
