"""What a model is, as data: geometry per layer, nothing that runs.

Families differ in these fields only; the one decoder (`decoder.py`) reads them. Fields that only
later families need (soft caps, windows, partial rotary, MoE) belong here too, per layer.
"""

from __future__ import annotations

import dataclasses

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer. Hashable: two equal specs share one compiled function."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int  # 0: the layer keeps no KV cache
    head_dim: int  # of q and k
    v_head_dim: int
    norm_eps: float
    rope: Rope | None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # sliding window in tokens, the query's own included
    softcap: float | None = None
    borrows_cache_of: int | None = None  # index of the layer whose cache this layer reads

    @property
    def owns_cache(self) -> bool:
        return self.kv_heads > 0 and self.borrows_cache_of is None

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole model: layers in order, and what stands before and after them."""

    family: str  # "llama", "mistral", "qwen2", "qwen3"
    name: str
    vocab: int
    hidden: int
    context: int
    norm_eps: float
    tied_embeddings: bool
    layers: tuple[LayerSpec, ...]

    def path(self, index: int) -> str:
        """Module path of a layer's attention, as Hugging Face names it."""
        return f"model.layers.{index}.self_attn"

    def check_length(self, tokens: int, what: str) -> None:
        """Raises TurboqError where a sequence is longer than the model is made for."""
        if tokens > self.context:
            raise TurboqError(
                f"{what} of {tokens} tokens exceed the model's context of {self.context}: make "
                "them shorter"
            )
