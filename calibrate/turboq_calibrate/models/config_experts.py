"""Mixtures of experts from a `config.json`."""

from __future__ import annotations

import dataclasses

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader
from turboq_calibrate.models.spec import Experts

COUNTS = ("num_experts", "num_local_experts")  # one field, by its old and its new name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a model type speaks of its experts."""

    width: str = "moe_intermediate_size"
    renormalised: bool | None = None  # None: as `norm_topk_prob` says
    shared: bool = False
    bias: bool = False  # of the router and of every expert
    some_layers: bool = False  # `decoder_sparse_step` and `mlp_only_layers` leave layers dense


def read_experts(read: Reader, mixture: Mixture | None, layers: int) -> list[Experts | None]:
    """The experts of every layer, None where it has one MLP.

    Raises:
      TurboqError: a missing or nonsensical number, or two that contradict each other.
    """
    if mixture is None:
        return [None] * layers
    counts = {read.integer(key) for key in COUNTS if read.config.get(key) is not None}
    if len(counts) > 1:
        raise TurboqError(f"{read.where}: {' and '.join(COUNTS)} differ: leave one of them out")
    count = counts.pop() if counts else read.integer(COUNTS[0])
    chosen = read.integer("num_experts_per_tok")
    if chosen > count:
        raise TurboqError(f"{read.where}: num_experts_per_tok={chosen} of {count} experts")
    renormalised = mixture.renormalised
    if renormalised is None:
        renormalised = read.boolean("norm_topk_prob", False)
    elif read.boolean("norm_topk_prob", renormalised) != renormalised:
        raise TurboqError(f"{read.where}: norm_topk_prob={not renormalised} is not supported")
    one = Experts(
        count=count,
        chosen=chosen,
        intermediate=read.integer(mixture.width),
        renormalised=renormalised,
        shared=read.integer("shared_expert_intermediate_size") if mixture.shared else 0,
        bias=mixture.bias,
    )
    if not mixture.some_layers:
        if read.config.get("mlp_only_layers"):
            raise TurboqError(f"{read.where}: mlp_only_layers is not supported")
        if read.integer("decoder_sparse_step", 1) != 1:
            raise TurboqError(f"{read.where}: decoder_sparse_step other than 1 is not supported")
        return [one] * layers
    step, dense = read.integer("decoder_sparse_step", 1), read.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise TurboqError(f"{read.where}: mlp_only_layers={quoted(dense)} must be a list of layers")
    return [None if i in dense or (i + 1) % step else one for i in range(layers)]
