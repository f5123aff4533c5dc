"""The decoder as flax.nnx modules: the same pure functions, weights held as `nnx.Param`.

    module = Decoder.from_model(load_model("embedded"))
    logits, states = module(tokens)

For flax users (filtering, sharding, checkpoints, gradients); the streamed path does not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from turboq_calibrate.models import decoder
from turboq_calibrate.models.model import Model
from turboq_calibrate.models.spec import LayerSpec, ModelSpec
from turboq_calibrate.models.streamed_experts import whole


class _Weights(nnx.Module):
    """A named set of weights, as attributes, and as the dict the pure functions take."""

    def __init__(self, params: decoder.Params):
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def params(self) -> decoder.Params:
        return {name: getattr(self, name)[...] for name in self.names}


class DecoderLayer(_Weights):
    """One decoder layer; see `decoder.layer`."""

    def __init__(self, spec: LayerSpec, params: decoder.Params):
        super().__init__(params)
        self.spec = spec

    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        attend: decoder.Attend = decoder.exact_attend,
        state: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        return decoder.layer(self.spec, self.params(), x, positions, attend, state)


class Decoder(nnx.Module):
    """A whole model. Tied embeddings are one `nnx.Param`, shared."""

    def __init__(
        self,
        spec: ModelSpec,
        embed: decoder.Params,
        layers: Sequence[decoder.Params],
        head: decoder.Params,
    ):
        self.spec = spec
        self.embedding = nnx.Param(embed["embedding"])
        self.inputs = _Weights({n: w for n, w in embed.items() if n != "embedding"})
        self.ends = _Weights({n: w for n, w in head.items() if n != "unembedding"})
        if not spec.tied_embeddings:
            self.unembedding = nnx.Param(head["unembedding"])
        self.layers = nnx.List(
            [DecoderLayer(s, p) for s, p in zip(spec.layers, layers, strict=True)]
        )

    @classmethod
    def from_model(cls, model: Model) -> Decoder:
        """All weights of `model`, resident."""
        layers = [whole(spec, model.layer(i)) for i, spec in enumerate(model.spec.layers)]
        return cls(model.spec, model.embed_params(), layers, model.head_params())

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attend: decoder.Attend = decoder.exact_attend,
        states: Sequence[Any] | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], list[Any]]:
        """Logits in nats, and one attention state per layer; jit it with `nnx.jit`."""
        states = [None] * len(self.spec.layers) if states is None else list(states)
        positions = decoder.default_positions(tokens) if positions is None else positions
        embedding = self.embedding[...]
        before = {**self.inputs.params(), "embedding": embedding}
        x = decoder.embed(self.spec, before, tokens.astype(jnp.int32))
        for i, layer in enumerate(self.layers):
            x, states[i] = layer(x, positions, attend, states[i])
        unembedding = embedding if self.spec.tied_embeddings else self.unembedding[...]
        head = {**self.ends.params(), "unembedding": unembedding}
        return decoder.head(self.spec, head, x), states
