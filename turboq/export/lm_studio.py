"""LM Studio: load settings of one model, one type for K and one for V."""

from __future__ import annotations

from turboq.export.base import Projection, json_file
from turboq.export.llama_cpp import Chosen, Uniform
from turboq.plan import Plan


class LMStudio(Uniform):
    """`llamaKCacheQuantizationType`, `llamaVCacheQuantizationType` of the SDK's load config."""

    name = "lmstudio"
    title = "LM Studio"
    versions = "SDKs with llamaKCacheQuantizationType; runtimes built after 2026-04-01 rotate"
    checked = (
        "lmstudio.js by source (LLMLlamaCacheQuantizationType.ts), November 2026, version not "
        "recorded"
    )
    types = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

    def finish(self, plan: Plan, chosen: Chosen) -> Projection:
        config = {
            "flashAttention": True,
            "llamaKCacheQuantizationType": chosen.k,
            "llamaVCacheQuantizationType": chosen.v,
        }
        return Projection(
            held=chosen.held,
            files={"lmstudio_load_config.json": json_file(config)},
            flags=("client.llm.load(MODEL, { config: <lmstudio_load_config.json> })",),
            notes=(
                "In the app: model settings, K and V Cache Quantization Type. The `lms` command"
                " and the REST load call do not take them.",
            ),
        )
