"""What the checks measure on: Gaussian vectors, their decoded twins, errors and their noise."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from turboq.conformance.adapters import Adapter

QUERIES = 256


@dataclasses.dataclass(frozen=True)
class Sample:
    """An adapter at work on n Gaussian vectors N(0, I), of which any rotation is as likely."""

    adapter: Adapter
    vectors: int

    @functools.cached_property
    def x(self) -> np.ndarray:
        rng = np.random.default_rng(20260422)
        return rng.standard_normal((self.vectors, self.adapter.dim)).astype(np.float32)

    @functools.cached_property
    def codes(self) -> Any:
        return self.adapter.quantize(self.x)

    @functools.cached_property
    def x_hat(self) -> np.ndarray:
        """Decoded vectors, float64."""
        decoded = np.asarray(self.adapter.dequantize(self.codes), np.float64)
        if decoded.shape != self.x.shape:
            raise ValueError(f"dequantize gave {decoded.shape=}, not {self.x.shape}")
        return decoded

    @functools.cached_property
    def error(self) -> tuple[float, float]:
        """(E|x - x_hat|^2 / E|x|^2, its standard error)."""
        return ratio(squared(self.x - self.x_hat), squared(self.x))

    def round_trip(self, x: np.ndarray) -> np.ndarray:
        """Decoded twin of other vectors [n, D], float64."""
        with np.errstate(all="ignore"):  # peers overflow in public; the checks look at the result
            return np.asarray(self.adapter.dequantize(self.adapter.quantize(x)), np.float64)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """Estimates of <x_i, x_j> for the first 256 vectors i as queries, float64 [256, n]."""
        q = self.x[:QUERIES]
        own = getattr(self.adapter, "inner_product", None)
        if own is None:
            return q.astype(np.float64) @ self.x_hat.T
        return np.asarray(own(q, self.codes), np.float64)


def squared(x: np.ndarray) -> np.ndarray:
    """|x|^2 per vector, float64."""
    return np.sum(np.asarray(x, np.float64) ** 2, axis=-1)


def ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    """(mean(top) / mean(bottom), standard error) of paired samples, by the delta method."""
    value = float(np.mean(top) / np.mean(bottom))
    noise = np.std(top - value * bottom) / np.sqrt(top.size) / np.mean(bottom)
    return value, float(noise)
