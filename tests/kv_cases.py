"""Layers and inputs shared by the cache and kernel tests: one row per kind of layer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.codecs import Exact, PerHead, TurboQuantMSE, TurboQuantProd
from turboq.codecs.base import Codec, Field

DIM = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMax(Codec):
    """A minimal block codec: per channel, 4-bit codes of x over the block's largest |x|."""

    name = "block_max"
    size: int = 8

    @property
    def block(self):
        return self.size

    @property
    def fields(self):
        return (
            Field(name="codes", width=self.dim, bits=4, dtype="codes"),
            Field(name="top", width=self.dim, bits=16, dtype="float16", per_block=True),
        )

    def encode(self, arrays, x):
        blocks = x.reshape(*x.shape[:-2], -1, self.size, self.dim)
        top = jnp.max(jnp.abs(blocks), axis=-2).astype(jnp.float16)
        safe = jnp.maximum(top.astype(jnp.float32), 1e-6)[..., None, :]
        codes = jnp.clip(jnp.round(blocks / safe * 7) + 7, 0, 14).astype(jnp.uint8)
        return {"codes": codes.reshape(x.shape), "top": top}

    def decode(self, arrays, stored):
        top = jnp.repeat(stored["top"].astype(jnp.float32), self.size, axis=-2)
        return (stored["codes"].astype(jnp.float32) - 7) / 7 * top

    def fold_query(self, arrays, q):
        return {"q": q}

    def logits(self, arrays, folded, stored):
        return folded["q"] @ self.decode(arrays, stored).T

    def accumulate(self, arrays, weights, stored):
        return weights @ self.decode(arrays, stored)

    def unfold_output(self, arrays, acc, mass):
        return acc


def learned(rng, heads, bits, dim=DIM):
    """Plausible fitted arrays for a PerHead codec: a mean and an ascending codebook per head."""
    return {
        "mean": jnp.asarray(rng.standard_normal((heads, dim)), jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, heads), jnp.float32),
        "codebook": jnp.asarray(np.sort(rng.standard_normal((heads, 2**bits))), jnp.float32),
    }


def make_layer(name, rng, policy=None):
    policy = policy or TokenPolicy(sinks=3, recent=5)
    if name == "exact":
        codec = Exact(dim=DIM, dtype="float32")
        return uniform_layer(kv_heads=2, k=codec, v=codec, policy=policy)
    if name == "turboquant":
        k, v = TurboQuantProd(dim=DIM, bits=3), TurboQuantMSE(dim=DIM, bits=2)
        return uniform_layer(kv_heads=2, k=k, v=v, policy=policy)
    if name == "per_head":
        codec = PerHead(dim=DIM, bits=3)
        arrays = [learned(rng, 2, 3) for _ in range(2)]
        return uniform_layer(
            kv_heads=2, k=codec, v=codec, policy=policy, k_arrays=arrays[0], v_arrays=arrays[1]
        )
    if name == "blocks":  # K in blocks of 8 and 4 tokens, V token by token
        k, v = BlockMax(dim=DIM), TurboQuantMSE(dim=DIM, bits=3)
        groups = (
            HeadGroup(heads=(1,), k=k, v=v, k_arrays={}, v_arrays={}),
            HeadGroup(heads=(0,), k=BlockMax(dim=DIM, size=4), v=v, k_arrays={}, v_arrays={}),
        )
        return KVLayer(groups=groups, policy=policy)
    # Two groups whose heads interleave, with different codecs and bits per head.
    wide, narrow = PerHead(dim=DIM, bits=4), TurboQuantMSE(dim=DIM, bits=2)
    static = PerHead(dim=DIM, bits=3, scale="head")
    groups = (
        HeadGroup(heads=(1,), k=wide, v=narrow, k_arrays=learned(rng, 1, 4), v_arrays={}),
        HeadGroup(heads=(0, 2), k=narrow, v=static, k_arrays={}, v_arrays=learned(rng, 2, 3)),
    )
    return KVLayer(groups=groups, policy=policy)


LAYERS = ["exact", "turboquant", "per_head", "mixed", "blocks"]


def tokens(rng, layer, count, batch=2):
    shape = (batch, count, layer.kv_heads, DIM)
    k, v = rng.standard_normal((2, *shape)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)
