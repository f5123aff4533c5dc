"""What a model is, as data: geometry per layer, nothing that runs.

Families differ in these fields only; the one decoder (`decoder.py`) reads them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope

Norm = Literal["rms", "layer", "centred"]  # "layer": less the mean, with a bias; "centred": none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of one MLP, or `beside` it (`experts.route` says how they are
    chosen)."""

    count: int
    chosen: int  # per token
    intermediate: int  # of one expert
    renormalised: bool  # weights of the chosen experts sum to one
    shared: int = 0  # width of one more expert that every token passes; 0: none
    shared_gate: bool = True  # what it adds is multiplied by sigmoid(its router)
    bias: bool = False  # of the router and of every expert's matrices
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction: bool = False  # a bias of the scores, for choosing only
    groups: int = 1  # of neighbours: experts are chosen in the best `chosen_groups` of them
    chosen_groups: int = 1
    group_best: int = 1  # a group is as good as the sum of so many of its best scores
    scale: float = 1.0  # of the weights
    # Gemma 4: an MLP and the experts are each normalised before and after, the router reads the
    # residual, normalised and multiplied by a weight, and each expert has a factor of its own.
    beside: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads are made of one latent vector.

    Of a layer with it, `kv_heads` is 1, `v_head_dim` the size of the latent vector (after its
    norm), `head_dim` that of the rotated part that goes with it; queries meet [latent, rotated].
    """

    nope_dim: int  # channels of a head's query and key that are not rotated
    value_dim: int  # of a head
    query_rank: int | None  # queries are made of a latent vector too; None: they are not
    norm_eps: float  # of the norms of latent vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta-net in place of attention: a state of fixed size, no KV cache."""

    key_heads: int  # each serves value_heads / key_heads value heads
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # tokens that the convolution sees

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Shape of the state: heads, rows, columns."""
        return self.value_heads, self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba:
    """A Mamba-2 mixer in place of attention: a state of fixed size, no KV cache."""

    heads: int
    head_dim: int
    groups: int  # of heads that share what writes to the state and what reads it
    state_dim: int
    kernel: int  # tokens that the convolution sees
    conv_bias: bool
    bias: bool  # of both projections
    step_limits: tuple[float, float]

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: values, what writes, what reads."""
        return self.inner + 2 * self.groups * self.state_dim

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Shape of the state: heads, rows, columns."""
        return self.heads, self.state_dim, self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer. Hashable: two equal specs share one compiled function."""

    hidden: int
    intermediate: int  # of the one MLP; 0 where there are experts alone
    heads: int
    kv_heads: int  # 0: the layer keeps no KV cache
    head_dim: int  # of q and k
    v_head_dim: int
    norm_eps: float
    rope: Rope | None  # None: no rotary embedding (NoPE)
    rope_magnitude: float = 1.0  # channels that are rotated are multiplied by it (longrope)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # what is normalised at a time
    norm: Norm = "rms"
    norm_offset: float = 0.0  # RMS norms multiply by offset + weight
    pre_norms: bool = True  # norms of what attention and the MLP read
    parallel: bool = False  # the MLP reads what attention reads, by the same norm
    post_norms: bool = False  # norms of what attention and the MLP add to the residual stream
    residual_scale: float = 1.0  # of what attention and the MLP add
    gated: bool = True  # the MLP is down(act(gate) * up), not down(act(up))
    activation: Literal["silu", "gelu_tanh", "clipped_swiglu"] = "silu"
    query_growth: tuple[float, float] | None = None  # (b, n): times 1 + b ln(1 + floor(p / n))
    softmax_scale: float | None = None  # None: head_dim^-1/2
    window: int | None = None  # sliding window in tokens, the query's own included
    softcap: float | None = None  # of attention logits
    logit_sinks: bool = False  # a logit per query head joins the softmax and no output
    experts: Experts | None = None
    output_gate: bool = False  # what attention gives is multiplied by sigmoid(gate(n))
    latent: Latent | None = None
    recurrent: DeltaNet | Mamba | None = None  # in place of attention, whose fields are 0 then
    values_are_keys: bool = False  # values are the keys of before their norm and rotation
    value_norm: bool = False  # of each head, without a weight
    borrows_cache_of: int | None = None  # index of the layer whose cache this layer reads
    # Channel of the stream (`stream`) at which K and V stand that more layers than one read: this
    # layer leaves them there, or finds them (`borrows_cache_of`).
    shared_at: int | None = None
    own_input: int = 0  # channels that this layer reads of each token beside the residual
    own_input_at: int = 0  # their first channel of the stream
    output_scale: bool = False  # what the layer makes of the residual is multiplied by a weight

    @property
    def lends(self) -> bool:
        return self.shared_at is not None and self.borrows_cache_of is None

    @property
    def owns_cache(self) -> bool:
        return self.kv_heads > 0 and self.borrows_cache_of is None

    def cache_at(self, index: int) -> int:
        """The layer whose cache this one, layer `index`, reads."""
        return index if self.borrows_cache_of is None else self.borrows_cache_of

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole model: layers in order, and what stands before and after them."""

    family: str  # as the file says it: "llama", "gemma3_text", ...
    name: str
    vocab: int
    hidden: int
    context: int
    norm_eps: float
    tied_embeddings: bool
    layers: tuple[LayerSpec, ...]
    embed_scale: float = 1.0  # embeddings are multiplied by its float32 value
    norm: Norm = "rms"  # the final one
    norm_offset: float = 0.0  # of the final norm
    logit_scale: float = 1.0  # logits are multiplied by it
    logit_softcap: float | None = None  # of the final logits
    prefix: str = "model."  # of the decoder's module names
    shared: int = 0  # channels of the stream that hold K and V which more layers than one read
    own_input: int = 0  # `LayerSpec.own_input` of every layer
    longer: str = ""  # how to read the model for more tokens than `context`; ends an error

    @property
    def kept(self) -> int:
        """Channels of the stream that layers change."""
        return self.hidden + self.shared

    def path(self, index: int) -> str:
        """Module path of a layer's attention, as Hugging Face names it."""
        return f"{self.prefix}layers.{index}.self_attn"

    def check_length(self, tokens: int, what: str) -> None:
        """Raises TurboqError where a sequence is longer than the model is made for."""
        if tokens > self.context:
            raise TurboqError(
                f"{what} of {tokens} tokens exceed the model's context of {self.context}: make "
                f"them shorter{self.longer}"
            )
