"""What model_decode_speed.py times: a model of Llama 8B's shape, and caches of all kinds.

Weights are random and never stored. Plans are fitted to normal numbers: their stored form is that
of real ones, learned layers have about 2.5 and 3.5 bits per channel by turns. Caches can be filled
with random bits in the place of a prompt. Layers share no memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from turboq.cache import joint
from turboq.cache.layer import KVLayer, TokenPolicy
from turboq.codecs import Codec, Exact, PerHead, Transform, TurboQuantMSE
from turboq.codecs.fit_joint import heads_joined
from turboq.codecs.observed import Observed
from turboq.numbers.rope import Rope
from turboq.plan import (
    LayerGeometry,
    ModelGeometry,
    Plan,
    collect_arrays,
    compose,
    head_plan,
    uniform_plan,
)
from turboq_calibrate.measure.decode_cache import ByLayer, OnePool, open_cache
from turboq_calibrate.models import Model
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.models.geometry import spec_geometry
from turboq_calibrate.models.params import embed_shapes, head_shapes, layer_shapes
from turboq_calibrate.models.spec import LayerSpec, ModelSpec

POLICY = TokenPolicy(sinks=4)


def llama8b(layers: int = 32, *, tiny: bool = False) -> Model:
    """Llama 8B's shape with random weights, bfloat16, never stored; `tiny`: a toy's shape."""
    hidden, inner, heads, kv, dim, vocab = (
        (64, 96, 4, 2, 16, 128) if tiny else (4096, 14336, 32, 8, 128, 128256)
    )
    one = LayerSpec(
        hidden=hidden, intermediate=inner, heads=heads, kv_heads=kv, head_dim=dim, v_head_dim=dim,
        norm_eps=1e-5, rope=Rope(dim=dim, theta=5e5),
    )  # fmt: skip
    spec = ModelSpec(
        family="llama", name="llama8b, random weights", vocab=vocab, hidden=hidden, context=2**17,
        norm_eps=1e-5, tied_embeddings=False, layers=(one,) * layers,
    )  # fmt: skip
    return Drawn(spec)


class Drawn(Model):
    """A model without files: weights drawn on the device, normal, 1 / sqrt(inputs)."""

    def __init__(self, spec: ModelSpec):
        self.spec, self.dtype, self.resident = spec, "bfloat16", True
        self._layers = [_drawn(i, layer_shapes(one)) for i, one in enumerate(spec.layers)]
        self._head = _drawn(-1, head_shapes(spec))
        self._embed = _drawn(-2, embed_shapes(spec))


def _drawn(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: _normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5


def plans(geometry: ModelGeometry) -> dict[str, Callable[[], list[KVLayer]]]:
    """What makes the layers of every packed cache, by its name."""
    one = geometry.cache_layers[0]
    heads = heads_joined(one.kv_heads, one.k_dim, one.v_dim, tokens=2**20)

    def uniform(codec: Codec) -> Callable[[], list[KVLayer]]:
        return lambda: _layers(uniform_plan(_two(geometry), k=codec, v=codec, policy=POLICY), one)

    def learned(form: Any) -> Callable[[], list[KVLayer]]:
        def choose(index: int, side: str, head: int) -> Codec:
            place = head % heads + (side == "v") * heads
            bits = round(5 - 4 * place / (2 * heads - 1)) + index % 2
            half = one.k_dim // 2
            segments = ((half, bits), (half, bits - 1))[: 1 if bits == 1 else 2]
            return Transform(
                dim=one.k_dim, segments=segments, quantizer="window", states=64, gain="code"
            )

        def make() -> list[KVLayer]:
            own = head_plan(
                _two(geometry), choose, k_rope=lambda _: form, joint=heads, policy=POLICY
            )
            return _layers(own, one)

        return make

    return {
        "exact": uniform(Exact(dim=one.k_dim)),
        "turboquant_mse 3b": uniform(TurboQuantMSE(dim=one.k_dim, bits=3)),
        "per_head 3b": uniform(PerHead(dim=one.k_dim, bits=3)),
        "learned": learned("before"),
        "learned block:64": learned("block:64"),
        "learned block:256": learned("block:256"),
    }


def _two(geometry: ModelGeometry) -> ModelGeometry:
    return dataclasses.replace(geometry, layers=geometry.layers[:2])


def _layers(plan: Plan, one: LayerGeometry) -> list[KVLayer]:
    """Two layers, fitted to normal numbers: a model takes them by turns."""
    rng = np.random.default_rng(0)

    @functools.cache
    def fitted(codec: Codec) -> dict[str, np.ndarray]:
        seen = Observed.of(rng.standard_normal((1, 4 * codec.dim, codec.dim), np.float32))
        return codec.fit(seen)

    def fit(_: int, __: str, codec: Codec) -> dict[str, np.ndarray]:
        return {name: np.repeat(x, one.kv_heads, axis=0) for name, x in fitted(codec).items()}

    apart = tuple(dataclasses.replace(layer, joint=None) for layer in plan.layers)
    arrays = collect_arrays(dataclasses.replace(plan, layers=apart), fit)
    for layer in plan.layers:
        if layer.joint is None:
            continue
        for name, shape in joint.shapes(one.kv_heads, layer.joint, one.k_dim, one.v_dim).items():
            noise = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])
            turn = np.eye(shape[-1], dtype=np.float32) if name == "synthesis" else 0.0
            arrays[f"layers.{layer.index}.joint.{name}"] = turn + 0.1 * noise
    return list(plan.kv_layers(compose(plan, arrays)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """Keys and values [B, S, K, D] of a layer."""

    k: Any
    v: Any
    counts: Any = None  # what `ByLayer` sets; all sequences get every token


class Plain(ByLayer):
    """A bfloat16 cache in one array per layer and side, read by JAX's own attention; "none": no
    cache, and an attention that does nothing."""

    def __init__(self, spec: ModelSpec, batch: int, capacity: int, implementation: str):
        super().__init__((), batch, capacity, _plain_by(implementation))
        for one in spec.layers:
            shape = (batch, 0 if implementation == "none" else capacity, one.kv_heads, one.head_dim)
            k, v = (jnp.zeros(shape, jnp.bfloat16) for _ in "kv")
            self.states.append(Arrays(k=k, v=v))  # pyright: ignore[reportArgumentType]

    def counters(self) -> list[Any]:
        return []  # a write behind the end is moved before it

    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.states))


@functools.cache
def _plain_by(implementation: Any) -> Callable[..., tuple[Array, Arrays]]:
    def attend(spec: LayerSpec, q, k, v, positions, state: Arrays, sinks=None):
        if implementation == "none":  # of all that was projected
            return q + jnp.repeat(k + v, spec.heads // spec.kv_heads, axis=2), state
        start = positions[0, 0]
        held = {
            name: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
            for name, old, new in (("k", state.k, k), ("v", state.v, v))
        }
        if q.shape[1] > 1:  # a prompt, from position 0
            return exact_attend(spec, q, k, v, positions, None)[0], Arrays(**held)
        count = jnp.full((len(q),), start + 1, jnp.int32)
        out = jax.nn.dot_product_attention(
            q.astype(jnp.bfloat16), held["k"], held["v"], scale=spec.scale,
            key_value_seq_lengths=count, query_seq_lengths=jnp.ones_like(count),
            implementation=implementation,
        )  # fmt: skip
        return out.astype(jnp.float32), Arrays(**held)

    return attend


Cache = ByLayer | OnePool
Open = Callable[[int, int], Cache]  # (layers, capacity)


def caches(model: Model, batch: int) -> dict[str, Open]:
    """What opens a cache of so many layers, by its name; "none" is none."""

    def plain(name: str) -> Open:
        def opened(layers: int, capacity: int) -> Cache:
            spec = dataclasses.replace(model.spec, layers=model.spec.layers[:layers])
            return Plain(spec, batch, capacity, name)

        return opened

    def packed(make: Callable[[], list[KVLayer]]) -> Open:
        two = functools.cache(make)
        return lambda layers, capacity: open_cache(
            [two()[i % len(two())] for i in range(layers)], batch, capacity
        )

    exact = ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",)
    geometry = spec_geometry(model.spec, "timed")
    found = {"none": plain("none")} | {f"bf16 {name}": plain(name) for name in exact}
    return found | {name: packed(make) for name, make in plans(geometry).items()}


def fill(cache: Cache, tokens: int) -> None:
    """Every sequence has so many tokens of random bits."""
    numbers = np.random.default_rng(0)

    def drawn(leaf: Array) -> Array:
        key = jax.random.key(int(numbers.integers(2**31)))
        if leaf.dtype == jnp.uint32:
            return jax.random.bits(key, leaf.shape, leaf.dtype)
        return jax.random.uniform(key, leaf.shape, leaf.dtype, 0.5, 1.0)

    def at(lengths: Array) -> Array:
        return jnp.full_like(lengths, tokens)

    replace = dataclasses.replace
    for i, held in enumerate(cache.states):
        if isinstance(cache, Plain):
            cache.states[i] = jax.tree.map(drawn, held)
        elif isinstance(cache, ByLayer):
            own = cache.states[i].cache
            groups = jax.tree.map(drawn, own.groups)
            cache.states[i] = replace(
                cache.states[i], cache=replace(own, groups=groups, lengths=at(own.lengths))
            )
        else:
            own = cache.states[i]
            exact = jax.tree.map(drawn, own.exact)
            cache.states[i] = replace(own, exact=exact, lengths=at(own.lengths))
    if isinstance(cache, OnePool):
        cache.pools = [drawn(words) for words in cache.pools]
