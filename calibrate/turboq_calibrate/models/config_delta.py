"""Gated delta-net layers among layers of attention, from a `config.json`."""

from __future__ import annotations

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader
from turboq_calibrate.models.config_windows import FULL
from turboq_calibrate.models.spec import DeltaNet

LINEAR = "linear_attention"
INTERVAL = "full_attention_interval"


def read_delta(read: Reader, layers: int) -> list[DeltaNet | None]:
    """The delta-net of every layer, None where there is attention: as `layer_types` says, or in
    all but every `full_attention_interval`-th layer (default: 4th).

    Raises:
      TurboqError: a missing or nonsensical number, kinds of layers that are not known, or a field
        that asks for another layer than there is.
    """
    one = DeltaNet(
        key_heads=read.integer("linear_num_key_heads", 16),
        value_heads=read.integer("linear_num_value_heads", 32),
        key_dim=read.integer("linear_key_head_dim", 128),
        value_dim=read.integer("linear_value_head_dim", 128),
        kernel=read.integer("linear_conv_kernel_dim", 4),
    )
    if one.value_heads % one.key_heads:
        raise TurboqError(
            f"{read.where}: linear_num_value_heads={one.value_heads} must be a multiple of "
            f"linear_num_key_heads={one.key_heads}"
        )
    if read.config.get("hidden_act", "silu") != "silu":
        raise TurboqError(
            f"{read.where}: hidden_act={quoted(read.config['hidden_act'])} must be silu"
        )
    if not read.boolean("attn_output_gate", True):
        raise TurboqError(f"{read.where}: attn_output_gate=False is not supported")
    for key, off in (("sliding_window", None), ("use_sliding_window", False)):
        if read.config.get(key) not in (None, off):
            raise TurboqError(f"{read.where}: {key}={quoted(read.config[key])} is not supported")
    return [one if linear else None for linear in _linear(read, layers)]


def _linear(read: Reader, layers: int) -> list[bool]:
    types, interval = read.config.get("layer_types"), read.integer(INTERVAL, 4)
    regular = [(i + 1) % interval != 0 for i in range(layers)]
    if types is None:
        return regular
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {
        FULL, LINEAR,
    }:  # fmt: skip
        raise TurboqError(
            f"{read.where}: layer_types must name one of {FULL}, {LINEAR} for each of the {layers} "
            "layers"
        )
    said = [kind == LINEAR for kind in types]
    if read.config.get(INTERVAL) is not None and said != regular:
        raise TurboqError(
            f"{read.where}: layer_types and {INTERVAL}={interval} differ: leave one of them out of "
            "a copy of the file"
        )
    return said
