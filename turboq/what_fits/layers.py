"""What a model keeps per token and layer: enough to count its KV cache, nothing that runs.

Unlike `turboq.plan.ModelGeometry` this describes models that the decoder here does not run, and
needs no weights. Kinds of layers:

    full     K and V of every token
    sliding  K and V of the last `window` tokens (chunked attention: of at most one chunk)
    latent   one vector per token instead of K and V (multi-head latent attention): `v_dim` is 0
    shared   reads an earlier layer's cache and keeps nothing
    none     keeps no KV cache (linear attention, convolution, state space)

Besides, any layer may keep a fixed state per sequence (`state_bytes`; None: not known how large)
and, with K and V or a latent, an index key of `index_dim` numbers per token (sparse attention).
"""

from __future__ import annotations

import dataclasses

KINDS = ("full", "sliding", "latent", "shared", "none")
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_DIM = 8192
MAX_TOKENS = 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One decoder layer as its KV cache sees it.

    Raises:
      ValueError: an unknown kind, or a value out of range or at odds with the kind.
    """

    kind: str
    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int | None = None
    index_dim: int = 0
    state_bytes: int | None = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind=} must be one of {', '.join(KINDS)}")
        stores = self.kind in ("full", "sliding", "latent")
        check("kv_heads", self.kv_heads, stores, MAX_HEADS)
        check("k_dim", self.k_dim, stores, MAX_DIM)
        check("v_dim", self.v_dim, stores and self.kind != "latent", MAX_DIM)
        if self.index_dim:
            check("index_dim", self.index_dim, self.kind in ("full", "latent"), MAX_DIM)
        if self.kind == "latent" and (self.v_dim or self.kv_heads != 1):
            raise ValueError(
                f"a latent layer keeps 1 vector and no V: {self.kv_heads=} {self.v_dim=}"
            )
        if (self.window is not None) != (self.kind == "sliding"):
            raise ValueError(f"{self.window=} must be given for kind='sliding' and only there")
        if self.window is not None:
            check("window", self.window, True, MAX_TOKENS)

    @property
    def stores(self) -> bool:
        """Whether it keeps vectors of tokens."""
        return self.kv_heads > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """A model's layers in order, and what a memory plan needs besides.

    `context` is what the model is made for; `parameters` counts all weights, `active` those that
    one token uses and `experts` those that MXFP4 checkpoints store so; `weights_bytes` is the size
    of the weights where files were seen (`weights_from`: which, or why not). None: unknown. `note`
    is for people.
    """

    name: str
    family: str
    layers: tuple[CacheLayer, ...]
    context: int | None = None
    parameters: int | None = None
    active: int | None = None
    experts: int | None = None
    weights_bytes: int | None = None
    weights_from: str = "no weight files were seen"
    source: str = ""
    note: str = ""

    def __post_init__(self):
        check("layers", len(self.layers), True, MAX_LAYERS)
        if self.context is not None:
            check("context", self.context, True, MAX_TOKENS)

    @property
    def state_bytes(self) -> int:
        """Recurrent state of one sequence, all layers whose state is known."""
        return sum(layer.state_bytes or 0 for layer in self.layers)

    @property
    def unknown_states(self) -> int:
        """Layers with a recurrent state whose size is not known."""
        return sum(layer.state_bytes is None for layer in self.layers)


def check(name: str, value: int, positive: bool, high: int) -> None:
    """Raises ValueError unless `value` is 1..high, or 0 if not `positive`."""
    low, high = (1, high) if positive else (0, 0)
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be {f'{low}..{high}' if positive else 0}")
