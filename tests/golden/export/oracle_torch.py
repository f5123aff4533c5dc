"""ONNX Runtime GenAI, compressed-tensors and transformers with our cache, each really run.

python oracle_torch.py WORK        after prepare.py; writes WORK/{ort,vllm,hf}/result.json
"""

import hashlib
import importlib.metadata
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1]


def versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def ort(work: Path) -> dict:
    """Builds, runs and generates; compares the cached bytes of layer 0 with turboq's."""
    import onnxruntime
    import onnxruntime_genai

    prompt = np.load(work / "ort" / "prompt.npy").astype(np.int64)
    out = {"versions": versions("onnxruntime", "onnxruntime-genai", "onnx"), "schemes": {}}
    for bits in (8, 4):
        built = work / "ort" / f"model{bits}"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-m", str(work / "checkpoint"), "-o", str(built), "-p", "fp32", "-e", "cpu"]
        command += ["-c", str(work / "ort" / "cache"), "--extra_options"]
        scales = work / "ort" / f"int{bits}" / "kv_scales.json"
        command += [f"kv_cache_quant_scheme=int{bits}_per_channel", f"kv_cache_scale_file={scales}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        session = onnxruntime.InferenceSession(str(built / "model.onnx"))
        feed = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feed[value.name] = prompt
            elif value.name == "attention_mask":
                feed[value.name] = np.ones_like(prompt)
            elif value.name.startswith("past_key_values"):
                kind = {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8}[value.type]
                feed[value.name] = np.zeros((1, 2, 0, 32 * bits // 8), kind)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(prompt.shape[1])[None]
        names = [o.name for o in session.get_outputs()]
        found = dict(zip(names, session.run(names, feed), strict=True))
        expected = np.load(work / "ort" / f"int{bits}.npz")
        equal, total = 0, 0
        for side, name in (("k", "present.0.key"), ("v", "present.0.value")):
            for head in range(2):
                theirs = found[name][0, head].view(np.uint8)
                ours = expected[f"{side}{head}"]
                equal += int(np.sum(theirs == ours))
                total += ours.size
        model = onnxruntime_genai.Model(str(built))
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=prompt.shape[1] + 8)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(prompt.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        tokens = [int(t) for t in generator.get_sequence(0)][prompt.shape[1] :]
        first = found["present.0.key"][0, 0].view(np.uint8)
        out["schemes"][f"int{bits}_per_channel"] = {
            "bytes": total,
            "equal": equal,
            "cache_dtype": str(found["present.0.key"].dtype),
            "generated": tokens,
            "x": expected["k0_x"][:8].astype(float).tolist(),
            "codes": first[:8].tolist(),
            "channel_scale": json.loads(scales.read_text())["scales"]["k_scales"][0][:32],
        }
    return out


def compressed(work: Path) -> dict:
    """The overlay under compressed-tensors' schema, and the scales that a model then expects."""
    import safetensors.numpy
    import transformers
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    out = {"versions": versions("compressed-tensors", "transformers", "torch"), "strategies": {}}
    for name in ("tensor", "head"):
        folder = work / "vllm" / name
        config = json.loads((folder / "config.json").read_text())
        parsed = QuantizationConfig.model_validate(config["quantization_config"])
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig.from_dict(
                {k: v for k, v in config.items() if k != "quantization_config"}
            )
        )
        apply_quantization_config(model, parsed)
        wanted = {
            key: list(value.shape)
            for key, value in model.state_dict().items()
            if key.endswith(("k_scale", "v_scale"))
        }
        found = safetensors.numpy.load_file(folder / "kv_scales.safetensors")
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(index[key] == "kv_scales.safetensors" for key in found)
        assert parsed.kv_cache_scheme is not None
        strategy = parsed.kv_cache_scheme.strategy
        out["strategies"][name] = {
            "strategy": str(getattr(strategy, "value", strategy)),
            "expected": wanted,
            "written": {key: list(value.shape) for key, value in found.items()},
        }
    return out


def hugging_face(work: Path) -> dict:
    """Runs tiny models on the caches of their plans: logits, tokens and bytes."""
    import torch
    import transformers

    names = sorted(path.stem for path in (work / "hf").glob("*.npy"))
    folder = work / "hf" / names[0]  # the modules are the same for all plans
    sys.path.insert(0, str(folder))
    import turboq_cache

    out = {"versions": versions("transformers", "torch"), "modules": {}, "cases": {}}
    for module in ("turboq_cache.py", "turboq_codecs.py"):
        out["modules"][module] = hashlib.sha256((folder / module).read_bytes()).hexdigest()
    for name in names:
        prompt = torch.tensor(np.load(work / "hf" / f"{name}.npy").astype(np.int64))
        row = out["cases"][name] = {}
        for attention in ("eager", "sdpa"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                GOLDEN / name, dtype=torch.float32, attn_implementation=attention
            ).eval()

            def fresh(model=model, plan=work / "hf" / name / "engine_plan"):
                return turboq_cache.make_cache(model, plan)

            with torch.no_grad():
                row[attention] = run(model, prompt, fresh)
    return out


def run(model, prompt, fresh) -> dict:
    """One prompt at once, in pieces, and padded on the left, and what is generated."""
    import torch

    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = fresh()
    at_once = model(prompt, past_key_values=cache).logits
    pieces = fresh()
    ends = [7, 8, 14, *range(15, prompt.shape[1] + 1)]
    parts = [
        model(prompt[:, start:end], past_key_values=pieces).logits
        for start, end in itertools.pairwise([0, *ends])
    ]
    apart = (torch.cat(parts, dim=1) - at_once).abs().max()
    # The first sequence three tokens shorter than the second, padded; and each by itself.
    padded, mask = prompt.clone(), torch.ones_like(prompt)
    padded[0, 3:], padded[0, :3], mask[0, :3] = prompt[0, :-3], 0, 0
    together = model.generate(padded, attention_mask=mask, past_key_values=fresh(), **settings)
    alone = [
        model.generate(row[None, pad:], past_key_values=fresh(), **settings)[0, -6:].tolist()
        for row, pad in zip(padded, (3, 0), strict=True)
    ]
    beams = model.generate(prompt, past_key_values=fresh(), num_beams=3, **settings)
    return {
        "logits": [[[round(x, 6) for x in t] for t in b] for b in at_once[:, ::5, ::4].tolist()],
        "pieces_apart": float(apart),
        "generated": together[:, -6:].tolist(),
        "alone": alone,
        "beams": beams[:, -6:].tolist(),
        "nbytes": cache.nbytes,
    }


def main(work: Path) -> None:
    for folder, oracle in (("hf", hugging_face), ("vllm", compressed), ("ort", ort)):
        result = oracle(work)
        (work / folder / "result.json").write_text(json.dumps(result))
        print(folder, json.dumps(result)[:700], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
