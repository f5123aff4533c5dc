"""Mixtures of experts from a `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from turboq.errors import TurboqError, quoted
from turboq_calibrate.models.config_fields import Reader, contradiction
from turboq_calibrate.models.spec import Experts

COUNTS = ("num_experts", "num_local_experts")  # one field, by its old and its new name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a model type speaks of its experts."""

    width: str = "moe_intermediate_size"
    renormalised: bool | None = None  # None: as `norm_topk_prob` says
    shared: str | None = None  # the field that says how wide one is that every token passes
    shared_gate: bool = True
    optional: bool = False  # a count of 0: every layer has an MLP
    bias: bool = False  # of the router and of every expert
    some_layers: bool = False  # `decoder_sparse_step` and `mlp_only_layers` leave layers dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """DeepSeek's experts: chosen in the best groups, first layers dense, shared ones ungated."""

    scores: Literal["softmax", "sigmoid"]
    methods: tuple[str, ...]  # values of `topk_method` that are done; the first is the default


def read_experts(
    read: Reader, mixture: Mixture | Grouped | None, layers: int
) -> list[Experts | None]:
    """The experts of every layer, None where it has one MLP.

    Raises:
      TurboqError: a missing or nonsensical number, or two that contradict each other.
    """
    if mixture is None:
        return [None] * layers
    if isinstance(mixture, Grouped):
        first = read.count("first_k_dense_replace", 0)
        if read.integer("moe_layer_freq", 1) != 1:
            raise TurboqError(f"{read.where}: moe_layer_freq other than 1 is not supported")
        return [None if i < first else _grouped(read, mixture) for i in range(layers)]
    if mixture.optional and read.count(COUNTS[1], 0) == 0 and not read.config.get(COUNTS[0]):
        return [None] * layers
    counts = {read.integer(key) for key in COUNTS if read.config.get(key) is not None}
    if len(counts) > 1:
        said = " and ".join(f"{key}={read.config[key]}" for key in COUNTS)
        raise contradiction(read.where, said)
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
        shared=0 if mixture.shared is None else read.integer(mixture.shared),
        shared_gate=mixture.shared_gate,
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


def _grouped(read: Reader, how: Grouped) -> Experts:
    method = read.config.get("topk_method", how.methods[0])
    for key, value, known in (
        ("topk_method", method, how.methods),
        ("scoring_func", read.config.get("scoring_func", how.scores), (how.scores,)),
    ):
        if value not in known:
            raise TurboqError(
                f"{read.where}: {key}={quoted(value)} is not supported (supported: "
                f"{', '.join(known)})"
            )
    sigmoid = how.scores == "sigmoid"
    count, chosen = read.integer("n_routed_experts"), read.integer("num_experts_per_tok")
    groups, best = (read.integer(k, 1) for k in ("n_group", "topk_group"))
    if method == "greedy":
        groups = best = 1
    size, group_best = count // groups, 2 if sigmoid and groups > 1 else 1
    if count % groups or best > groups or chosen > best * size or size < group_best:
        raise TurboqError(
            f"{read.where}: {chosen} experts of {count} in {best} of {groups} groups "
            "(num_experts_per_tok, n_routed_experts, topk_group, n_group) do not go together"
        )
    renormalised = read.boolean("norm_topk_prob", sigmoid)
    if renormalised and not sigmoid:
        raise TurboqError(f"{read.where}: norm_topk_prob=True is not supported")
    inner = read.integer("moe_intermediate_size")
    return Experts(
        count=count, chosen=chosen, intermediate=inner, renormalised=renormalised,
        shared=inner * read.count("n_shared_experts", 0), shared_gate=False,
        scores=how.scores, correction=sigmoid, groups=groups, chosen_groups=best,
        group_best=group_best, scale=read.number("routed_scaling_factor", 1.0),
    )  # fmt: skip
