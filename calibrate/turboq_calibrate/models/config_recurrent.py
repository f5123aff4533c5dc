"""Layers that keep a state of fixed size among layers of attention, from a `config.json`."""

from __future__ import annotations

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader, contradiction
from turboq_calibrate.models.config_windows import FULL
from turboq_calibrate.models.spec import DeltaNet, Mamba

LINEAR = "linear_attention"
INTERVAL = "full_attention_interval"
INFINITY = {"__float__": "Infinity"}
OLD_NAMES = {"attention": FULL, "mamba": LINEAR}  # of Granite's layers before transformers 5


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
    _multiple(
        read, "linear_num_value_heads", one.value_heads, "linear_num_key_heads", one.key_heads
    )
    _silu(read)
    if not read.boolean("attn_output_gate", True):
        raise TurboqError(f"{read.where}: attn_output_gate=False is not supported")
    for key, off in (("sliding_window", None), ("use_sliding_window", False)):
        if read.config.get(key) not in (None, off):
            raise TurboqError(f"{read.where}: {key}={quoted(read.config[key])} is not supported")
    interval = read.integer(INTERVAL, 4)
    regular = [(i + 1) % interval != 0 for i in range(layers)]
    said = _listed(read, layers, "layer_types")
    if said is not None and read.config.get(INTERVAL) is not None and said != regular:
        raise contradiction(read.where, f"layer_types and {INTERVAL}={interval}", "layer_types")
    return [one if linear else None for linear in (regular if said is None else said)]


def read_mamba(read: Reader, layers: int) -> list[Mamba | None]:
    """The Mamba-2 mixer of every layer, None where there is attention, as `layer_types` says.

    Raises:
      TurboqError: a missing or nonsensical number, or kinds of layers that are not known.
    """
    found = [_listed(read, layers, key) for key in ("layer_types", "layers_block_type")]
    said = [kinds for kinds in found if kinds is not None]
    if not said:
        raise TurboqError(f"{read.where}: layer_types and layers_block_type are missing")
    if said[0] != said[-1]:
        raise contradiction(read.where, "layer_types and layers_block_type", "layers_block_type")
    if not any(said[0]):
        return [None] * layers
    inner = read.integer("mamba_expand", 2) * read.integer("hidden_size")
    heads, groups = read.integer("mamba_n_heads", 128), read.integer("mamba_n_groups", 1)
    _multiple(read, "mamba_expand * hidden_size", inner, "mamba_n_heads", heads)
    _multiple(read, "mamba_n_heads", heads, "mamba_n_groups", groups)
    dim = read.config.get("mamba_d_head", "auto")
    if dim != "auto" and read.integer("mamba_d_head") != inner // heads:
        raise TurboqError(
            f"{read.where}: mamba_d_head={quoted(dim)} must be {inner // heads}, mamba_expand * "
            "hidden_size / mamba_n_heads"
        )
    _silu(read)
    one = Mamba(
        heads=heads,
        head_dim=inner // heads,
        groups=groups,
        state_dim=read.integer("mamba_d_state", 256),
        kernel=read.integer("mamba_d_conv", 4),
        conv_bias=read.boolean("mamba_conv_bias", True),
        bias=read.boolean("mamba_proj_bias", False),
        step_limits=_limits(read),
    )
    return [one if linear else None for linear in said[0]]


def _limits(read: Reader) -> tuple[float, float]:
    """Least and largest step; infinity as transformers writes it, or as json does."""
    given = read.config.get("time_step_limit")
    if given is None:
        return 0.0, float("inf")
    limits = [float("inf") if x == INFINITY else x for x in given] if type(given) is list else []
    numbers = len(limits) == 2
    if not numbers or not all(type(x) in (int, float) for x in limits) or not (
        0 <= limits[0] <= limits[1]
    ):  # fmt: skip
        raise TurboqError(
            f"{read.where}: time_step_limit={quoted(given)} must be two numbers, 0 or more, the "
            "lower first"
        )
    return float(limits[0]), float(limits[1])


def _multiple(read: Reader, key: str, value: int, other: str, divisor: int) -> None:
    if value % divisor:
        raise TurboqError(f"{read.where}: {key}={value} must be a multiple of {other}={divisor}")


def _silu(read: Reader) -> None:
    if read.config.get("hidden_act", "silu") != "silu":
        raise TurboqError(
            f"{read.where}: hidden_act={quoted(read.config['hidden_act'])} must be silu"
        )


def _listed(read: Reader, layers: int, key: str) -> list[bool] | None:
    """Which layers keep a state, as the list `key` says; None where there is none."""
    types = read.config.get(key)
    if types is None:
        return None
    names = types if isinstance(types, list) else []
    kinds = [OLD_NAMES.get(str(name), str(name)) for name in names]
    if len(kinds) != layers or not set(kinds) <= {FULL, LINEAR}:
        raise TurboqError(
            f"{read.where}: {key} must name one of {FULL}, {LINEAR} for each of the {layers} layers"
        )
    return [kind == LINEAR for kind in kinds]
