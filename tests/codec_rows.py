"""The codecs that the shared tests run over: adding a codec is one row of `ROWS`.

Each cell (row, dim) runs once, under one jit that vmaps two heads with different arrays; tests then
look at different properties of what came out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optimised import optimised
from scipy import special
from tolerances import TOL

from turboq.codecs import (
    E8,
    FP8,
    NUQ,
    NVFP4,
    QJL,
    TCQ,
    Codec,
    Exact,
    Ggml,
    HadamardPerHead,
    Int4TokenHead,
    Int8TokenHead,
    IntAffine,
    KiviKey,
    KiviValue,
    KVarN,
    Oscar,
    PerChannel,
    PerHead,
    PolarQuant,
    RopeBlock,
    Transform,
    TurboQuantMSE,
    TurboQuantOutliers,
    TurboQuantProd,
    VLLMTurboQuantKey,
    VLLMTurboQuantValue,
)
from turboq.codecs.observed import Observed
from turboq.numbers import codebook

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


def split_error(dim):
    """Outliers at 3 bits and the rest at 2, channels iid: the mean, weighted by channels."""
    count = TurboQuantOutliers(dim=dim, outlier_bits=3, bits=2).split
    return (count * lloyd(3, count) + (dim - count) * lloyd(2, dim - count)) / dim


ROWS = {
    "exact-f32": Row(lambda d: Exact(dim=d, dtype="float32"), lambda d: 0.0),
    "exact-bf16": Row(lambda d: Exact(dim=d, dtype="bfloat16")),
    "exact-f16": Row(lambda d: Exact(dim=d, dtype="float16")),
    "mse-1": Row(lambda d: TurboQuantMSE(dim=d, bits=1), lambda d: lloyd(1, d)),
    "mse-3": Row(lambda d: TurboQuantMSE(dim=d, bits=3), lambda d: lloyd(3, d)),
    "mse-3-mean": Row(lambda d: TurboQuantMSE(dim=d, bits=3, mean=True), lambda d: lloyd(3, d)),
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
    "int_affine-4": Row(lambda d: IntAffine(dim=d, bits=4, group=d // 2)),
    "kivi_key-2": Row(lambda d: KiviKey(dim=d, bits=2), zero_exact=False),
    "kivi_value-2": Row(lambda d: KiviValue(dim=d, bits=2, group=math.gcd(d, 32))),
    "kvarn-4": Row(lambda d: KVarN(dim=d, bits=4, group=64), zero_exact=False),
    "kvarn-2-token": Row(
        lambda d: KVarN(dim=d, bits=2, axis="token", group=32, scale_dtype="float32")
    ),
    "nuq-3": Row(lambda d: NUQ(dim=d, bits=3), zero_exact=False),
    "oscar-2": Row(lambda d: Oscar(dim=d, group=d // 2, clip_percent=92)),
    "per_channel-4": Row(lambda d: PerChannel(dim=d, bits=4)),
    "fp8-e4m3-token": Row(lambda d: FP8(dim=d), zero_exact=False),
    "fp8-e5m2-head": Row(lambda d: FP8(dim=d, format="e5m2", scale="head"), zero_exact=False),
    "fp8-e4m3-none": Row(lambda d: FP8(dim=d, scale="none"), zero_exact=False),
    "int8-token-head": Row(lambda d: Int8TokenHead(dim=d)),
    "int4-token-head": Row(lambda d: Int4TokenHead(dim=d)),
    "nvfp4": Row(lambda d: NVFP4(dim=d), zero_exact=False),
    "vllm-key-3": Row(lambda d: VLLMTurboQuantKey(dim=d, bits=3)),
    "vllm-value-4": Row(lambda d: VLLMTurboQuantValue(dim=d, bits=4)),
    # 80 is no multiple of a block: llama.cpp keeps such a cache in f16.
    "ggml-q4_0-walsh": Row(
        lambda d: Ggml(
            dim=d, type="f16" if d % 32 else "q4_0", rotation="walsh", rotation_block=d & -d
        )
    ),
    "ggml-q5_1-hadamard": Row(
        lambda d: Ggml(dim=d, type="f16" if d % 32 else "q5_1", rotation="hadamard", seed=1)
    ),
    "outliers-3-2": Row(lambda d: TurboQuantOutliers(dim=d, outlier_bits=3, bits=2), split_error),
    "qjl-2": Row(
        lambda d: QJL(dim=d, rows=2 * d), lambda d: prod_error("orthogonal", 1.0, d) / 2, spread=0.5
    ),
    "polarquant": Row(lambda d: PolarQuant(dim=d)),
    "tcq-2": Row(lambda d: TCQ(dim=d, bits=2)),
    "tcq-3-4-unbiased": Row(
        lambda d: TCQ(dim=d, bits=3, states=4, rotation="haar", scale_rule="unbiased")
    ),
    "transform-scalar": Row(
        lambda d: Transform(dim=d, segments=((8, 4), (d - 16, 3))), zero_exact=False
    ),
    "transform-trellis-gain": Row(
        lambda d: Transform(
            dim=d, segments=((d - 8, 3), (8, 1)), quantizer="trellis", gain="code", gain_bits=3
        ),
        zero_exact=False,
    ),
    "transform-window": Row(
        lambda d: Transform(dim=d, segments=((8, 5), (d - 16, 2)), quantizer="window", states=16),
        zero_exact=False,
    ),
    "transform-window-gain": Row(
        lambda d: Transform(
            dim=d, segments=((16, 3), (d - 16, 1)), quantizer="window", states=64, gain="float16"
        ),
    ),
    "transform-fitted-f16": Row(
        lambda d: Transform(
            dim=d, segments=((16, 4), (d - 16, 2)), codebook="fitted", gain="float16"
        )
    ),
    "rope_block-3-2": Row(
        lambda d: RopeBlock(dim=d, segments=((d // 2, 3), (d // 2, 2)), gain="float16")
    ),
    "rope_block-interleaved": Row(
        lambda d: RopeBlock(
            dim=d, segments=((d - 8, 3),), layout="interleaved", rope_dim=d // 2, seed=4
        ),
        zero_exact=False,
    ),
    "hadamard_per_head-3": Row(
        lambda d: HadamardPerHead(dim=d, bits=3), lambda d: lloyd(3, d, "gaussian")
    ),
    "hadamard_per_head-2-head": Row(
        lambda d: HadamardPerHead(dim=d, bits=2, scale="head"), zero_exact=False
    ),
    "e8": Row(lambda d: E8(dim=d, scale_rule="least_squares", scale_dtype="bfloat16")),
}


def arrays_of(codec: Codec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of HEADS heads: a large mean, the source's own codebook, different scales; or a fit."""
    source = "gaussian" if getattr(codec, "scale", "") == "head" else "sphere"
    made = {
        "mean": lambda: rng.normal(size=(HEADS, codec.dim)) * 20,
        "codebook": lambda: np.stack(
            [codebook.lloyd_max(source, codec.config()["bits"], codec.dim)] * HEADS
        ),
        "scale": lambda: np.array([0.25, 3.0]),
    }
    if set(codec.array_shapes) <= set(made):
        return {name: made[name]().astype(np.float32) for name in codec.array_shapes}
    samples = rng.normal(size=(HEADS, 512, codec.dim)) * np.array([0.25, 3.0])[:, None, None]
    with compiling(codec):
        return codec.fit(Observed.of(samples.astype(np.float32)))


def compiling(codec: Codec) -> contextlib.AbstractContextManager[None]:
    """A search for the best path takes longer than its compilation."""
    search = codec.config().get("quantizer") == "window"
    return optimised() if search else contextlib.nullcontext()


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
    with compiling(codec):
        out = jax.jit(jax.vmap(functools.partial(run, codec)))(*inputs)
    out = jax.tree.map(np.asarray, out)
    return out | {"codec": codec, "arrays": arrays, "x": x, "q": q, "weights": weights}


def variable(c: dict[str, Any]) -> np.ndarray:
    """x without the head's mean, float64: what is quantized."""
    x = c["x"].astype(np.float64)
    return x - c["arrays"]["mean"][:, None] if "mean" in c["arrays"] else x
