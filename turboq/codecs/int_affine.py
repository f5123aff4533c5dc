"""Rotation and plain asymmetric integers per token: the INT4/INT3/INT2 baselines."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from turboq.codecs.affine import TokenAffine


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntAffine(TokenAffine):
    """y = R x, then the asymmetric integers of `turboq.codecs.affine`, `bits` bits each.

    SAW-INT4 is bits=4 with a block-diagonal Hadamard (`rotation_block`), QuaRot's KV cache is a
    Hadamard over the head and `group` channels per scale. What their texts leave open and is chosen
    here: random signs before the Hadamard by default ("walsh" is the unsigned one), float16 scale
    and minimum, no clipping, codes nearest for the *stored* scale.

    All-in bits per channel at D = 64, 128, 256 with group 0: bits + 0.5, 0.25, 0.125; with a group
    of g channels bits + 32 / g. Dynamic. Kernels read it with one group (`reading`): q . y_hat
    is an integer product, one scale and one sum of q; with several groups only XLA does.
    """

    name: ClassVar[str] = "int_affine"
    source: ClassVar[str] = "SAW-INT4 (arXiv 2604.19157), QuaRot (arXiv 2404.00456)"

    rotation: str = "hadamard"
