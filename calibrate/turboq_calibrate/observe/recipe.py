"""What is captured, and what identifies a capture: the recipe, hashes of inputs, their checks."""

from __future__ import annotations

import dataclasses
from typing import Any

from turboq.errors import TurboqError
from turboq.numbers.rotation import Rotation
from turboq_calibrate.models.model import Model
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe.texts import Windows

CENTERS = ("all", "pilot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`: a run of whole chunks. Shards share nothing but the model and text.

    Raises:
      ValueError: not 0 <= index < count.
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
class CaptureRecipe:
    """What is captured; every field can change the result, so all are part of a run's identity.

    rotation, seed: of the coordinates whose histograms are kept; codecs fitted from them must use
      the same.
    skip: first tokens of every window left out of the statistics. They are attention sinks, far
      from all other tokens, and plans keep them exact.
    windows_per_chunk: windows that pass through a layer at once.
    center: the mean and scale around which sweep 2 counts: of "all" windows, or of the first chunk
      of the whole text ("pilot"), which every shard of a divided capture can find for itself.
    """

    rotation: str = "hadamard"
    seed: int = 0
    skip: int = 4
    windows_per_chunk: int = 4
    center: str = "all"

    def __post_init__(self):
        if self.skip < 0:
            raise ValueError(f"{self.skip=} must be 0 or more tokens")
        if self.windows_per_chunk < 1:
            raise ValueError(f"{self.windows_per_chunk=} must be 1 or more windows")
        if self.center not in CENTERS:
            raise ValueError(f"{self.center=} must be one of {CENTERS}")
        Rotation(kind=self.rotation, dim=2, seed=self.seed)


def capture_inputs(
    model: Model, windows: Windows, recipe: CaptureRecipe, shard: Shard | None = None
) -> dict[str, Any]:
    """What identifies a capture: hashes of inputs only, never of anything computed."""
    count, length = windows.tokens.shape
    part = {} if shard is None else {"shard": dataclasses.asdict(shard)}
    return part | {
        "statistics_version": st.VERSION,
        "model": {
            "fingerprint": model.fingerprint,
            "family": model.spec.family,
            "name": model.spec.name,
            "dtype": model.dtype,
        },
        "text": {
            "source": windows.source,
            "sha256": windows.text_sha256,
            "tokens_sha256": windows.sha256,
            "windows": count,
            "window": length,
        },
        "recipe": dataclasses.asdict(recipe),
    }


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Fields in which two captures differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: there {old!r}, now {new!r}"]


def check_sizes(model: Model, windows: Windows, recipe: CaptureRecipe) -> None:
    """Raises TurboqError when the recipe cannot work on this model and text."""
    count, length = windows.tokens.shape
    if length <= recipe.skip:
        raise TurboqError(f"windows of {length} tokens leave none after skip={recipe.skip}")
    tokens = min(count, recipe.windows_per_chunk) * length
    for i, spec in enumerate(model.spec.layers):
        if not spec.owns_cache:
            raise TurboqError(
                f"layer {i} keeps no KV cache of its own: capture does not support it"
            )
        dim = max(spec.head_dim, spec.v_head_dim)
        if tokens * dim > st.CODE_BINS.values_per_chunk:
            raise TurboqError(
                f"a chunk of {tokens} tokens with head dim {dim} is over the limit of "
                f"{st.CODE_BINS.values_per_chunk // dim} tokens: lower windows_per_chunk"
            )
    high = int(windows.tokens.max())
    if int(windows.tokens.min()) < 0 or high >= model.spec.vocab:
        raise TurboqError(f"token {high} is outside the model's vocabulary of {model.spec.vocab}")
