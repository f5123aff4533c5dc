"""What an implementation must offer to be checked, and how one is found by name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from turboq.errors import TurboqError
from turboq.numbers.scale import RULES

SKETCHES = ("gaussian_sketch", "orthogonal_sketch")
CLAIMED_RULES = (*RULES, *SKETCHES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """What the implementation says of itself; every check tests one of these.

    bits_per_channel: every stored bit of a vector (codes, norms, scales) over D.
    scale_rule: which closed form the error must have (None: no closed form): raw (TurboQuant_mse),
      matched ("norm correction"), unbiased (EDEN), least_squares, or TurboQuant_prod with a
      gaussian_sketch or orthogonal_sketch, whose codebook has one bit less than `bits`.
    unbiased: E<q, x_hat> = <q, x>.
    error: relative squared error on Gaussian vectors where it is known otherwise.
    direction_free: the error does not depend on the direction of x (there is a random rotation).
    scale_free: nor on its norm (False for static scales).
    nan_visible: a NaN is refused or shows in what is decoded.

    Raises:
      ValueError: bits_per_channel not positive, or unknown scale_rule.
    """

    bits_per_channel: float
    scale_rule: str | None = None
    unbiased: bool = False
    error: float | None = None
    direction_free: bool = True
    scale_free: bool = True
    nan_visible: bool = True

    def __post_init__(self):
        if not self.bits_per_channel > 0:
            raise ValueError(f"{self.bits_per_channel=} must be above 0")
        if self.scale_rule is not None and self.scale_rule not in CLAIMED_RULES:
            raise ValueError(f"{self.scale_rule=} must be None or one of {CLAIMED_RULES}")


@runtime_checkable
class Adapter(Protocol):
    """One implementation at one setting; made as `Class(dim=D, bits=b)`, or `Class()` if fixed.

    quantize: float32 x [n, D] -> any object that holds what is stored and nothing else. n is a
      multiple of 256; the vectors are successive tokens of one head.
    dequantize: that object -> float32 x_hat [n, D].
    nbytes: bytes that it stores for the object. Live arrays inside are counted beside this.

    Optional: `inner_product(q [t, D], codes) -> [t, n]`, where it is not q @ x_hat.T, and
    `codebook`, the centroids at unit variance (for coordinates of a vector of norm sqrt(D)).
    """

    dim: int
    bits: int
    claims: Claims

    def quantize(self, x: np.ndarray) -> Any: ...

    def dequantize(self, codes: Any) -> np.ndarray: ...

    def nbytes(self, codes: Any) -> int: ...


def codebook_bits(adapter: Adapter) -> int:
    """Bits of the scalar codebook: a sketch takes one of the stored bits."""
    return adapter.bits - (adapter.claims.scale_rule in SKETCHES)


def load(spec: str, dims: Sequence[int], bits: Sequence[int]) -> dict[str, Adapter]:
    """Adapters of `module:Class`, one per dim and bits (one in all if the class takes no choices).

    Raises:
      TurboqError: the module or class is not there, or cannot be made; the message says which.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise TurboqError(f"--adapter={spec!r} must be module:Class")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TurboqError(f"--adapter={spec!r}: {error}") from error
    if not inspect.signature(cls).parameters:
        return {name: _complete(spec, cls())}
    try:
        return {
            f"{name} D={d} b={b}": _complete(spec, cls(dim=d, bits=b)) for d in dims for b in bits
        }
    except TypeError as error:
        raise TurboqError(f"--adapter={spec!r} is made as Class(dim=D, bits=b): {error}") from error


def _complete(spec: str, adapter: Any) -> Adapter:
    """The adapter, if it has all that the protocol asks for; claims may be a mapping."""
    needed = ("dim", "bits", "claims", "quantize", "dequantize", "nbytes")
    missing = [name for name in needed if not hasattr(adapter, name)]
    if missing:
        raise TurboqError(f"--adapter={spec!r} lacks {', '.join(missing)}")
    if isinstance(adapter.claims, Mapping):
        adapter.claims = Claims(**adapter.claims)
    return adapter
