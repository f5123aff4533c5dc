"""Windows that calibration leaves out, so that a plan can be checked on them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldBack:
    """Of every text, by its number: windows of the calibrated length, and longer ones."""

    short: dict[int, Int[np.ndarray, "_ T"]] = dataclasses.field(default_factory=dict)
    long: dict[int, Int[np.ndarray, "_ L"]] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, as files keep them."""
        return {
            f"{kind}.{text}": windows.astype(np.int32)
            for kind, of in (("short", self.short), ("long", self.long))
            for text, windows in of.items()
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> HeldBack:
        """The inverse of `arrays`; other names are left alone."""
        out: dict[str, dict[int, np.ndarray]] = {"short": {}, "long": {}}
        for name in sorted(arrays):
            kind, _, text = name.partition(".")
            if kind in out and text.isdecimal():
                out[kind][int(text)] = arrays[name]
        return cls(**out)

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and tokens."""
        digest = hashlib.sha256()
        for name, windows in sorted(self.arrays().items()):
            digest.update(f"{name}{windows.shape}".encode() + windows.astype("<i4").tobytes())
        return digest.hexdigest()


def gaps(taken: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What half-open ranges leave of [0, end), the largest first."""
    free, at = [], 0
    for start, stop in sorted(taken):
        if start > at:
            free.append((at, start))
        at = max(at, stop)
    if end > at:
        free.append((at, end))
    return sorted(free, key=lambda gap: (gap[0] - gap[1], gap[0]))


def leave_out(
    ids: Int[np.ndarray, "n"],
    first: Sequence[int],
    *,
    length: int,
    windows: int,
    count: int,
    long_length: int,
) -> tuple[Int[np.ndarray, "m T"] | None, Int[np.ndarray, "1 L"] | None]:
    """`count` windows of `length` tokens and one of `long_length` (0: none) that lie between the
    `windows` evenly spaced ones of `texts.windows`, each in the middle of the largest gap.

    `first` is what every window begins with (BOS). None where no gap is large enough.
    """
    each = length - len(first)
    available = len(ids) // each
    starts = np.arange(windows) * available // windows * each
    taken = [(int(s), int(s) + each) for s in starts]

    def take(size: int) -> np.ndarray | None:
        low, high = next(iter(gaps(taken, len(ids))), (0, 0))
        if high - low < size:
            return None
        start = low + (high - low - size) // 2
        taken.append((start, start + size))
        return np.concatenate([np.asarray(first, np.int32), ids[start : start + size]])

    long = take(long_length - len(first)) if long_length else None
    short = [take(each) for _ in range(count)]
    kept = [window for window in short if window is not None]
    return np.stack(kept) if kept else None, None if long is None else long[None]
