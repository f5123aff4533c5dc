"""Golden files from the oracles' results: python collect.py WORK (writes beside itself)."""

import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def llama(work: Path) -> dict:
    """Perplexities of both sides, and how far their ratios to the unquantized cache are apart."""
    folder = work / "llama_cpp"
    theirs = json.loads((folder / "nll.json").read_text())
    ours = json.loads((folder / "ours.json").read_text())
    nll = {name: np.array(value) for name, value in theirs["nll"].items()}
    rows = {}
    for name, value in nll.items():
        ratio = math.exp(float(np.mean(value - nll["f16"])))
        mine = ours[name]["perplexity"] / ours["f16"]["perplexity"]
        per_window = np.exp(np.mean(value - nll["f16"], axis=1))
        rows[name] = {
            "llama_cpp_perplexity": math.exp(float(value.mean())),
            "turboq_perplexity": ours[name]["perplexity"],
            "llama_cpp_ratio": ratio,
            "turboq_ratio": mine,
            "apart": abs(ratio / mine - 1),
            "llama_cpp_ratio_of_windows": [round(float(r), 5) for r in per_window],
        }
    windows, length = next(iter(nll.values())).shape
    return {
        "versions": {"llama-cpp-python": theirs["version"]},
        "text": f"topics:heldout, {windows} windows of {length + 1} tokens",
        "rows": rows,
    }


def main(work: Path) -> None:
    stamp = {
        "made": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "by": "scripts/export_oracles",
    }
    for name, folder in (
        ("ort_genai", "ort"),
        ("compressed_tensors", "vllm"),
        ("transformers", "hf"),
        ("mlx_lm", "mlx"),
        ("tokamax", "jax"),
    ):
        path = work / folder / "result.json"
        if path.exists():
            write(name, stamp | json.loads(path.read_text()))
    if (work / "llama_cpp" / "nll.json").exists():
        write("llama_cpp", stamp | llama(work))


def write(name: str, value: dict) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(name, (HERE / f"{name}.json").stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
