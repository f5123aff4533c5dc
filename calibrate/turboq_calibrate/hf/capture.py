"""What attention sees of a model that transformers runs, forwards and backwards, chunk by chunk.

Run by its path where torch and transformers are (Python 3.11 or newer); it imports nothing else of
turboq:

    turboq calibrate --model=MODEL --captured=FOLDER --out=OUT    writes FOLDER/request.safetensors
    python .../hf/capture.py --model=MODEL --folder=FOLDER        this
    turboq calibrate --model=MODEL --captured=FOLDER --out=OUT    the statistics

A function registered with transformers' attention *and* mask interfaces (a name that only the first
knows gets no causal mask, and no error) hands out queries, keys and values as they are attended to,
and keeps the gradients at keys and values of the log probability of one drawn token per position,
as `turboq_calibrate.observe.passes` does. It runs the model's own eager attention, and refuses a
model whose logits change with it. Of latent attention (`kv_lora_rank`) attention sees expanded
heads: latent vectors (as values) and their rotated parts (as keys) are taken where transformers
caches them, and of queries the part that meets the rotated one.

    FOLDER/chunk_000/layer_000.safetensors   q, k, v, g_k, g_v [B, T, heads, D], float32
    FOLDER/capture.json                      written last: the layers, and the request's hash
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.masking_utils import eager_mask

VERSION = 1
NAME = "turboq_capture"
REQUEST, CAPTURE = "request.safetensors", "capture.json"
SELF_TEST = 1e-5  # of the largest logit


class Refused(Exception):
    """One line for the user."""


def hook(seen: dict) -> None:
    """Registers the capturing attention; `seen` gets (module, q, k, v, window) by layer."""

    def capture(module, query, key, value, attention_mask, **kwargs):
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise Refused(f"{type(module).__name__} has no layer_idx: its layers cannot be told")
        for x in (key, value):
            if x.requires_grad:
                x.retain_grad()
        seen[index] = (module, query, key, value, kwargs.get("sliding_window"))
        own = sys.modules[type(module).__module__]
        return own.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, capture)
    AttentionMaskInterface.register(NAME, eager_mask)


class Latents(DynamicCache):
    """Hands through what a model caches, and keeps it by layer."""

    def __init__(self, config):
        super().__init__(config=config)
        self.kept: dict = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for x in (key_states, value_states):
            if x.requires_grad:
                x.retain_grad()
        self.kept[layer_idx] = key_states, value_states
        return key_states, value_states


def cached(model) -> dict[str, Any]:
    """Arguments with which a model of latent attention shows its latent vectors; no cache else."""
    config = model.config.get_text_config()
    if not getattr(config, "kv_lora_rank", None):
        return {"use_cache": False}
    return {"use_cache": True, "past_key_values": Latents(config)}


def to_latents(seen: dict, cache: Latents, config) -> None:
    """Puts what is cached of latent attention in the place of the expanded heads."""
    sizes = [config.kv_lora_rank, config.qk_rope_head_dim]
    for i, (module, query, _, _, window) in seen.items():
        latent, rotated = cache.kept.get(i, (query, query))
        if [x.shape[-1] for x in (latent, rotated)] != sizes or latent.shape[1] != 1:
            raise Refused(
                f"layer {i} does not cache one latent vector of kv_lora_rank={sizes[0]} and a "
                f"rotated part of qk_rope_head_dim={sizes[1]} per token: calibrate the folder "
                "without --captured if turboq runs its family"
            )
        seen[i] = (module, query[..., -sizes[1] :], rotated, latent, window)


def drawn(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One token per row of p [n, V] from u [n, 2] (`turboq_calibrate.observe.passes.labels`)."""
    run = math.isqrt(p.shape[1] - 1) + 1
    parts = torch.nn.functional.pad(p, (0, -p.shape[1] % run)).reshape(len(p), -1, run)
    first = inverse(parts.sum(2), u[:, 0])
    return first * run + inverse(parts[torch.arange(len(p)), first], u[:, 1])


