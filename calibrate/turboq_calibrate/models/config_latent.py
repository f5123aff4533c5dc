"""Multi-head latent attention from a `config.json` (DeepSeek-V2 and V3, Kimi-K2)."""

from __future__ import annotations

import dataclasses
from typing import Any

from turboq.errors import TurboqError
from turboq_calibrate.models.config_fields import Reader
from turboq_calibrate.models.config_rope import Rotation, Turn
from turboq_calibrate.models.spec import Latent

ROTATED = "qk_rope_head_dim"
EPS = 1e-6  # of latent norms, whatever the file says of others


def latent_fields(read: Reader, turn: Turn) -> dict[str, Any]:
    """Fields of a `LayerSpec` that latent attention has otherwise.

    Raises:
      TurboqError: a missing or nonsensical number, or KV heads that are fewer than query heads.
    """
    heads = read.integer("num_attention_heads")
    if read.integer("num_key_value_heads", heads) != heads:
        raise TurboqError(
            f"{read.where}: num_key_value_heads={read.config['num_key_value_heads']} must be "
            f"num_attention_heads={heads}: all heads share one latent vector"
        )
    nope, rank = read.integer("qk_nope_head_dim"), read.config.get("q_lora_rank")
    return {
        "kv_heads": 1,
        "v_head_dim": read.integer("kv_lora_rank"),
        "softmax_scale": (nope + read.integer(ROTATED)) ** -0.5 * turn.all_dims**2,
        "latent": Latent(
            nope_dim=nope,
            value_dim=read.integer("v_head_dim"),
            query_rank=None if rank is None else read.integer("q_lora_rank"),
            norm_eps=EPS,
        ),
    }


def rotation_of(read: Reader, rotation: Rotation) -> Rotation:
    """How pairs lie: neighbours, unless `rope_interleave` says that they do not."""
    if read.boolean("rope_interleave", True):
        return rotation
    return dataclasses.replace(rotation, layout="half")
