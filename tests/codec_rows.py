"""The codecs that the shared tests run over: adding a codec is one row of `ROWS`.

Each cell (row, dim) runs once, under one jit that vmaps two heads with different arrays; tests then
look at different properties of what came out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special
from tolerances import TOL

from turboq import codebook
from turboq.codecs import (
    Codec,
    Exact,
    PerHead,
    TurboQuantMSE,
    TurboQuantProd,
)

HEADS, TOKENS, QUERIES = 2, 1024, 3


@dataclasses.dataclass(frozen=True)
class Row:
    """A codec, the closed form of its relative error (None: no form), and traits of its edges."""

    make: Callable[[int], Codec]
    error: Callable[[int], float] | None = None
    spread: float = 0.0  # relative deviation of one fixed sketch from its mean, times dim
    zero_exact: bool = True


def lloyd(bits, dim, source="sphere"):
    return codebook.distortion("sphere", codebook.lloyd_max(source, bits, dim), dim)


def prod_error(kind, d_b, dim):
    """E|r - a gamma S^T z|^2 = D_{b-1} (a^2 E|S^T z|^2 - 1), both kinds exactly.

    gaussian: E|S^T z|^2 = D^2 + D(D-1) 2/pi; orthogonal: |S^T z|^2 = D with a = 1/(D E|X|).
    """
    if kind == "gaussian":
        return d_b * (np.pi / 2 - 1 / dim)
    mean = np.exp(special.gammaln(dim / 2) - special.gammaln((dim + 1) / 2))
    return d_b * (np.pi * dim / (dim * mean) ** 2 - 1)


ROWS = {
    "exact-f32": Row(lambda d: Exact(dim=d, dtype="float32"), lambda d: 0.0),
    "exact-bf16": Row(lambda d: Exact(dim=d, dtype="bfloat16")),
    "exact-f16": Row(lambda d: Exact(dim=d, dtype="float16")),
    "mse-1": Row(lambda d: TurboQuantMSE(dim=d, bits=1), lambda d: lloyd(1, d)),
    "mse-3": Row(lambda d: TurboQuantMSE(dim=d, bits=3), lambda d: lloyd(3, d)),
    "mse-2-haar-gaussian": Row(
        lambda d: TurboQuantMSE(dim=d, bits=2, rotation="haar", seed=9, codebook="gaussian"),
        lambda d: lloyd(2, d, "gaussian"),
    ),
    "mse-8-identity": Row(
        lambda d: TurboQuantMSE(dim=d, bits=8, rotation="identity", scale_dtype="float32"),
        lambda d: lloyd(8, d),
    ),
    "mse-4-unbiased": Row(lambda d: TurboQuantMSE(dim=d, bits=4, scale_rule="unbiased")),
    "mse-2-matched": Row(lambda d: TurboQuantMSE(dim=d, bits=2, scale_rule="matched")),
    "mse-3-least": Row(
        lambda d: TurboQuantMSE(
            dim=d, bits=3, scale_rule="least_squares", scale_dtype="bfloat16", seed=4
        )
    ),
    "prod-3": Row(
        lambda d: TurboQuantProd(dim=d, bits=3),
        lambda d: prod_error("gaussian", lloyd(2, d), d),
        spread=TOL["sketch_spread_times_dim"],
    ),
    "prod-4-orthogonal": Row(
        lambda d: TurboQuantProd(dim=d, bits=4, sketch="orthogonal", scale_dtype="float32"),
        lambda d: prod_error("orthogonal", lloyd(3, d), d),
    ),
    "prod-1-orthogonal": Row(
        lambda d: TurboQuantProd(dim=d, bits=1, sketch="orthogonal"),
        lambda d: prod_error("orthogonal", 1.0, d),
    ),
    "per_head-3": Row(lambda d: PerHead(dim=d, bits=3, seed=2), lambda d: lloyd(3, d)),
    "per_head-2-head": Row(
        lambda d: PerHead(dim=d, bits=2, scale="head"),
        lambda d: codebook.distortion("gaussian", codebook.lloyd_max("gaussian", 2)),
        zero_exact=False,
    ),
    "per_head-4-unbiased-f32": Row(
        lambda d: PerHead(dim=d, bits=4, scale_rule="unbiased", scale_dtype="float32")
    ),
}


def arrays_of(codec: Codec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays of HEADS heads: a large mean, the source's own codebook, different scales."""
    source = "gaussian" if getattr(codec, "scale", "") == "head" else "sphere"
    made = {
        "mean": lambda: rng.normal(size=(HEADS, codec.dim)) * 20,
        "codebook": lambda: np.stack(
            [codebook.lloyd_max(source, codec.config()["bits"], codec.dim)] * HEADS
        ),
        "scale": lambda: np.array([0.25, 3.0]),
    }
    return {name: made[name]().astype(np.float32) for name in codec.array_shapes}


def run(codec: Codec, arrays: Any, x: Any, q: Any, weights: Any) -> dict[str, Any]:
    """Everything a codec does, for one head."""
    stored = codec.encode(arrays, x)
    folded = codec.fold_query(arrays, q)
    acc = codec.accumulate(arrays, weights, stored)
    return {
        "stored": stored,
        "decoded": codec.decode(arrays, stored),
        "logits": codec.logits(arrays, folded, stored),
        "output": codec.unfold_output(arrays, acc, jnp.sum(weights, axis=-1)),
    }


@functools.cache
def cell(row: str, dim: int) -> dict[str, Any]:
    """Inputs and outputs of one cell as NumPy arrays with a leading head axis."""
    codec, rng = ROWS[row].make(dim), np.random.default_rng(dim)
    arrays = arrays_of(codec, rng)
    x = rng.normal(size=(HEADS, TOKENS, dim)) * np.array([0.25, 3.0])[:, None, None]
    x = (x + (arrays["mean"][:, None] if "mean" in arrays else 0)).astype(np.float32)
    q = rng.normal(size=(HEADS, QUERIES, dim)).astype(np.float32)
    weights = rng.dirichlet(np.ones(TOKENS), size=(HEADS, QUERIES)) * 0.75
    weights = weights.astype(np.float32)
    inputs = jax.tree.map(jnp.asarray, (arrays, x, q, weights))
    out = jax.jit(jax.vmap(functools.partial(run, codec)))(*inputs)
    out = jax.tree.map(np.asarray, out)
    return out | {"codec": codec, "arrays": arrays, "x": x, "q": q, "weights": weights}


def variable(c: dict[str, Any]) -> np.ndarray:
    """x without the head's mean, float64: what is quantized."""
    x = c["x"].astype(np.float64)
    return x - c["arrays"]["mean"][:, None] if "mean" in c["arrays"] else x
