"""ONNX Runtime GenAI, compressed-tensors and transformers with optimum-quanto, each really run.

python oracle_torch.py WORK        after prepare.py; writes WORK/{ort,vllm,hf}/result.json
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np


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


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location("turboq_cache", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hugging_face(work: Path) -> dict:
    """Generates with the exported cache; codes of its quanto and FP8 layers on known vectors."""
    import torch
    import transformers

    module = load_module(work / "hf" / "turboq_cache.py")
    model = transformers.LlamaForCausalLM.from_pretrained(work / "checkpoint").eval()
    prompt = torch.tensor(np.load(work / "hf" / "prompt.npy").astype(np.int64))
    cache = module.make_cache()
    with torch.no_grad():
        tokens = model.generate(
            prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, use_cache=True
        )
    assert len(cache.layers) == 3
    out = {
        "versions": versions("transformers", "optimum-quanto", "torch"),
        "layers": [type(layer).__name__ for layer in cache.layers],
        "generated": tokens[0, prompt.shape[1] :].tolist(),
        "rows": [],
    }
    # Vectors that the tests can make again: seeded normals in float32, 2 heads, 64 tokens.
    x = np.random.default_rng(11).normal(size=(2, 1, 2, 64, 32)).astype(np.float32)
    fresh = module.make_cache().layers
    for number, layer in enumerate(fresh):
        layer.update(torch.tensor(x[0]), torch.tensor(x[1]))
        row = {"layer": number, "class": type(layer).__name__}
        for side, value in (("k", layer._quantized_keys), ("v", layer._quantized_values)):
            if type(layer).__name__ == "PlannedFp8":
                row[side] = value[0].view(torch.uint8)[0].flatten().tolist()[:256]
                row[f"{side}_scale"] = value[1].flatten().tolist()
                continue
            quantized, _ = value
            restored = quantized.dequantize()[0].flatten().tolist()
            row[side] = restored[:256]
            row[f"{side}_bits"] = quantized.qtype.bits
        out["rows"].append(row)
    # 70 tokens are no multiple of a group of 32: groups must not run over into the next head.
    odd = np.random.default_rng(12).normal(size=(2, 1, 2, 70, 32)).astype(np.float32)
    layer = module.make_cache().layers[0]
    layer.update(torch.tensor(odd[0]), torch.tensor(odd[1]))
    restored = layer._dequantize(layer._quantized_keys)[0, 1].numpy()
    out["odd_head1_first_group"] = restored[:4].flatten().tolist()
    return out


def main(work: Path) -> None:
    for folder, oracle in (("vllm", compressed), ("hf", hugging_face), ("ort", ort)):
        result = oracle(work)
        (work / folder / "result.json").write_text(json.dumps(result))
        print(folder, json.dumps(result)[:700], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