def inverse(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The inverse of the cumulative distribution of each row."""
    below = torch.cumsum(weights, dim=1)
    return (below <= u[:, None] * below[:, -1:]).sum(dim=1)


def check_self(model, tokens: torch.Tensor) -> None:
    """Refuses a model that predicts otherwise through the hook than through eager attention."""
    logits = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            how = {"use_cache": False} if name == "eager" else cached(model)
            logits.append(model(input_ids=tokens, **how).logits.float())
    worst = float((logits[0] - logits[1]).abs().max())
    if not worst <= SELF_TEST * float(logits[0].abs().max()):
        raise Refused(
            f"logits differ by {worst:.2g} between eager attention and the hook: this model does "
            "not attend through transformers' attention interface alone"
        )


def pass_chunk(model, seen: dict, tokens: torch.Tensor, uniforms: torch.Tensor) -> None:
    """Fills `seen` and the gradients at its keys and values."""
    seen.clear()
    how = cached(model)
    logits = model(input_ids=tokens, **how).logits.float()
    flat = logits.reshape(-1, logits.shape[-1])
    label = drawn(torch.softmax(flat.detach(), dim=-1), uniforms.reshape(-1, 2))
    chosen = torch.log_softmax(flat, dim=-1).gather(1, label[:, None])
    chosen.sum().backward()
    if not seen:
        raise Refused("no layer attends through transformers' attention interface")
    if how["use_cache"]:
        to_latents(seen, how["past_key_values"], model.config.get_text_config())


def arrays_of(found: tuple) -> dict[str, torch.Tensor]:
    """What is written of one layer."""
    _, query, key, value, _ = found
    zero = torch.zeros_like
    of = {
        "q": query, "k": key, "v": value,
        "g_k": key.grad if key.grad is not None else zero(key),
        "g_v": value.grad if value.grad is not None else zero(value),
    }  # fmt: skip
    return {n: x.detach().float().transpose(1, 2).contiguous().cpu() for n, x in of.items()}


def describe(model, seen: dict, count: int) -> list[dict]:
    """The layers: heads, dims, windows, whose cache they read; zeros where there is none."""
    paths = {id(module): name for name, module in model.named_modules()}
    latent = cached(model)["use_cache"]
    layers, owners = [], {}
    for i in range(count):
        if i not in seen:
            layers.append({
                "index": i, "path": f"layers.{i}", "q_heads": 0, "kv_heads": 0, "k_dim": 0,
                "v_dim": 0, "window": None, "borrows_cache_of": None, "latent": False,
            })  # fmt: skip
            continue
        module, query, key, value, window = seen[i]
        owner = owners.setdefault(key.data_ptr(), i)
        layers.append({
            "index": i, "path": paths[id(module)], "q_heads": query.shape[1],
            "kv_heads": key.shape[1], "k_dim": key.shape[3], "v_dim": value.shape[3],
            "window": window, "borrows_cache_of": None if owner == i else owner,
            "latent": latent,
        })  # fmt: skip
    return layers


def capture(model_folder: str, folder: Path, device: str) -> int:
    """All chunks that are not there yet; how many there are."""
    request = folder / REQUEST
    if not request.is_file():
        raise Refused(f"{request} is missing: turboq calibrate --captured={folder} writes it")
    digest = hashlib.sha256(request.read_bytes()).hexdigest()
    with safe_open(request, framework="pt") as f:
        tokens, uniforms = f.get_tensor("tokens").long(), f.get_tensor("uniforms")
        size = int(f.metadata()["windows_per_chunk"])
    config = transformers.AutoConfig.from_pretrained(model_folder).get_text_config()
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.to(device)
    model.eval().requires_grad_(False)
    # Nothing is trained: gradients begin at the embeddings.
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: out.requires_grad_(torch.is_grad_enabled())
    )
    seen: dict = {}
    hook(seen)
    check_self(model, tokens[:1].to(device))
    starts = range(0, len(tokens), size)
    for c, start in enumerate(starts):
        target = folder / f"chunk_{c:03d}"
        # The first one is done again: it says what the layers are.
        if target.exists() and c:
            continue
        part = slice(start, start + size)
        pass_chunk(model, seen, tokens[part].to(device), uniforms[part].to(device))
        if c == 0:
            layers = describe(model, seen, config.num_hidden_layers)
        half = folder / f"chunk_{c:03d}.unfinished"
        for path in (half, target):
            shutil.rmtree(path, ignore_errors=True)
        half.mkdir()
        for i, found in seen.items():
            save_file(arrays_of(found), half / f"layer_{i:03d}.safetensors")
        os.replace(half, target)
        print(f"chunk {c + 1} of {len(starts)}", flush=True)
    record = {
        "version": VERSION, "request_sha256": digest, "family": config.model_type,
        "layers": layers, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    unfinished = folder / f"{CAPTURE}.unfinished"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, folder / CAPTURE)
    return len(starts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that transformers reads")
    parser.add_argument("--folder", required=True, type=Path, help="of --captured")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        chunks = capture(given.model, given.folder, given.device)
    except (Refused, OSError, ValueError) as error:
        print(f"capture: {given.model}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"captured {chunks} chunks in {given.folder}: run the turboq calibrate command again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
