"""The reservoir: a sample of tokens, the same for all layers, with what each layer made of them.

Kept are the `count` tokens with the smallest 64-bit number, drawn per token by Philox from the key
(seed, window) at the token's position. Windows are known before a run, so the set is too: one run,
its shards and any number of processes keep the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors import numpy as st_numpy

from turboq.errors import TurboqError, shortened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Window and position of the tokens that are kept, in reading order."""

    window: Int[np.ndarray, "N"]
    position: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.window)

    def of(self, start: int, stop: int) -> slice:
        """The members in windows [start, stop)."""
        first, last = np.searchsorted(self.window, [start, stop])
        return slice(int(first), int(last))

    def take(self, which: slice) -> Members:
        return Members(window=self.window[which], position=self.position[which])


def choose(windows: int, length: int, *, count: int, skip: int, seed: int) -> Members:
    """`count` tokens (all, if there are fewer) of `windows` windows, first `skip` of each left out.

    Host memory: a few times `count`.
    """
    drawn = np.zeros((0,), np.uint64)
    window = position = np.zeros((0,), np.int32)
    places = np.arange(skip, length, dtype=np.int32)
    for n in range(windows if count else 0):
        key = np.random.Philox(key=np.array([seed, n], np.uint64))
        drawn = np.concatenate([drawn, key.random_raw(length)[skip:]])
        window = np.concatenate([window, np.full(len(places), n, np.int32)])
        position = np.concatenate([position, places])
        if len(drawn) > 2 * count + length or n + 1 == windows:
            best = np.lexsort((position, window, drawn))[:count]
            drawn, window, position = drawn[best], window[best], position[best]
    order = np.lexsort((position, window))
    return Members(window=window[order], position=position[order])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The sampled tokens of one layer: keys and their gradients before the rotary embedding."""

    k: Float[np.ndarray, "N K D"]
    v: Float[np.ndarray, "N K E"]
    g_k: Float[np.ndarray, "N K D"]
    g_v: Float[np.ndarray, "N K E"]
    window: Int[np.ndarray, "N"]
    position: Int[np.ndarray, "N"]
    text: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.window)

    @classmethod
    def from_rows(
        cls,
        rows: Float[np.ndarray, "N R"],
        members: Members,
        text: Int[np.ndarray, "N"],
        k: tuple[int, int],
        v: tuple[int, int],
    ) -> Tokens:
        """From rows (k, v, g_k, g_v) as `passes.reverse` makes them; k, v: heads and dims."""
        shapes = {"k": k, "v": v, "g_k": k, "g_v": v}
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        parts = np.split(rows, ends[:-1], axis=1)
        arrays = {
            name: part.reshape(len(rows), *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return cls(**arrays, window=members.window, position=members.position, text=text)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return st_numpy.save({n: np.ascontiguousarray(x) for n, x in vars(self).items()})

    @classmethod
    def from_bytes(
        cls, raw: bytes, source: Path, *, k: tuple[int, int], v: tuple[int, int]
    ) -> Tokens:
        """Inverse of `to_bytes`; k, v: heads and dims.

        Raises:
          TurboqError: not a safetensors file, or not of these tensors.
        """
        try:
            tensors = st_numpy.load(raw)
        except (SafetensorError, ValueError) as error:
            raise TurboqError(f"token file {source} is damaged: {shortened(error)}") from error
        wanted = {f.name for f in dataclasses.fields(cls)}
        if tensors.keys() != wanted:
            raise TurboqError(f"token file {source} holds {sorted(tensors)}, not {sorted(wanted)}")
        count = tensors["window"].shape[:1]
        shapes = {"k": (*count, *k), "v": (*count, *v), "g_k": (*count, *k), "g_v": (*count, *v)}
        for name, x in sorted(tensors.items()):
            kind = np.float32 if name in shapes else np.int32
            if x.dtype != kind or x.shape != shapes.get(name, count):
                raise TurboqError(f"token file {source}: {name} is {x.dtype}{list(x.shape)}")
        return cls(**tensors)


def join(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of all shards, in reading order."""
    window, position = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("window", "position")
    )
    order = np.lexsort((position, window))
    names = (f.name for f in dataclasses.fields(Tokens))
    return Tokens(**{n: np.concatenate([getattr(p, n) for p in parts])[order] for n in names})
