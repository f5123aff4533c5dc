"""Small plans that the plan tests share: one plain, one with everything a plan can say."""

from __future__ import annotations

import dataclasses

import numpy as np

from turboq.cache import joint
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec, Exact, PerHead, TurboQuantMSE, TurboQuantProd
from turboq.codecs.transform import Transform
from turboq.numbers.rope import Rope, Scaling
from turboq.plan import (
    LayerGeometry,
    Measurement,
    ModelGeometry,
    Plan,
    Provenance,
    Quality,
    TextSource,
    collect_arrays,
    compose,
    head_plan,
    uniform_plan,
)
from turboq.plan.geometry import RopeForm

Fitted = dict[str, np.ndarray]


def geometry(layers: int = 2, kv_heads: int = 3, k_dim: int = 16, v_dim: int = 8) -> ModelGeometry:
    return ModelGeometry(
        fingerprint="sha256:0123",
        family="llama",
        name="tiny",
        layers=tuple(
            LayerGeometry(
                index=i,
                path=f"model.layers.{i}.self_attn",
                kv_heads=kv_heads,
                q_heads=3 * kv_heads,
                k_dim=k_dim,
                v_dim=v_dim,
            )
            for i in range(layers)
        ),
    )


def hybrid() -> ModelGeometry:
    """Layers with a window, without a cache, with other dims, and one that borrows."""
    llama3 = Scaling(
        type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64.0
    )
    frequencies = (1.0, 0.5, 0.25, 0.0)
    partial = Rope(dim=8, theta=1e4, layout="interleaved", inv_freq=frequencies)

    def layer(index: int, **other) -> LayerGeometry:
        usual = {"kv_heads": 3, "q_heads": 6, "k_dim": 16, "v_dim": 8}
        return LayerGeometry(index=index, path=f"blocks.{index}.attn", **(usual | other))

    return ModelGeometry(
        fingerprint="sha256:4567",
        family="hybrid",
        name="all kinds",
        layers=(
            layer(0, window=512, rope_layout="interleaved", rope_dim=8, rope=partial),
            layer(1, kv_heads=0, q_heads=0, k_dim=0, v_dim=0, rope_layout="none", rope_dim=0),
            layer(2, kv_heads=4, q_heads=4, k_dim=24, rope=Rope(dim=24, theta=1e4, scaling=llama3)),
            layer(3, borrows_cache_of=0),
        ),
    )


def random_fit(model: ModelGeometry, seed: int = 0):
    """Stands for a calibration: valid random arrays of all heads, reproducible per call."""

    def fit(index: int, side: str, codec: Codec) -> Fitted:
        kv_heads = model.layers[index].kv_heads
        rng = np.random.default_rng([seed, index, side == "k", codec.dim])
        return {
            name: np.sort(rng.random((kv_heads, *shape), dtype=np.float32), axis=-1)
            for name, shape in codec.array_shapes.items()
        }

    return fit


def plain() -> tuple[Plan, Fitted]:
    plan = uniform_plan(
        geometry(),
        k=PerHead(dim=16, bits=4),
        v=PerHead(dim=8, bits=2, scale="head"),
        policy=TokenPolicy(sinks=4),
    )
    return plan, collect_arrays(plan, random_fit(plan.model))


def rich() -> tuple[Plan, Fitted]:
    """Overrides, every codec, tables, keys before RoPE, provenance, quality and `x-` fields."""

    def choose(index: int, side: str, head: int) -> Codec:
        if side == "v":
            codec = Exact(dim=8, dtype="float16") if index == 0 else TurboQuantProd(dim=8, bits=3)
            return PerHead(dim=8, bits=3, rotation="identity") if (index, head) == (2, 1) else codec
        dim = 16 if index == 0 else 24
        mse = TurboQuantMSE(dim=dim, bits=3, rotation="haar", seed=7, mean=index == 2)
        return (PerHead(dim=dim, bits=2), mse)[head % 2]

    measured = Measurement(text="held out", kl_mean=0.125, kl_ci=(0.1, 0.15), top1=0.875)
    plan = head_plan(
        hybrid(),
        choose,
        k_rope=lambda index: "before" if index == 2 else "after",
        policy=TokenPolicy(sinks=4, recent=16, exact_dtype="float16"),
        provenance=Provenance(
            texts=(TextSource(name="topics", sha256="ab" * 32),),
            tokens=4096,
            max_position=512,
            seed=20261122,
            statistics="sha256:89",
            versions={"jax": "0.11.2", "numpy": "2.3"},
            recipe={"windows": 8, "quantiles": [0.5, 0.999], "text": None, "deep": {"on": True}},
        ),
        quality=Quality(measured=(measured,)),
    )
    extra = {
        "": {"x-note": ["kept", {"as": "is"}]},
        "model.layers[1]": {"x-kind": "recurrent"},
        "tokens": {"x-why": "sinks"},
        "layers[1].k.heads.1": {"x-a": 1.5},
        "layers[1].v": {"x-b": None},
        "quality.measured[0]": {"x-c": False},
    }
    plan = dataclasses.replace(plan, extra=extra)
    return plan, collect_arrays(plan, random_fit(plan.model, 1))


def joined(k_rope: RopeForm = "before") -> tuple[Plan, Fitted]:
    """Three heads together in one layer, two and two in another; learned codecs of both sides."""
    model, heads = hybrid(), {0: 3, 2: 2}

    def codec(index: int, side: str, head: int) -> Codec:
        dim = 8 if side == "v" else 16 if index == 0 else 24
        return Transform(dim=dim, segments=((8, 3 if head else 5),), gain="code", gain_bits=2)

    alone = head_plan(model, codec, k_rope=k_rope, policy=TokenPolicy(sinks=2))
    arrays = collect_arrays(alone, random_fit(model, 2))
    for index, own in heads.items():
        at, rng = model.layers[index], np.random.default_rng(index)
        for name, shape in joint.shapes(at.kv_heads, own, at.k_dim, at.v_dim).items():
            turn = np.eye(shape[-1]) if name == "synthesis" else 0.0
            values = 0.05 * rng.normal(size=shape) + turn
            arrays[f"layers.{index}.joint.{name}"] = values.astype(np.float32)
    layers = tuple(dataclasses.replace(x, joint=heads[x.index]) for x in alone.layers)
    plan = dataclasses.replace(alone, layers=layers)
    return plan, compose(plan, arrays)
