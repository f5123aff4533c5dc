"""Exports of plans to engines that run them: one file per engine, one registry.

report = export(plan, arrays, engine("vllm"), "out")
engine("vllm").constraints(plan.model)     what a plan may be made of to export exactly
"""

from __future__ import annotations

import difflib

from turboq.errors import TurboqError, quoted
from turboq.export.base import Exporter as Exporter
from turboq.export.base import Held as Held
from turboq.export.base import Options as Options
from turboq.export.base import Projection as Projection
from turboq.export.buun import Buun
from turboq.export.flags_jax import MaxText, TpuInference
from turboq.export.hf_transformers import Transformers
from turboq.export.ik_llama import IkLlama
from turboq.export.kvtuner import KVTuner
from turboq.export.llama_cpp import LlamaCpp
from turboq.export.lm_studio import LMStudio
from turboq.export.mlx_lm import MlxLm
from turboq.export.modelopt import ModelOpt
from turboq.export.ollama import Ollama
from turboq.export.ort_genai import OrtGenAI
from turboq.export.qwix_arrays import Qwix
from turboq.export.reader import Reader
from turboq.export.report import ExportReport as ExportReport
from turboq.export.report import HeadReport as HeadReport
from turboq.export.report import LayerReport as LayerReport
from turboq.export.report import summary as summary
from turboq.export.sglang import SGLang
from turboq.export.turboquant_fork import TurboquantFork
from turboq.export.vllm import VLLM
from turboq.export.write import export as export
from turboq.registry import Registry

export_plan = export  # its name in `turboq`, where `export` is this package


def _check(found: object) -> Exporter:
    found = found() if isinstance(found, type) else found
    if not isinstance(found, Exporter):
        raise TurboqError(f"{quoted(found)} must be a turboq.export.Exporter")
    return found


ENGINES: Registry[Exporter] = Registry(
    "turboq.engines",
    (
        OrtGenAI(),
        VLLM(),
        LlamaCpp(),
        IkLlama(),
        TurboquantFork(),
        Buun(),
        Ollama(),
        LMStudio(),
        SGLang(),
        ModelOpt(),
        KVTuner(),
        Transformers(),
        MlxLm(),
        Qwix(),
        MaxText(),
        TpuInference(),
        Reader(),
    ),
    _check,
)


def engine(name: str) -> Exporter:
    """The exporter of an engine.

    Raises:
      TurboqError: unknown engine; names the nearest.
    """
    if name in ENGINES:
        return ENGINES[name]
    if outside := ENGINES.missing(name):
        raise TurboqError(f"unknown engine: {outside}")
    near = difflib.get_close_matches(name, ENGINES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise TurboqError(f"unknown engine {name!r}: {hint}engines are {', '.join(ENGINES)}")
