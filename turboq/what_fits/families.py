"""What a model family decides about its cache where a `config.json` does not say it.

`families.json` has one row per family; adding one is adding a row. A family without a row is read
from its file alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

_PART = re.compile(r"_(encoder|vision_model|audio_model|vqgan)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of `families.json`.

    Args:
      sizes: layers, hidden size and query heads that a nested text_config may leave out.
      defaults: other fields that transformers fills in where they are absent (not where null).
      multi_head: absent or null KV heads mean as many as query heads.
      one_head: the switch that makes all query heads share one KV head.
      latent: a layer keeps one vector per token (`kv_lora_rank` + `qk_rope_head_dim` numbers).
      caches_per_layer: attention modules of one counted layer.
      layers: which layers keep what, where no list says so (`turboq.what_fits.hf_kinds`).
      own: fields of the cache that only some families use, and this one does.
      state: rule of `turboq.what_fits.states` for the layers without a cache.
      ignored: fields that do not matter to this family's cache.
    """

    model_type: str
    also: tuple[str, ...] = ()
    sizes: tuple[int, int, int] | None = None
    multi_head: bool = False
    one_head: str | None = None
    latent: bool = False
    caches_per_layer: int = 1
    layers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: tuple[str, ...] = ()
    state: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def filled(self, nested: bool) -> dict[str, Any]:
        """Fields that a file of this family may leave out."""
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        own = dict(zip(sizes, self.sizes, strict=True)) if nested and self.sizes else {}
        return own | dict(self.defaults)


@functools.cache
def _file() -> dict[str, Any]:
    folder = importlib.resources.files("turboq.what_fits")
    return json.loads((folder / "families.json").read_text(encoding="utf-8"))


@functools.cache
def _rows() -> dict[str, Family]:
    """Every row by each of its names."""
    out = {}
    for row in _file()["families"]:
        lists = {k: tuple(row[k]) for k in ("also", "sizes", "own", "ignored") if k in row}
        family = Family(**{**row, **lists})
        out.update(dict.fromkeys((family.model_type, *family.also), family))
    return out


def names() -> tuple[str, ...]:
    """Families that have a row, without their other names."""
    return tuple(dict.fromkeys(family.model_type for family in _rows().values()))


def latent_names() -> tuple[str, ...]:
    """Families that keep one vector per token, with their other names."""
    return tuple(name for name, family in _rows().items() if family.latent)


def is_known(model_type: str) -> bool:
    return model_type in _rows()


def family(model_type: str) -> Family:
    """The row of `model_type`; an empty one if it has none."""
    return _rows().get(model_type) or Family(model_type=model_type)


def is_encoder(model_type: str) -> bool:
    """Whether it is one, or a part of a model that sees or hears."""
    return model_type in _file()["encoders"] or _PART.search(model_type) is not None


def is_encoder_decoder(model_type: str) -> bool:
    return model_type in _file()["encoder_decoders"]
