"""Models: geometry, weights and tokenizer from files, and the one decoder that runs them."""

from turboq_calibrate.models.decoder import (
    Attend,
    Params,
    default_positions,
    exact_attend,
    project_qkv,
    run_embed,
    run_head,
    run_layer,
)
from turboq_calibrate.models.model import Model, embed_tokens, forward, load_model
from turboq_calibrate.models.spec import LayerSpec, ModelSpec, Rope
from turboq_calibrate.models.tokenizer import Tokenizer

__all__ = [
    "Attend",
    "LayerSpec",
    "Model",
    "ModelSpec",
    "Params",
    "Rope",
    "Tokenizer",
    "default_positions",
    "embed_tokens",
    "exact_attend",
    "forward",
    "load_model",
    "project_qkv",
    "run_embed",
    "run_head",
    "run_layer",
]
