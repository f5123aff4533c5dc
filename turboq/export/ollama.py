"""Ollama: one type for the whole server, by environment variable."""

from __future__ import annotations

from turboq.export.base import Projection
from turboq.export.llama_cpp import ROTATES, Chosen, Uniform
from turboq.plan import Plan


class Ollama(Uniform):
    """`OLLAMA_KV_CACHE_TYPE`, K and V alike, counted as the llama.cpp that it is built on."""

    name = "ollama"
    title = "Ollama"
    versions = "0.5 and later (OLLAMA_KV_CACHE_TYPE)"
    checked = "documentation and issue threads, November 2026, version not recorded"
    types = ("f16", "q8_0", "q4_0")
    same_types = True

    def finish(self, plan: Plan, chosen: Chosen) -> Projection:
        env = {"OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_KV_CACHE_TYPE": chosen.k}
        return Projection(
            held=chosen.held,
            flags=(" ".join([*(f"{k}={v}" for k, v in env.items()), "ollama serve"]),),
            env=env,
            notes=(
                "The setting holds for every model of the server.",
                *([ROTATES] if chosen.quantized else []),
            ),
        )
