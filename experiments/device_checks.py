"""What runs on a device before anything is timed: every kernel against float64, a prompt as "xla".

The cases and their checkers are those of the tests; level tables are rounded to bfloat16, so that
what is left are errors of rounding queries and probabilities.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (reading, options of the test's case) by what is run.
CASES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "decode": (
        ("turboquant_3", {"dim": 128, "group": 4}),
        ("turboquant_3", {"dim": 128, "page": 64, "paged": True, "lengths": (300, 7, 0, 64)}),
        ("turboquant_2", {"dim": 64, "group": 16, "softcap": 1.5}),
        ("turboquant_4", {"dim": 128, "tokens": 2, "sinks": 2, "window": 100}),
        ("turboquant_4", {"dim": 256, "group": 1, "page": 64}),
        ("static_scale", {"dim": 128}),
        ("prod", {"dim": 128, "bias": True}),
        ("affine", {"dim": 128, "lengths": (700, 257)}),
        ("affine_4", {"dim": 64, "scale_dtype": "float32"}),
        ("segments", {"dim": 128, "lengths": (256, 255)}),
        ("int8", {"dim": 128}),
        ("e4m3", {"dim": 128, "paged": True}),
        ("mixed", {"dim": 128, "tokens": 3, "group": 8}),
    ),
    "history": (
        ("turboquant_3", {"dim": 128, "tokens": 70, "lengths": (700, 7, 0, 257)}),
        ("turboquant_4", {"dim": 128, "page": 64, "paged": True, "window": 150, "sinks": 2}),
        ("turboquant_2", {"dim": 64, "softcap": 1.5, "bias": True, "recent": 9, "padding": 2}),
        ("turboquant_4", {"dim": 256, "group": 8}),
        ("prod", {"dim": 64, "tokens": 100, "group": 1, "page": 64}),
        ("mixed", {"dim": 128, "scale_dtype": "float32"}),
    ),
    "own": (
        ("bfloat16", {"dim": 128, "tokens": 150, "ring": 100, "window": 70}),
        ("bfloat16", {"dim": 256, "softcap": 2.0, "v_dim": 128}),
        ("float32", {"dim": 64, "tokens": 90, "counts": (90, 11), "ring": 9}),
        ("float16", {"dim": 80, "group": 1}),
    ),
    "encode": (
        ("mse_3", {"dim": 128, "tokens": 1, "starts": (0, 1, 255, 256, 257)}),
        ("mse_4", {"dim": 128, "tokens": 300, "starts": (3, 250), "counts": (300, 7)}),
        ("prod_3", {"dim": 128, "page": 64, "paged": True, "tokens": 40, "starts": (0, 63)}),
        ("transform_code", {"dim": 64, "tokens": 17, "dtype": "bfloat16"}),
        ("hadamard_head", {"dim": 256, "tokens": 2}),
    ),
    "columns": (
        ("window", {}),
        ("window", {"gain": "none", "softcap": 1.5}),
        ("window", {"rope": "half", "block": 256, "window": 270}),
        ("window", {"rope": "half", "block": 256, "joined": 3}),
        ("window", {"rope": "partial", "block": 256, "gain": "none", "joined": 1}),
        ("window", {"rope": "half", "joined": 3, "softcap": 1.5, "window": 270}),
        ("window", {"rope": "partial", "block": 64}),
    ),
    "prompt": (("turboquant_mse", {"dim": 128, "tokens": 100}),),
}
TINY: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "decode": (("turboquant_3", {"dim": 16, "heads": 1, "page": 64, "lengths": (70, 7)}),),
    "history": (("turboquant_2", {"dim": 16, "heads": 1, "page": 64, "lengths": (70,)}),),
    "own": (("bfloat16", {"dim": 16, "heads": 1, "tokens": 30, "starts": (5,)}),),
    "encode": (("mse_1", {"dim": 16, "heads": 1, "page": 64, "tokens": 1, "starts": (5,)}),),
    "columns": (),  # large interpreted programs: tests/kernels/test_columns.py runs them
    "prompt": (),
}


def checks(tiny: bool) -> list[tuple[str, str, dict[str, Any], Callable[[], None]]]:
    """(operation, reading, options, check): a check raises where the kernel is wrong.

    `tiny` takes one small case of each in interpret mode.
    """
    return [
        (op, name, options, functools.partial(_CHECKS[op], name, options, tiny))
        for op, several in (TINY if tiny else CASES).items()
        for name, options in several
    ]


def _tests(name: str) -> Any:
    return importlib.import_module(name)  # of tests/, which the caller has on the path


def _decode(name: str, options: dict[str, Any], interpret: bool) -> None:
    case = _tests("prefill_cases").with_bfloat16_tables(
        _tests("kernel_cases").make(name, **options)
    )
    tolerance = "decode_triton" if case.q.shape[2] <= 16 else "decode_bfloat16"
    got = case.run(implementation="triton", interpret=interpret)
    _tests("kernel_cases").check(case, got, tolerance=tolerance)


def _history(name: str, options: dict[str, Any], interpret: bool) -> None:
    cases = _tests("prefill_cases")
    case = cases.with_bfloat16_tables(cases.history(name, **options))
    got = cases.run(case, implementation="triton", interpret=interpret)
    cases.check(case, got, tolerance="decode_bfloat16")


def _own(dtype: str, options: dict[str, Any], interpret: bool) -> None:
    cases = _tests("prefill_cases")
    case = cases.own(dtype=dtype, **options)
    tolerance = "decode_bfloat16" if dtype == "bfloat16" else "own_pairs"
    cases.check(case, case.run(implementation="triton", interpret=interpret), tolerance=tolerance)


def _encode(name: str, options: dict[str, Any], interpret: bool) -> None:
    from turboq_kernels.encode import triton

    cases = _tests("encode_cases")
    case = cases.make_case(name, **options)
    write = jax.jit(triton.write, static_argnames=("writing", "interpret"))
    cases.check(case, *case.run(write, interpret=interpret))


def _columns(name: str, options: dict[str, Any], interpret: bool) -> None:
    rng = np.random.default_rng(0)
    _tests("columns_cases").check(rng, ("triton",), interpret=interpret, **options)


def _prompt(name: str, options: dict[str, Any], interpret: bool) -> None:
    """Two chunks of a prompt: outputs and words of "xla"."""
    from turboq.cache import contiguous as caches
    from turboq.cache.layer import TokenPolicy, uniform_layer
    from turboq.codecs import from_config
    from turboq_kernels import prefill_attention

    tol, dim, tokens = _tests("tolerances").TOL, options["dim"], options["tokens"]
    codec = from_config({"codec": name, "dim": dim, "bits": 3})
    policy = TokenPolicy(sinks=3, recent=20)
    layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=policy)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 2 * tokens, heads, dim)), jnp.float32)
        for heads in (8, 2, 2)
    )
    found = {}
    for implementation in ("triton", "xla"):
        cache = caches.init(layer, batch=2, capacity=256)
        chosen: dict[str, Any] = {"implementation": implementation}
        chosen["interpret"] = interpret and implementation == "triton"
        outs = []
        for part in (slice(0, tokens), slice(tokens, None)):
            chunk = (q[:, part], k[:, part], v[:, part])
            out, cache = prefill_attention(*chunk, layer, cache, scale=dim**-0.5, **chosen)
            outs.append(out)
        found[implementation] = jnp.concatenate(outs, axis=1), cache
    (got, ours), (want, theirs) = found["triton"], found["xla"]
    error = float(jnp.max(jnp.abs(got - want)))
    assert error <= tol["decode_bfloat16"], f"outputs differ by {error}"
    for side in ("k", "v"):
        a, b = (np.asarray(getattr(c.groups[0], side)["codes"]) for c in (ours, theirs))
        differ = int(np.sum(a != b))
        assert differ <= tol["unclear_words"] * k.size / 1e4, f"{differ} words of {side} differ"


_CHECKS = {
    "decode": _decode,
    "history": _history,
    "own": _own,
    "encode": _encode,
    "columns": _columns,
    "prompt": _prompt,
}
