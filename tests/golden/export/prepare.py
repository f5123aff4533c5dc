"""What the oracles start from: exports of small plans, and what turboq says the engines will store.

python tests/golden/export/prepare.py WORK      after oracle_checkpoint.py, with turboq installed
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import transformers_cases

from turboq.codecs import FP8, Ggml, PerChannel
from turboq.codecs.ggml import mainline
from turboq.export import ENGINES, Options, export
from turboq.plan import TextSource, collect_arrays, uniform_plan
from turboq.plan.rules import by_layer, rule_plan
from turboq_calibrate.measure.attention_plugs import simulated_attend
from turboq_calibrate.measure.evaluate import PLUGS, evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe

TOKENS = 40  # of the tiny model's prompt
KV_TYPES = ("q8_0", "q5_0", "q4_0")
WINDOWS, LENGTH = 6, 512


def tiny(work: Path):
    """The tiny checkpoint: (geometry, prompt [1, T], statistics of all its tokens)."""
    model = load_model(str(work / "checkpoint"))
    prompt = np.random.default_rng(7).integers(3, 320, (1, TOKENS)).astype(np.int32)
    text = TextSource(name="random", sha256=hashlib.sha256(prompt.tobytes()).hexdigest())
    windows = data.Windows(tokens=prompt, texts=(text,), text=np.zeros(1, np.int32), available=1)
    recipe = ObserveRecipe(skip=0, reservoir=TOKENS)
    return model_geometry(model), prompt, observe(model, windows, work / "observed", recipe)


def fitted(statistics, plan):
    """Arrays of a plan, fitted to what was observed."""

    def fit(index, side, codec):
        return codec.fit(statistics.layers[index].observed(side))

    return collect_arrays(plan, fit)


def ort(work: Path, geometry, statistics, prompt) -> None:
    """INT8 and INT4 per channel, with the codes of layer 0."""
    for bits in (8, 4):
        folder = work / "ort" / f"int{bits}"
        codec = PerChannel(dim=32, bits=bits)
        plan = uniform_plan(geometry, k=codec, v=codec)
        arrays = fitted(statistics, plan)
        shutil.rmtree(folder, ignore_errors=True)
        options = Options(dtype="float32", checkpoint=work / "checkpoint")
        export(plan, arrays, ENGINES["ort-genai"], folder, options)
        layer = plan.kv_layer(0, arrays)
        group = layer.groups[0]
        expected = {}
        for side in ("k", "v"):
            x = statistics.layers[0].observed(side).x
            of = group.k_arrays if side == "k" else group.v_arrays
            for head in range(2):
                one = {name: values[head] for name, values in of.items()}
                stored = codec.encode(one, x[head])
                expected[f"{side}{head}_x"] = x[head]
                expected[f"{side}{head}"] = codec.to_bytes(stored)
        np.savez(folder.parent / f"int{bits}.npz", **expected)
    np.save(work / "ort" / "prompt.npy", prompt)


def overlays(work: Path, geometry, statistics) -> None:
    """vLLM's two strategies, laid over the tiny checkpoint."""
    for scale in ("tensor", "head"):
        plan = uniform_plan(geometry, k=FP8(dim=32, scale=scale), v=FP8(dim=32, scale=scale))
        folder = work / "vllm" / scale
        shutil.rmtree(folder, ignore_errors=True)
        options = Options(dtype="float32", checkpoint=work / "checkpoint")
        export(plan, fitted(statistics, plan), ENGINES["vllm"], folder, options)


def python_caches(work: Path, geometry) -> None:
    """Plans of tiny models for transformers, and a mixed one for MLX."""
    shutil.rmtree(work / "hf", ignore_errors=True)
    kept = {}
    for name in transformers_cases.CASES:
        model, plan, arrays = transformers_cases.fitted(name)
        kept |= {f"{name}/{array}": values for array, values in arrays.items()}
        export(plan, arrays, ENGINES["transformers"], work / "hf" / name)
        np.save(work / "hf" / f"{name}.npy", transformers_cases.prompts(model))
    np.savez_compressed(transformers_cases.ARRAYS, **kept)
    mixed = rule_plan(
        geometry,
        by_layer({0: Ggml(dim=32, type="q8_0"), 1: Ggml(dim=32, type="q4_0")}),
    )
    shutil.rmtree(work / "mlx", ignore_errors=True)
    export(mixed, {}, ENGINES["mlx-lm"], work / "mlx", Options(dtype="float32"))


def interleaved_attend(spec, q, k, v, positions, state):
    """Our simulated cache on keys as llama.cpp holds those of llama models: rotary pairs adjacent.

    The GGUF's rows are permuted so; blocks of 32 channels then hold both halves of 16 pairs.
    """
    half = spec.head_dim // 2
    order = np.stack([np.arange(half), np.arange(half) + half], axis=1).reshape(-1)
    return simulated_attend(spec, q[..., order], k[..., order], v, positions, state)


def llama(work: Path) -> None:
    """Tokens of the embedded model, and its perplexity under our emulation of llama.cpp's types."""
    folder = work / "llama_cpp"
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model("embedded")
    text = data.load_text("topics:heldout")
    windows = data.windows(text, model.tokenizer, length=LENGTH, count=WINDOWS, spread=True)
    np.save(folder / "tokens.npy", windows.tokens)
    geometry = model_geometry(model)
    plans = []
    for kind in KV_TYPES:
        k, v = (mainline(64, side, kind) for side in ("k", "v"))
        plans.append((kind, uniform_plan(geometry, k=k, v=v), {}))
        plain = Ggml(dim=64, type=kind)
        plans.append((f"{kind} unrotated", uniform_plan(geometry, k=plain, v=plain), {}))
    exact = Ggml(dim=64, type="f16")
    plans.append(("f16", uniform_plan(geometry, k=exact, v=exact), {}))
    PLUGS["interleaved"] = interleaved_attend
    quality = evaluate(model, plans, windows.tokens, text="topics:heldout", attention="interleaved")
    rows = {row["name"]: row for row in quality.rows}
    names = ("perplexity", "kl_mean")
    kept = {name: {n: row[n] for n in names} for name, row in rows.items()}
    (folder / "ours.json").write_text(json.dumps(kept))


def main(work: Path) -> None:
    (work / "ort").mkdir(parents=True, exist_ok=True)
    geometry, prompt, statistics = tiny(work)
    ort(work, geometry, statistics, prompt)
    overlays(work, geometry, statistics)
    python_caches(work, geometry)
    llama(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
