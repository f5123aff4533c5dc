"""What is observed, and what identifies a run: the recipe, hashes of inputs, their checks."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.model import Model
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.texts import Windows

SEED_LIMIT = 2**32  # what jax's random keys take in one word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`: a run of whole chunks. Shards share nothing but the model and text.

    Raises:
      ValueError: not 0 <= index < count.

    Examples:
      >>> from turboq_calibrate import Shard
      >>> [Shard(index=i, count=3).index for i in range(3)]
      [0, 1, 2]
    """

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count} must be 0/N to (N - 1)/N")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n".

        Raises:
          TurboqError: anything else.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise TurboqError(f"shard {text!r} must be i/n with 0 <= i < n, for example 0/4")
        return cls(index=int(index), count=int(count))

    def of(self, chunks: int) -> range:
        """Chunks [i C / n, (i + 1) C / n) of C.

        Raises:
          TurboqError: fewer chunks than shards.
        """
        if chunks < self.count:
            raise TurboqError(
                f"{self.count} shards of a text of {chunks} chunks: use at most {chunks} shards, "
                "fewer windows per chunk or more windows"
            )
        return range(self.index * chunks // self.count, (self.index + 1) * chunks // self.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObserveRecipe:
    """What is observed; every field can change the result, so all are part of a run's identity.

    seed: of the drawn labels and of the reservoir.
    skip: first tokens of every window left out of the statistics. They are attention sinks, far
      from all other tokens, and plans keep them exact.
    windows_per_chunk: windows that pass through a layer at once.
    reservoir: sampled tokens that are kept with their keys, values and gradients; 0 keeps none.
    """

    seed: int = 0
    skip: int = 4
    windows_per_chunk: int = 4
    reservoir: int = 8192

    def __post_init__(self):
        if not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"{self.seed=} must be 0 or more and below {SEED_LIMIT}")
        if self.skip < 0:
            raise ValueError(f"{self.skip=} must be 0 or more tokens")
        if self.windows_per_chunk < 1:
            raise ValueError(f"{self.windows_per_chunk=} must be 1 or more windows")
        if self.reservoir < 0:
            raise ValueError(f"{self.reservoir=} must be 0 or more tokens")


def identity(model: Model) -> dict[str, str]:
    """What a run keeps of its model."""
    return {
        "fingerprint": model.fingerprint,
        "family": model.spec.family,
        "name": model.spec.name,
        "dtype": model.dtype,
    }


def observe_inputs(
    model: dict[str, str], windows: Windows, recipe: ObserveRecipe, shard: Shard | None = None
) -> dict[str, Any]:
    """What identifies a run: hashes of inputs only, never of anything computed.

    `model` as `identity` has it.
    """
    count, length = windows.tokens.shape
    per_text = np.bincount(windows.text, minlength=len(windows.texts)).tolist()
    weights = [{"weight": float(w)} for w in windows.weights] or [{}] * len(per_text)
    part = {} if shard is None else {"shard": dataclasses.asdict(shard)}
    return part | {
        "statistics_version": st.VERSION,
        "model": model,
        "text": {
            "texts": [
                {"name": text.name, "sha256": text.sha256, "windows": n} | weight
                for text, n, weight in zip(windows.texts, per_text, weights, strict=True)
            ],
            "bos": windows.bos,
            "held_back_sha256": windows.held_back.sha256,
            "tokens_sha256": windows.sha256,
            "windows": count,
            "window": length,
        },
        "recipe": dataclasses.asdict(recipe),
    }


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields in which two runs differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        there, now = cast(dict[str, Any], old), cast(dict[str, Any], new)
        return [
            line
            for key in sorted(there.keys() | now.keys())
            for line in differences(there.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list):
        first, second = cast(list[Any], old), cast(list[Any], new)
        if len(first) != len(second):
            return [f"{path}: there {quoted(first)}, now {quoted(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: there {quoted(cast(Any, old))}, now {quoted(new)}"]


def check_sizes(model: Model, windows: Windows, recipe: ObserveRecipe) -> None:
    """Raises TurboqError when the recipe cannot work on this model and text."""
    length = windows.tokens.shape[1]
    model.spec.check_length(length, "windows")
    for held in (*windows.held_back.short.values(), *windows.held_back.long.values()):
        model.spec.check_length(held.shape[1], "windows held back")
    if length <= recipe.skip:
        raise TurboqError(f"windows of {length} tokens leave none after skip={recipe.skip}")
    low, high = int(windows.tokens.min()), int(windows.tokens.max())
    if low < 0 or high >= model.spec.vocab:
        raise TurboqError(
            f"token {low if low < 0 else high} is outside the model's vocabulary of "
            f"{model.spec.vocab}"
        )
