"""Writes plan.json and plan.safetensors: how every layer and KV head of a model is stored.

--codec=per_head fits mean, codebook and scale of every (layer, KV head) to --statistics (from
`turboq calibrate`). Data-free codecs (turboquant_mse, turboquant_prod, exact) need no statistics.
"""

from __future__ import annotations

from absl import flags

from turboq_calibrate.cli import common

REQUIRED = ("out",)
RESUME = "an earlier plan is intact, run the same command again"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    flags.DEFINE_string(
        "statistics", None, "Folder written by `turboq calibrate`, of the same model.",
        flag_values=values,
    )  # fmt: skip
    common.codec(values, "per_head")
    common.policy(values)
    common.out(values, "Folder for plan.json and plan.safetensors.")


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq.plan import save, summary
    from turboq_calibrate.models import load_model
    from turboq_calibrate.plans import make_plan, model_geometry
    from turboq_calibrate.statistics_files import load_statistics

    statistics = load_statistics(values.statistics) if values.statistics else None
    geometry = model_geometry(load_model(values.model, resident=False))
    owners = geometry.cache_layers
    with common.as_user_error():
        plan, arrays = make_plan(
            geometry,
            k=common.codec_of(values, "k", owners[0].k_dim),
            v=common.codec_of(values, "v", owners[0].v_dim),
            policy=common.policy_of(values),
            statistics=statistics,
        )
    saved = save(plan, arrays, values.out)
    print(summary(saved))
    print(f"{values.out}/plan.json")
