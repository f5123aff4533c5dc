"""The plan: how every (layer, KV head, K or V) of one model is stored.

    Plan(model, tokens, layers = (LayerPlan(k, v), ...))      SidePlan(codec, heads={h: codec})

Fitted arrays are kept apart, in a dict. Their names follow one rule:

    every head has the side's codec     layers.{i}.{k|v}.{array}             [K, *shape]
    some heads override it              layers.{i}.{k|v}.heads.{h}.{array}   [*shape], each head
    heads are joined                    layers.{i}.joint.{array}             `cache.composed.shapes`
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from turboq.cache import accounting, composed
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.codecs.base import Codec
from turboq.plan.errors import PlanConflict, PlanError, member, shown
from turboq.plan.geometry import (
    MAX_HEADS,
    ROPE_FORMS,
    LayerGeometry,
    ModelGeometry,
    RopeForm,
    check_range,
    rope_block,
)
from turboq.plan.provenance import Provenance, Quality, check_sha256
from turboq.plan.read import Extra, build, read_codec, read_heads
from turboq.version import __version__

SCHEMA_VERSION = 1
SIDES: tuple[Literal["k", "v"], ...] = ("k", "v")
TENSOR_TYPES = ("float32", "int8", "int32")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,100}\.safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Producer:
    """The program that wrote the plan."""

    name: str = "turboq"
    version: str = __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class SidePlan:
    """K or V of one layer: the codec of every head, except those that `heads` overrides.

    `rope` says whether keys are stored "after" their rotary embedding, as attention consumes them,
    or turned when encoded and turned again when read: back to "before" it, or relative to the first
    position of their "block:P" of tokens. It holds for all heads of the side; the document has it
    only where it is not "after".
    """

    codec: Codec
    heads: dict[int, Codec] = dataclasses.field(default_factory=dict[int, Codec])
    rope: RopeForm = "after"

    def __post_init__(self):
        if self.rope not in ROPE_FORMS:
            raise ValueError(f"rope={self.rope!r} must be one of {ROPE_FORMS}")
        for head, codec in self.heads.items():
            check_range("heads", head, 0, MAX_HEADS - 1)
            if codec == self.codec:
                raise PlanConflict(f"heads.{head}", "repeats the codec of the side: leave it out")

    @classmethod
    def read_json(cls, value: Any, path: str, extra: Extra) -> SidePlan:
        """Reads the codec's flat fields, `rope` and `heads` from one object."""
        codec = read_codec(value, path, extra, also=("rope", "heads"))
        rope = value.get("rope", "after")
        if "rope" in value and rope not in ROPE_FORMS[1:]:
            allowed = ", ".join(ROPE_FORMS[1:])
            raise PlanError(
                member(path, "rope"), f"{shown(rope)} must be {allowed}, or be left out (after)"
            )
        where = member(path, "heads")
        heads = read_heads(value["heads"], where, extra) if "heads" in value else {}
        return build(cls, {"codec": codec, "heads": heads, "rope": rope}, path)

    def of(self, head: int) -> Codec:
        """Codec of one head."""
        return self.heads.get(head, self.codec)

    @property
    def stacked(self) -> bool:
        """All heads share one codec, so their arrays are stored with a leading head axis."""
        return not self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that owns a cache.

    `joint`: keys (not as they are after RoPE) and values of so many neighbouring KV heads are one
    vector, and what `k` and `v` say is of its units (`turboq.cache.joint`). None: of the heads' own
    keys and values.
    """

    index: int
    path: str
    k: SidePlan
    v: SidePlan
    joint: int | None = dataclasses.field(default=None, metadata={"optional": True})

    def __post_init__(self):
        if self.joint is not None:
            check_range("joint", self.joint, 1, MAX_HEADS)

    def side(self, name: str) -> SidePlan:
        return self.k if name == "k" else self.v


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Type and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.dtype not in TENSOR_TYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(TENSOR_TYPES)}")
        if any(n < 0 for n in self.shape):
            raise ValueError(f"shape={self.shape} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """The side file, by name in the plan's own folder, with its bytes, hash and tensors."""

    file: str
    size: int
    sha256: str
    tensors: dict[str, TensorSpec]

    def __post_init__(self):
        if not _FILE.fullmatch(self.file):
            raise ValueError(
                f"file={self.file[:80]!r} must be a plain name ending in .safetensors, "
                "in the folder of the plan"
            )
        if self.size < 0:
            raise ValueError(f"size={self.size} must be zero or more bytes")
        check_sha256(self.sha256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """The price of one more quantized token (`cache.accounting`), for readers without codecs."""

    layer_bits_per_token: tuple[int, ...]
    bits_per_token: int
    bytes_per_token: float
    bits_per_channel: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How every (layer, KV head, K or V) is stored; fitted arrays are kept apart, by name.

    `extra` keeps `x-` fields of the document: JSON path -> its fields. `load` and `save` are its
    files, `uniform_plan`, `head_plan` and `turboq_calibrate.plan_within` make one.

    Raises:
      PlanConflict: layers that are not those of the model which own a cache, in order.

    Examples:
      >>> import turboq
      >>> sizes = dict(kv_heads=2, q_heads=4, k_dim=64, v_dim=64)
      >>> layers = tuple(turboq.LayerGeometry(index=i, path=f"l{i}", **sizes) for i in range(2))
      >>> geometry = turboq.ModelGeometry(
      ...     fingerprint="mine-1", family="mine", name="two layers", layers=layers
      ... )
      >>> codec = turboq.TurboQuantMSE(dim=64, bits=3)
      >>> plan = turboq.uniform_plan(geometry, k=codec, v=codec)
      >>> plan.bits_per_channel(), plan.bytes.bytes_per_token  # of one more token
      (3.25, 208.0)
      >>> plan.residency(1024).total < plan.residency(1024).baseline  # all in memory, bytes
      True
      >>> [layer.kv_heads for layer in plan.kv_layers({})]
      [2, 2]
    """

    model: ModelGeometry
    tokens: TokenPolicy
    layers: tuple[LayerPlan, ...]
    schema_version: int = SCHEMA_VERSION
    producer: Producer = dataclasses.field(default_factory=Producer)
    arrays: ArrayFile | None = None
    provenance: Provenance | None = None
    quality: Quality | None = None
    extra: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict[str, dict[str, Any]])

    def __post_init__(self):
        owners = self.model.cache_layers
        for i, layer in enumerate(self.layers):
            if i >= len(owners) or layer.index != owners[i].index:
                due = f"layer {owners[i].index} is due" if i < len(owners) else "no more are due"
                raise PlanConflict(
                    f"layers[{i}].index",
                    f"{layer.index}, but {due} (every layer that owns a cache, in order, once)",
                )
            if layer.path != owners[i].path:
                raise PlanConflict(f"layers[{i}].path", f"the model has {owners[i].path!r} there")
            joined = layer.joint is not None
            for side in SIDES:
                _check_side(f"layers[{i}].{side}", layer.side(side), owners[i], side, joined)
            if joined:
                _check_joint(f"layers[{i}].joint", layer, owners[i])
        if len(self.layers) < len(owners):
            missing = owners[len(self.layers)].index
            raise PlanConflict("layers", f"layer {missing} owns a cache and is not listed")

    def position(self, index: int) -> int:
        """Where layer `index` of the model stands in `layers`.

        Raises:
          PlanError: that layer owns no cache.
        """
        for position, layer in enumerate(self.layers):
            if layer.index == index:
                return position
        raise PlanError("", f"layer {index} of {self.model.name} owns no cache and has no plan")

    def codecs(self, index: int, side: str) -> tuple[Codec, ...]:
        """Codec of every KV head of one layer and side."""
        chosen = self.layers[self.position(index)].side(side)
        return tuple(chosen.of(h) for h in range(self.model.layers[index].kv_heads))

    def kv_layer(self, index: int, arrays: Mapping[str, Any]) -> KVLayer:
        """Layer `index` ready for `cache.contiguous`: heads grouped by codecs, arrays gathered.

        Raises:
          PlanError: that layer owns no cache, or an array is missing.
        """
        k, v = self.codecs(index, "k"), self.codecs(index, "v")
        plan = self.layers[self.position(index)]
        if plan.joint is not None:
            k, v = (tuple(composed.held(codec) for codec in side) for side in (k, v))
        groups = tuple(
            HeadGroup(
                heads=heads,
                k=k[heads[0]],
                v=v[heads[0]],
                k_arrays=_gather(arrays, index, "k", plan.k, heads, k[heads[0]]),
                v_arrays=_gather(arrays, index, "v", plan.v, heads, v[heads[0]]),
            )
            for heads in _groups(k, v)
        )
        of = self.model.layers[index]
        layer = KVLayer(
            groups=groups, policy=self.tokens, window=self.model.kept_window(index),
            latent=of.latent,
        )  # fmt: skip
        if plan.joint is not None:
            names = composed.shapes(k, v, plan.joint)
            own = {name: _find(arrays, array_name(index, "joint", name)) for name in names}
            own = {name: jnp.asarray(values) for name, values in own.items()}
            layer = dataclasses.replace(layer, joint_heads=plan.joint, joint=own)
        if plan.k.rope == "after":
            return layer
        return dataclasses.replace(layer, rope=of.rope, rope_block=rope_block(plan.k.rope))

    def kv_layers(self, arrays: Mapping[str, Any]) -> tuple[KVLayer, ...]:
        """Every layer that owns a cache, in order."""
        return tuple(self.kv_layer(layer.index, arrays) for layer in self.layers)

    @property
    def storage(self) -> tuple[KVLayer, ...]:
        """The layers without arrays: all that `turboq.cache.accounting` needs."""
        out: list[KVLayer] = []
        for layer in self.layers:
            k, v = self.codecs(layer.index, "k"), self.codecs(layer.index, "v")
            groups = tuple(
                HeadGroup(heads=heads, k=k[heads[0]], v=v[heads[0]], k_arrays={}, v_arrays={})
                for heads in _groups(k, v)
            )
            window = self.model.kept_window(layer.index)
            out.append(
                KVLayer(groups=groups, policy=self.tokens, window=window, joint_heads=layer.joint)
            )
        return tuple(out)

    @property
    def bytes(self) -> Bytes:
        """Recomputed from the codecs, never stored: a file that says otherwise is refused."""
        layers = self.storage
        bits = accounting.bits_per_token(layers)
        return Bytes(
            layer_bits_per_token=tuple(layer.bits_per_token for layer in layers),
            bits_per_token=bits,
            bytes_per_token=bits / 8,
            bits_per_channel=accounting.bits_per_channel(layers),
        )

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one more quantized token, all layers, codes and scales."""
        return self.bytes.bytes_per_token

    def bits_per_channel(self, context: int | None = None, batch: int = 1) -> float:
        """Stored bits over 2*K*D*L: of one more token, or all-in at a stated context."""
        if context is None:
            return self.bytes.bits_per_channel
        return self.residency(context, batch).bits_per_channel

    def residency(self, context: int, batch: int = 1) -> accounting.Residency:
        """Everything in memory for `batch` sequences of `context` tokens."""
        return accounting.residency(self.storage, context=context, batch=batch)

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Live cache buffers of all layers: the sum of `LayerCache.nbytes`."""
        return self.residency(context, batch).cache


def array_name(index: int, side: str, array: str, head: int | None = None) -> str:
    """Name of a fitted array, of the whole side or of one head (see the module's rule)."""
    return f"layers.{index}.{side}." + (array if head is None else f"heads.{head}.{array}")


def _check_side(
    path: str, side: SidePlan, geometry: LayerGeometry, name: str, joined: bool
) -> None:
    dim = geometry.k_dim if name == "k" else geometry.v_dim
    if side.rope != "after":
        _check_turned(f"{path}.rope", geometry, name, side, joined)
    if side.codec.dim != dim:
        raise PlanConflict(f"{path}.dim", f"{side.codec.dim}, but the model's {name}_dim is {dim}")
    for head, codec in side.heads.items():
        if head >= geometry.kv_heads:
            raise PlanConflict(
                f"{path}.heads.{head}", f"the layer has KV heads 0..{geometry.kv_heads - 1}"
            )
        if codec.dim != dim:
            raise PlanConflict(
                f"{path}.heads.{head}.dim", f"{codec.dim}, but the model's {name}_dim is {dim}"
            )
    if len(side.heads) == geometry.kv_heads:
        raise PlanConflict(f"{path}.heads", "every head is overridden, the side's codec is unused")


def _check_turned(
    path: str, geometry: LayerGeometry, name: str, side: SidePlan, joined: bool
) -> None:
    """Refuses turned keys where nothing is rotated, or where nobody knows how."""
    if name == "v":
        raise PlanConflict(path, "values have no rotary embedding: only keys may be turned")
    if not geometry.turns_keys:
        raise PlanConflict(path, f"layer {geometry.index} has no rotary embedding")
    if geometry.rope is None:
        due = f"model.layers[{geometry.index}].rope"
        raise PlanConflict(path, f"needs {due}, by which keys are turned back")
    if rope_block(side.rope) > 1 and not joined:  # joined heads have means of their own
        for codec in (side.codec, *side.heads.values()):
            if "mean" not in codec.array_shapes:
                raise PlanConflict(
                    path, f"{side.rope} turns each head's mean within its block, and {codec.name} "
                    "has none: take before or after, or a codec with a mean (transform, per_head)",
                )  # fmt: skip


def _check_joint(path: str, layer: LayerPlan, geometry: LayerGeometry) -> None:
    """Refuses joined keys and values that no cache could read."""
    if layer.joint is None or geometry.kv_heads % layer.joint:
        raise PlanConflict(path, f"{layer.joint} does not divide {geometry.kv_heads} KV heads")
    if geometry.turns_keys and layer.k.rope == "after":
        raise PlanConflict(
            path, 'keys are joined with values before RoPE or relative to blocks ("block:64"), '
            'but k.rope is "after"',
        )  # fmt: skip
    for side in SIDES:
        plan = layer.side(side)
        for codec in (plan.codec, *plan.heads.values()):
            if codec.block != 1:
                raise PlanConflict(
                    path, f"codec {codec.name} stores blocks of {codec.block} tokens; units are "
                    "stored token by token",
                )  # fmt: skip


def _groups(k: tuple[Codec, ...], v: tuple[Codec, ...]) -> list[tuple[int, ...]]:
    """Heads with equal codecs of both sides, in order of their first head."""
    groups: dict[tuple[Codec, Codec], list[int]] = {}
    for head, pair in enumerate(zip(k, v, strict=True)):
        groups.setdefault(pair, []).append(head)
    return [tuple(heads) for heads in groups.values()]


def _find(arrays: Mapping[str, Any], name: str) -> Any:
    if name not in arrays:
        raise PlanError(name, "fitted array is missing: calibrate, or load the plan's arrays")
    return arrays[name]


def _gather(
    arrays: Mapping[str, Any], index: int, side: str, plan: SidePlan, heads: tuple[int, ...],
    codec: Codec,
) -> dict[str, Any]:  # fmt: skip
    def get(array: str, head: int | None = None) -> Any:
        return np.asarray(_find(arrays, array_name(index, side, array, head)))

    out: dict[str, Any] = {}
    for array in codec.array_shapes:
        if plan.stacked:
            values = get(array)[list(heads)]
        else:
            values = np.stack([get(array, h) for h in heads])
        out[array] = jnp.asarray(values, jnp.float32)
    return out
