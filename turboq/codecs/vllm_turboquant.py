"""vLLM's TurboQuant presets, key and value codec apart, by the exact rule of its store kernel.

    preset               K                              V                 bytes of a slot at D=128
    turboquant_k8v4      e4m3, no scale, no rotation    4 bits uniform    196
    turboquant_4bit_nc   4 bits Lloyd-Max               4 bits uniform    134
    turboquant_k3v4_nc   3 bits Lloyd-Max               4 bits uniform    118
    turboquant_3bit_nc   3 bits Lloyd-Max               3 bits uniform    102

A slot holds one token of one KV head, [K | V], rounded up to an even number of bytes. Nothing is
calibrated. `nc`: keys are renormalised when read. On dense models vLLM keeps the first two and last
two layers in the model's own type (`boundary_layers`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.bitstream import as_bytes, check_width, from_bytes, pack_bits, unpack_bits
from turboq.codecs.fp8 import FP8
from turboq.codecs.minifloat import divide
from turboq.codecs.reading import Part, Reading
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers.codebook import lookup, materialized

PRESETS = {  # name: (bits of K, bits of V)
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
MIN_VALUE_SCALE = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLLMTurboQuantKey(TransformedCodec):
    """n = |x|, y = H x / (n + 1e-8), c = number of midpoints <= y, x_hat = n H^T v(c) / |v(c)|.

    H is Sylvester's Hadamard matrix over sqrt(D), without signs; v are `centroids(D, bits)`; n is
    stored as float16. bits*D/8 + 2 bytes: at 4 bits 4.25, 4.125, 4.0625 and at 3 bits 3.25, 3.125,
    3.0625 bits per channel at D = 64, 128, 256. Dynamic. Kernels read it through `dequantize`.
    vLLM needs a power-of-two D; other D take H (x) C of `turboq.numbers.rotation`.

    Raises:
      ValueError: bits not 3 or 4.
    """

    name: ClassVar[str] = "vllm_turboquant_key"
    source: ClassVar[str] = "vLLM turboquant_*_nc keys (vLLM 0.33)"
    rotation: ClassVar[str] = "walsh"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    bits: int

    def __post_init__(self):
        super().__post_init__()
        _check_bits(self.bits)

    @property
    def fields(self) -> tuple[Field, ...]:
        return (_codes(self), _half("norm"))

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return super().tables | {"codebook": centroids(self.dim, self.bits)}

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        x = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        y = self.forward(arrays, divide(x, norm + jnp.float32(1e-8)))
        return self.quantize(arrays, y) | {"norm": norm.astype(jnp.float16)}

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        table = centroids(self.dim, self.bits)
        codes = jnp.zeros(y.shape, jnp.uint8)
        for middle in (table[:-1] + table[1:]) / np.float32(2):
            codes += (y >= middle).astype(jnp.uint8)
        return {"codes": materialized(codes)}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = lookup(jnp.asarray(centroids(self.dim, self.bits)), stored["codes"])
        power = jnp.sum(values * values, axis=-1, keepdims=True)
        factor = stored["norm"].astype(jnp.float32) / jnp.sqrt(power + jnp.float32(1e-16))
        return values * factor

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., bits*D/8 + 2]: packed codes, float16 norm."""
        return _join(self, stored, ("norm",))

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        return _split(self, stream, ("norm",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLLMTurboQuantValue(TransformedCodec):
    """x_hat = s' c + m', c = clip(int((x - m) / s + 0.5), 0, 2**bits - 1), uniform, unrotated.

    m = min x and s = max((max x - m) / (2**bits - 1), 1e-8); m' and s' are their float16, in which
    alone they are stored: codes come from the unrounded ones. bits*D/8 + 4 bytes: at 4 bits 4.5,
    4.25, 4.125 and at 3 bits 3.5, 3.25, 3.125 bits per channel at D = 64, 128, 256. Dynamic.
    Kernels read it through `dequantize`.

    Raises:
      ValueError: bits not 3 or 4.
    """

    name: ClassVar[str] = "vllm_turboquant_value"
    source: ClassVar[str] = "vLLM turboquant_* values (vLLM 0.33)"
    rotation: ClassVar[str] = "identity"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    bits: int

    def __post_init__(self):
        super().__post_init__()
        _check_bits(self.bits)

    @property
    def fields(self) -> tuple[Field, ...]:
        return (_codes(self), _half("scale"), _half("minimum"))

    @property
    def reading(self) -> Reading | None:
        part = Part(
            field="codes", width=self.dim, bits=self.bits, levels="affine",
            scale="scale", offset="minimum",
        )  # fmt: skip
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        return (jnp.ones((1,), jnp.float32),)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        top = 2**self.bits - 1
        low = jnp.min(y, axis=-1, keepdims=True)
        # XLA's minimum on a CPU drops NaN in long reductions; it must show.
        low = jnp.where(jnp.any(jnp.isnan(y), axis=-1, keepdims=True), jnp.nan, low)
        scale = divide(jnp.max(y, axis=-1, keepdims=True) - low, jnp.float32(top))
        scale = jnp.where(scale > MIN_VALUE_SCALE, scale, jnp.float32(MIN_VALUE_SCALE))
        steps = jnp.floor(divide(y - low, scale) + 0.5)  # never negative: floor cuts
        return {
            "codes": materialized(jnp.clip(steps, 0, top).astype(jnp.uint8)),
            "scale": scale.astype(jnp.float16),
            "minimum": low.astype(jnp.float16),
        }

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        scale, low = (stored[name].astype(jnp.float32) for name in ("scale", "minimum"))
        return stored["codes"].astype(jnp.float32) * scale + low

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., bits*D/8 + 4]: packed codes, float16 scale, float16 minimum."""
        return _join(self, stored, ("scale", "minimum"))

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        return _split(self, stream, ("scale", "minimum"))


def preset(name: str, dim: int) -> tuple[FP8 | VLLMTurboQuantKey, VLLMTurboQuantValue]:
    """(K codec, V codec) of a preset for heads of `dim` channels.

    Raises:
      ValueError: unknown preset, or dim that the codecs refuse.
    """
    k_bits, v_bits = _bits_of(name)
    v = VLLMTurboQuantValue(dim=dim, bits=v_bits)
    if k_bits == 8:
        return FP8(dim=dim, format="e4m3", scale="none"), v
    return VLLMTurboQuantKey(dim=dim, bits=k_bits), v


def slot_bytes(name: str, dim: int) -> int:
    """Bytes of one slot, K and V of one token and KV head, rounded up to an even number."""
    k_bits, v_bits = _bits_of(name)
    k = math.ceil(dim * k_bits / 8) + (0 if k_bits == 8 else 2)
    size = k + math.ceil(dim * v_bits / 8) + 4
    return size + size % 2


def slot_to_bytes(name: str, dim: int, k: Stored, v: Stored) -> np.ndarray:
    """Slots [K | V] uint8 [..., slot_bytes(name, dim)] of stored keys and values."""
    k_codec, v_codec = preset(name, dim)
    both = np.concatenate([k_codec.to_bytes(k), v_codec.to_bytes(v)], axis=-1)
    pad = slot_bytes(name, dim) - both.shape[-1]
    return np.pad(both, [(0, 0)] * (both.ndim - 1) + [(0, pad)])


def slot_from_bytes(name: str, dim: int, slots: np.ndarray) -> tuple[Stored, Stored]:
    """The inverse of `slot_to_bytes`."""
    check_width(slots, slot_bytes(name, dim))
    k_codec, v_codec = preset(name, dim)
    middle = k_codec.bits_per_vector // 8
    end = middle + v_codec.bits_per_vector // 8
    return k_codec.from_bytes(slots[..., :middle]), v_codec.from_bytes(slots[..., middle:end])


def boundary_layers(layers: int, count: int = 2) -> list[int]:
    """Layers that the presets leave unquantized on a dense model: the first and last `count`.

    At most half of the layers from either end. Models that mix attention with other layers have
    none in vLLM.
    """
    if layers < 0 or count < 0:
        raise ValueError(f"{layers=} and {count=} must be zero or more")
    count = min(count, layers // 2)
    return [*range(count), *range(layers - count, layers)]


@functools.lru_cache(maxsize=32)
def centroids(dim: int, bits: int) -> np.ndarray:
    """vLLM's Lloyd-Max levels for N(0, 1/dim), float32 [2**bits], ascending.

    Iterated at most 200 times from a uniform grid on +-3.5 sigma until no level moves 1e-10; cell
    means by the trapezoid rule on 200 intervals, the outer cells ending at +-10.5 sigma: the levels
    are off the true ones by up to 7e-4 relative, which costs no error that could be measured.
    """
    levels = 2**bits
    sigma = 1 / math.sqrt(dim)
    edge = 3.5 * sigma
    c = -edge + 2 * edge * (np.arange(levels) + 0.5) / levels
    weights = np.ones(201)
    weights[[0, -1]] = 0.5
    for _ in range(200):
        edges = np.concatenate([[-3 * edge], (c[:-1] + c[1:]) / 2, [3 * edge]])
        x = edges[:-1, None] + np.diff(edges)[:, None] / 200 * np.arange(201)[None, :]
        mass = weights[None, :] * np.exp(-0.5 * dim * x * x)
        new = np.sum(x * mass, axis=1) / np.sum(mass, axis=1)
        if np.max(np.abs(new - c)) < 1e-10:
            break  # the levels before this step stay, as in the original
        c = new
    table = c.astype(np.float32)
    table.setflags(write=False)
    return table


def _bits_of(name: str) -> tuple[int, int]:
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _check_bits(bits: int) -> None:
    if type(bits) is not int or bits not in (3, 4):
        raise ValueError(f"{bits=} must be 3 or 4")


def _codes(codec: VLLMTurboQuantKey | VLLMTurboQuantValue) -> Field:
    return Field(name="codes", width=codec.dim, bits=codec.bits, dtype="codes")


def _half(name: str) -> Field:
    return Field(name=name, width=1, bits=16, dtype="float16")


def _join(codec, stored: Stored, halves: tuple[str, ...]) -> np.ndarray:
    parts = [pack_bits(np.asarray(stored["codes"]), codec.bits)]
    parts += [as_bytes(np.asarray(stored[name]), "float16") for name in halves]
    return np.concatenate(parts, axis=-1)


def _split(codec, stream: np.ndarray, halves: tuple[str, ...]) -> Stored:
    check_width(stream, codec.bits_per_vector // 8)
    at = codec.dim * codec.bits // 8
    stored = {"codes": jnp.asarray(unpack_bits(stream[..., :at], codec.bits, codec.dim))}
    for name in halves:
        stored[name] = jnp.asarray(from_bytes(stream[..., at : at + 2], "float16"))
        at += 2
    return stored
