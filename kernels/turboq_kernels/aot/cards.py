"""NVIDIA cards that programs are compiled for ahead of time: what XLA must know of them.

Public figures of one card of every target, by a name that JAX knows. `h100.txtpb` is that of sm_90
and the pattern of the others, whose numbers take the place of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re

from jax.sharding import AbstractDevice

KIB, GB = 1024, 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Multiprocessors; bytes of shared memory of a program and of a multiprocessor; its threads."""

    name: str
    processors: int
    shared: tuple[int, int] = (227 * KIB, 228 * KIB)
    threads: int = 2048
    cache: int
    memory: int
    bandwidth: int
    accelerated: bool = True  # has instructions of its own generation only, as sm_90a


CARDS = {
    "sm_80": Card(
        name="NVIDIA A100-SXM4-80GB", processors=108, shared=(163 * KIB, 164 * KIB),
        cache=40 * KIB**2, memory=80 * GB, bandwidth=2039 * GB, accelerated=False,
    ),
    "sm_89": Card(
        name="NVIDIA L40", processors=142, shared=(99 * KIB, 100 * KIB), threads=1536,
        cache=96 * KIB**2, memory=48 * GB, bandwidth=864 * GB, accelerated=False,
    ),
    "sm_90": Card(
        name="NVIDIA H100 80GB HBM3", processors=132,
        cache=50 * KIB**2, memory=80 * KIB**3, bandwidth=3352 * GB,
    ),
    "sm_100": Card(
        name="NVIDIA B200", processors=148,
        cache=126 * KIB**2, memory=180 * GB, bandwidth=8000 * GB,
    ),
    "sm_120": Card(
        name="NVIDIA RTX PRO 6000", processors=188, shared=(99 * KIB, 100 * KIB), threads=1536,
        cache=128 * KIB**2, memory=96 * GB, bandwidth=1792 * GB,
    ),
}  # fmt: skip


def card_of(target: str) -> Card:
    """Of `CARDS`.

    Raises:
      ValueError: it has none.
    """
    if target not in CARDS:
        raise ValueError(f"{target=} must be one of {tuple(CARDS)}")
    return CARDS[target]


def device(target: str) -> AbstractDevice:
    """The card that programs are traced for."""
    card = card_of(target)
    kind = f"{card.name} ({target})"
    return AbstractDevice(device_kind=kind, num_cores=card.processors, platform="gpu")


def config(target: str) -> str:
    """What XLA's compiler is told, a text proto."""
    card, number = card_of(target), int(target.removeprefix("sm_"))
    text = (importlib.resources.files("turboq_kernels.aot") / "h100.txtpb").read_text()
    feature = " feature_extension: ACCELERATED_FEATURES" if card.accelerated else ""
    values = {
        "cuda_compute_capability": f"{{ major: {number // 10} minor: {number % 10}{feature} }}",
        "core_count": card.processors,
        "threads_per_core_limit": card.threads,
        "shared_memory_per_block_optin": card.shared[0],
        "shared_memory_per_core": card.shared[1],
        "l2_cache_size": card.cache,
        "device_memory_size": card.memory,
        "memory_bandwidth": card.bandwidth,
    }
    for name, value in values.items():
        text, found = re.subn(rf"\b{name}(:?) .*", rf"{name}\g<1> {value}", text)
        assert found == 1, name
    return text.replace(CARDS["sm_90"].name, card.name)
