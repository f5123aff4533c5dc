"""Bits that engines store per vector, scales included: names of `--cache-type-k` and the like.

Block scales are what most published tables leave out: llama.cpp's q8_0 is 8.5 bits per number, not
8, and q4_0 is 4.5. A vector of D numbers takes

    bits D + block_bits D / block + vector_bits

Formats of vLLM that lay K and V of a head into one slot have a rule of their own (`slot`).
Sources: ggml-common.h (block_q8_0 34 bytes per 32 numbers, ...); vLLM 0.33 kv_cache_interface and
turboquant config; mlx-lm QuantizedKVCache (16-bit scale and bias per group of 64).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable

from turboq.errors import TurboqError

HeadBits = Callable[[int, int], int]  # (k_dim, v_dim) -> stored bits of one KV head's token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """How one vector is stored; `slot` = (K bits, V bits) of a vLLM TurboQuant preset."""

    bits: int = 0
    block: int = 1
    block_bits: int = 0
    vector_bits: int = 0
    slot: tuple[int, int] | None = None


F16 = Plain(bits=16)
FORMATS: dict[str, Plain] = {
    "f32": Plain(bits=32),
    "f16": F16,
    "bf16": F16,
    # llama.cpp: blocks of 32 with a float16 scale, "_1" with a float16 minimum besides.
    "q8_0": Plain(bits=8, block=32, block_bits=16),
    "q5_1": Plain(bits=5, block=32, block_bits=32),
    "q5_0": Plain(bits=5, block=32, block_bits=16),
    "q4_1": Plain(bits=4, block=32, block_bits=32),
    "q4_0": Plain(bits=4, block=32, block_bits=16),
    "iq4_nl": Plain(bits=4, block=32, block_bits=16),
    # Static scales, which are not stored per token: vLLM, TensorRT-LLM, ONNX Runtime.
    "fp8": Plain(bits=8),
    "int8": Plain(bits=8),
    "int4": Plain(bits=4),
    # vLLM: a float32 scale per token and head (int4: with the zero point in its low bits).
    "fp8_per_token_head": Plain(bits=8, vector_bits=32),
    "int8_per_token_head": Plain(bits=8, vector_bits=32),
    "int4_per_token_head": Plain(bits=4, vector_bits=32),
    "nvfp4": Plain(bits=4, block=16, block_bits=8),
    # vLLM's presets keep EDGE first and last layers of a model without recurrent layers in 16 bits.
    "turboquant_k8v4": Plain(slot=(8, 4)),
    "turboquant_4bit_nc": Plain(slot=(4, 4)),
    "turboquant_k3v4_nc": Plain(slot=(3, 4)),
    "turboquant_3bit_nc": Plain(slot=(3, 3)),
    # mlx-lm: group 64 with 16-bit scale and bias.
    "mlx_q8": Plain(bits=8, block=64, block_bits=32),
    "mlx_q4": Plain(bits=4, block=64, block_bits=32),
}
EDGE = 2
ALIASES = {
    "fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "half": "f16",
    "bfloat16": "bf16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8",
}  # fmt: skip
# From least to most damage, by stored bits; iq4_nl before q4_0 as its KL was lower in
# experiments/results/formats.json. What `choose` takes where no order is given.
QUALITY_ORDER = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0")


def plain_name(name: str) -> str | None:
    """The name in `FORMATS` that `name` means, or None."""
    name = name.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    return name if name in FORMATS else None


def head_bits(k: str, v: str) -> HeadBits:
    """Bits per token of one KV head with K stored as format `k` and V as `v`.

    With `v_dim` 0 (a latent vector) there is no V. vLLM's presets are a pair: K codes and (below 8
    bits) a float16 norm, V codes with float16 scale and minimum, in whole bytes, even in number.

    Raises:
      TurboqError: unknown format, a preset beside another format, or a dim of no whole blocks.
    """
    names = [known(name) for name in (k, v)]
    first, second = (FORMATS[name] for name in names)
    if first.slot or second.slot:
        if names[0] != names[1] or first.slot is None:
            raise TurboqError(f"{names[0]} for K and {names[1]} for V: a vLLM preset stores both")
        return _slot_bits(names[0], first.slot)
    k, v = names
    return lambda k_dim, v_dim: _vector_bits(k, k_dim) + (_vector_bits(v, v_dim) if v_dim else 0)


def known(name: str) -> str:
    """`plain_name`, or a TurboqError with the nearest names."""
    found = plain_name(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), [*FORMATS, *ALIASES], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(FORMATS)}"
        raise TurboqError(f"unknown cache format {name!r} ({hint})")
    return found


def _vector_bits(name: str, dim: int) -> int:
    """Stored bits of one vector of `dim` numbers."""
    form = FORMATS[name]
    if dim % form.block:
        raise TurboqError(
            f"{name}: a head of {dim} numbers is not whole blocks of {form.block}: name a type "
            "without blocks, such as f16"
        )
    return form.bits * dim + form.block_bits * (dim // form.block) + form.vector_bits


def _slot_bits(name: str, bits: tuple[int, int]) -> HeadBits:
    def of(k_dim: int, v_dim: int) -> int:
        if not v_dim:
            raise TurboqError(f"{name} has no slot for a latent vector")
        k_bytes = math.ceil(bits[0] * k_dim / 8) + (2 if bits[0] < 8 else 0)
        slot = k_bytes + math.ceil(bits[1] * v_dim / 8) + 4
        return 8 * (slot + slot % 2)

    return of
