"""What is captured, and what identifies a capture: the recipe, hashes of inputs, their checks."""

from __future__ import annotations

import dataclasses
from typing import Any

from turboq.errors import TurboqError
from turboq.rotation import Rotation
from turboq_calibrate import statistics as st
from turboq_calibrate.data import Windows
from turboq_calibrate.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureRecipe:
    """What is captured; every field can change the result, so all are part of a run's identity.

    rotation, seed: of the coordinates whose histograms are kept; codecs fitted from them must use
      the same.
    skip: first tokens of every window left out of the statistics. They are attention sinks, far
      from all other tokens, and plans keep them exact.
    windows_per_chunk: windows that pass through a layer at once.
    """

    rotation: str = "hadamard"
    seed: int = 0
    skip: int = 4
    windows_per_chunk: int = 4

    def __post_init__(self):
        if self.skip < 0:
            raise ValueError(f"{self.skip=} must be 0 or more tokens")
        if self.windows_per_chunk < 1:
            raise ValueError(f"{self.windows_per_chunk=} must be 1 or more windows")
        Rotation(kind=self.rotation, dim=2, seed=self.seed)


def capture_inputs(model: Model, windows: Windows, recipe: CaptureRecipe) -> dict[str, Any]:
    """What identifies a capture: hashes of inputs only, never of anything computed."""
    count, length = windows.tokens.shape
    return {
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
