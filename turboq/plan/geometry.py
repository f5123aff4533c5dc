"""What a plan must know of its model: enough to refuse every other model, nothing that runs."""

# pyright: strict

from __future__ import annotations

import dataclasses
import typing
from typing import ClassVar, Literal

from turboq.numbers.rope import Rope
from turboq.plan.errors import PlanConflict

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_DIM = 1024  # of a head; the largest known is the 576 of latent attention
ROPE_LAYOUTS = ("half", "interleaved", "none")
# Keys are stored after or before their rotary embedding, or relative to the first position of their
# block of so many tokens (`turboq.cache.key_form`).
RopeForm = Literal["after", "before", "block:16", "block:32", "block:64", "block:128", "block:256"]
ROPE_FORMS: tuple[RopeForm, ...] = typing.get_args(RopeForm)


def rope_block(form: RopeForm) -> int:
    """Tokens of a block whose keys are relative to its first position; 1 for "before".

    Raises:
      ValueError: keys after their rotary embedding have none.
    """
    if form == "after":
        raise ValueError(f"{form=} has no block")
    return 1 if form == "before" else int(form.removeprefix("block:"))


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be {low}..{high}")


def check_named(name: str, value: str) -> None:
    """Raises ValueError for an empty name."""
    if not value:
        raise ValueError(f"{name}='' must not be empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """One decoder layer. `kv_heads == 0`: it keeps no KV cache (a recurrent layer, say).

    `path` is the attention module's name as Hugging Face names it, `window` the sliding window in
    tokens (the query's own included), `rope_layout` how rotary pairs lie in a head: "half" pairs
    channel i with i + rope_dim/2, "interleaved" 2i with 2i+1. `rope_dim` counts the leading
    rotated channels of keys (None: all). `borrows_cache_of` names an earlier layer whose cache
    this one reads instead of its own. `rope` says how far keys turn per token, which only plans
    that store keys before their rotary embedding need (None: not known, or none).

    `latent` (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434, section 2.1): V is the one
    latent vector of a token, K the one rotated part that goes with it, and queries meet [V, K].

    Raises:
      ValueError: a count or width out of range, or names that are none.
      PlanConflict: fields that contradict each other (a PlanError).

    Examples:
      >>> from turboq import LayerGeometry
      >>> layer = LayerGeometry(
      ...     index=0, path="model.layers.0.self_attn", kv_heads=2, q_heads=8, k_dim=64, v_dim=64
      ... )
      >>> layer.owns_cache
      True
    """

    derived: ClassVar[tuple[str, ...]] = ("owns_cache",)

    index: int
    path: str
    kv_heads: int
    q_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    rope_layout: str = "half"
    rope_dim: int | None = None
    borrows_cache_of: int | None = None
    rope: Rope | None = dataclasses.field(default=None, metadata={"optional": True})
    latent: bool = dataclasses.field(default=False, metadata={"optional": True})

    def __post_init__(self):
        check_range("index", self.index, 0, MAX_LAYERS - 1)
        check_named("path", self.path)
        check_range("kv_heads", self.kv_heads, 0, MAX_HEADS)
        check_range("q_heads", self.q_heads, 0, MAX_HEADS)
        check_range("k_dim", self.k_dim, 0, MAX_DIM)
        check_range("v_dim", self.v_dim, 0, MAX_DIM)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token, or null")
        if self.rope_layout not in ROPE_LAYOUTS:
            raise ValueError(f"rope_layout={self.rope_layout!r} must be one of {ROPE_LAYOUTS}")
        if self.rope_dim is not None:
            check_range("rope_dim", self.rope_dim, 0, MAX_DIM)
        if self.borrows_cache_of is not None:
            check_range("borrows_cache_of", self.borrows_cache_of, 0, MAX_LAYERS - 1)
        self._check_together()

    def _check_together(self):
        if self.rope_dim is not None and self.rope_dim > self.k_dim:
            raise PlanConflict("rope_dim", f"{self.rope_dim} exceeds k_dim {self.k_dim}")
        if self.rope is not None:
            self._check_rope(self.rope)
        if self.latent and self.kv_heads != 1:
            raise PlanConflict(
                "latent", f"one vector of all heads, but kv_heads is {self.kv_heads}"
            )
        if self.kv_heads == 0:
            if self.borrows_cache_of is not None:
                raise PlanConflict("borrows_cache_of", "a layer without KV heads reads no cache")
            return
        if self.q_heads == 0 or self.q_heads % self.kv_heads:
            raise PlanConflict(
                "q_heads", f"{self.q_heads} is not a multiple of kv_heads {self.kv_heads}"
            )
        if not (self.k_dim and self.v_dim):
            raise PlanConflict("k_dim" if not self.k_dim else "v_dim", "0 in a layer with KV heads")

    def _check_rope(self, rope: Rope):
        dim = self.k_dim if self.rope_dim is None else self.rope_dim
        if rope.layout != self.rope_layout:
            raise PlanConflict(
                "rope.layout", f"{rope.layout!r}, but rope_layout is {self.rope_layout!r}"
            )
        if rope.dim != dim:
            raise PlanConflict("rope.dim", f"{rope.dim}, but {dim} channels of keys are rotated")

    @property
    def owns_cache(self) -> bool:
        """Whether it stores keys and values itself: it has KV heads and borrows no cache."""
        return self.kv_heads > 0 and self.borrows_cache_of is None

    @property
    def turns_keys(self) -> bool:
        """Whether its keys carry a rotary embedding that is known."""
        return self.rope_layout != "none" and self.rope_dim != 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """A model as a plan sees it. `fingerprint` identifies the weights, `name` is for people.

    `turboq_calibrate.model_geometry` makes it of a loaded model; of a model of your own:

    Raises:
      ValueError: an empty name, or no layers or too many.
      PlanConflict: layers out of order, that borrow what is not there, or keep nothing.

    Examples:
      >>> from turboq import LayerGeometry, ModelGeometry
      >>> geometry = ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers",
      ...     layers=tuple(
      ...         LayerGeometry(index=i, path=f"l{i}", kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      ...         for i in range(2)
      ...     ),
      ... )
      >>> len(geometry.cache_layers)
      2
    """

    fingerprint: str
    family: str
    name: str
    layers: tuple[LayerGeometry, ...]

    def __post_init__(self):
        for field in ("fingerprint", "family", "name"):
            check_named(field, getattr(self, field))
        check_range("layers", len(self.layers), 1, MAX_LAYERS)
        paths: dict[str, int] = {}
        for i, layer in enumerate(self.layers):
            if layer.index != i:
                raise PlanConflict(f"layers[{i}].index", f"{layer.index} where {i} is due")
            first = paths.setdefault(layer.path, i)
            if first != i:
                raise PlanConflict(f"layers[{i}].path", f"is also the path of layer {first}")
            if layer.borrows_cache_of is not None:
                self._check_borrower(layer, layer.borrows_cache_of)
        if not self.cache_layers:
            raise PlanConflict("layers", "no layer keeps a KV cache: there is nothing to plan")

    def _check_borrower(self, layer: LayerGeometry, n: int):
        path = f"layers[{layer.index}].borrows_cache_of"
        if n >= layer.index:
            raise PlanConflict(path, f"{n} is not an earlier layer")
        owner = self.layers[n]
        if not owner.owns_cache:
            raise PlanConflict(path, f"layer {n} has no cache of its own")
        shape = (layer.kv_heads, layer.k_dim, layer.v_dim)
        theirs = (owner.kv_heads, owner.k_dim, owner.v_dim)
        if shape != theirs:
            raise PlanConflict(path, f"kv_heads, k_dim, v_dim {shape} differ from {theirs} there")
        if layer.latent != owner.latent:
            raise PlanConflict(path, f"latent is {layer.latent} here, {owner.latent} there")

    @property
    def cache_layers(self) -> tuple[LayerGeometry, ...]:
        """Layers that own a cache: exactly those a plan lists."""
        return tuple(layer for layer in self.layers if layer.owns_cache)

    def key_form(self, asked: RopeForm | None = None) -> RopeForm:
        """How keys are stored; None: before their rotary embedding, where any layer has one.

        Raises:
          PlanConflict: before it or in blocks, and no layer has one.
        """
        turned = any(layer.turns_keys for layer in self.cache_layers)
        if asked is None:
            return "before" if turned else "after"
        if asked != "after" and not turned:
            raise PlanConflict(
                "k_rope", f"{asked}, but keys of {self.name} carry no rotary embedding (captured "
                "keys are stored as they come): leave --k_rope away, or --k_rope=after",
            )  # fmt: skip
        return asked

    def kept_window(self, index: int) -> int | None:
        """Tokens that the cache of layer `index` must keep: the widest window of its readers.

        None: all, one of them sees every token.
        """
        readers = [x for x in self.layers if index in (x.index, x.borrows_cache_of)]
        found = [x.window for x in readers if x.window is not None]
        return max(found) if len(found) == len(readers) else None
