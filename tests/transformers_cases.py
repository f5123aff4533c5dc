"""Tiny models and plans that the executed export for transformers is checked with.

`scripts/export_oracles` exports and runs them in transformers; the tests compute the same logits
here. Plans are fitted to random vectors about as large as the models' keys and values.
"""

import dataclasses
from pathlib import Path

import numpy as np

from turboq.cache import joint
from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulated_attention
from turboq.codecs import Exact, PerHead, Transform, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.plan import collect_arrays, compose, head_plan
from turboq_calibrate.models import forward, load_model
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).resolve().parent / "golden"
ARRAYS = GOLDEN / "export" / "transformers_arrays.npz"
BATCH, LENGTH, STEPS, PADDING = 2, 20, 6, 3


def _window(dim, segments, states, gain="code") -> Transform:
    return Transform(
        dim=dim, segments=segments, quantizer="window", states=states, gain=gain, gain_bits=4
    )


def _llama3(layer, side, head):
    """Window codes, other coordinates and bits in each head, and a layer of exact values."""
    if side == "v":
        return Exact(dim=16) if layer else _window(16, ((8, 3), (8, 1)), 64, "none")
    return _window(16, ((8, 4),) if head else ((16, 2),), 16)


def _mistral(layer, side, head):
    """Tables, with a scale per vector or one per head."""
    if side == "k":
        return TurboQuantMSE(dim=16, bits=3 + head, rotation="haar", scale_rule="unbiased")
    scale = "head" if layer else "vector"
    return PerHead(dim=16, bits=3, rotation="haar", scale=scale)


def _gemma3(layer, side, head):
    """Scalar transform codes, fitted or not.

    Gains of float16 in the last layer alone: what a sum's last bit rounds the other way there
    moves no code of a layer behind.
    """
    if side == "k":
        gain = "float16" if layer == 6 else "none"
        return Transform(dim=8, segments=((8, 3),), gain=gain)
    return Transform(dim=8, segments=((8, 4),), codebook="fitted", gain="code", gain_bits=2)


def _glm(layer, side, head):
    return TurboQuantMSE(dim=8, bits=4, scale_dtype="bfloat16" if head else "float32")


def _llama(layer, side, head):
    """Units of two heads and two: more bits in the first of each."""
    if side == "k":
        return _window(8, ((8, 5 - head % 2),), 64)
    return _window(8, ((8, 3),), 16, "none")


# Checkpoint -> (codec of every head, how keys stand when stored, exact tokens).
CASES = {
    "llama3": (_llama3, "before", TokenPolicy(sinks=4)),
    "llama": (_llama, "block:16", TokenPolicy(sinks=2, recent=3)),
    "mistral": (_mistral, "after", TokenPolicy(sinks=2, recent=5, exact_dtype="float32")),
    "gemma3": (_gemma3, "block:16", TokenPolicy(sinks=1, recent=3, exact_dtype="float16")),
    "glm": (_glm, "before", TokenPolicy()),
}


JOINED = {"llama": 2}  # heads


def prompts(model) -> np.ndarray:
    """[B, T] random tokens."""
    rng = np.random.default_rng(20261131)  # no code as near a bin as rounding moves it
    return rng.integers(2, model.spec.vocab, (BATCH, LENGTH)).astype(np.int32)


def planned(name: str):
    """(model, plan, arrays) of a case, the arrays as they were when the oracle ran.

    A fit made anew has other signs, or other bases of equal variance, on another CPU.
    """
    model, plan, _ = fitted(name)
    with np.load(ARRAYS) as file:
        mine = [key for key in file.files if key.startswith(f"{name}/")]
        return model, plan, {key.partition("/")[2]: file[key] for key in mine}


def fitted(name: str):
    """(model, plan, arrays) of a case, fitted here."""
    choose, form, policy = CASES[name]
    model = load_model(str(GOLDEN / name))
    geometry = model_geometry(model)
    plan = head_plan(geometry, choose, k_rope=lambda _: form, policy=policy)

    def fit(layer, side, codec):
        rng = np.random.default_rng([layer, side == "v", codec.dim])
        kv_heads = model.spec.layers[layer].kv_heads
        x = rng.normal(0.2, 0.9 ** np.arange(codec.dim), (kv_heads, 600, codec.dim))
        return codec.fit(Observed.of(x.astype(np.float32)))

    arrays = collect_arrays(plan, fit)
    if (heads := JOINED.get(name)) is None:
        return model, plan, arrays
    for layer in geometry.cache_layers:
        rng = np.random.default_rng(layer.index)
        for array, shape in joint.shapes(layer.kv_heads, heads, layer.k_dim, layer.v_dim).items():
            turn = np.eye(shape[-1]) if array == "synthesis" else 0.0
            values = 0.1 * rng.normal(size=shape) + turn
            arrays[f"layers.{layer.index}.joint.{array}"] = values.astype(np.float32)
    joined = tuple(dataclasses.replace(layer, joint=heads) for layer in plan.layers)
    plan = dataclasses.replace(plan, layers=joined)
    return model, plan, compose(plan, arrays)


def logits(model, plan, arrays, tokens) -> np.ndarray:
    """[B, T, V] of one pass in which every query sees the plan's cache."""

    def plug(spec, q, k, v, positions, layer):
        out = simulated_attention(
            layer, q, k, v, scale=spec.scale, window=spec.window, softcap=spec.softcap
        )
        return out, layer

    return np.asarray(forward(model, tokens, plug, list(plan.kv_layers(arrays)))[0])
