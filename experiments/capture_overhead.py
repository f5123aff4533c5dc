"""What does `turboq calibrate` cost over the bare forward pass? Both, side by side.

    python experiments/capture_overhead.py

For every layer of the model and one chunk of windows, alternating --repeats times: the layer alone
(output only), then what a run does: the layers forwards, the head's gradient, the layers backwards
with statistics on the host. Reports the ratio of the medians of whole passes, so that whatever else
the machine does falls on both. Expected: at most 5.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from program import main, windows_of, write_json

from turboq_calibrate.models import decoder, load_model
from turboq_calibrate.models.model import Model, embed_tokens
from turboq_calibrate.observe import passes
from turboq_calibrate.observe.reduce import to_host

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
WINDOWS = flags.DEFINE_integer("windows", 4, "Windows of a chunk.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens per window.", lower_bound=8)
REPEATS = flags.DEFINE_integer("repeats", 3, "Passes of each kind.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/capture_overhead", "Folder for the result.")

SKIP = 4


def bare(model: Model, x, positions) -> float:
    """Seconds of the layers alone."""
    begun = time.perf_counter()
    for i, spec in enumerate(model.spec.layers):
        x, _ = decoder.run_layer(spec, model.layer(i), x, positions, decoder.exact_attend, None)
        jax.block_until_ready(x)
    return time.perf_counter() - begun


def observed(model: Model, x, positions) -> float:
    """Seconds of a run's passes over the same chunk, statistics on the host included."""
    begun = time.perf_counter()
    inputs = [x]
    for i, spec in enumerate(model.spec.layers):
        y, _ = passes.forward(spec, model.layer(i), inputs[-1], positions)
        inputs.append(jax.block_until_ready(y))
    numbers = jnp.arange(len(x), dtype=jnp.int32)
    g, _ = passes.head(model.spec, model.head_params(), inputs[-1], numbers, seed=0)
    sampled = jnp.zeros((x.shape[0] * x.shape[1] // 4, 2), jnp.int32)
    for i, spec in reversed(list(enumerate(model.spec.layers))):
        g, reduced, rows, _ = passes.reverse(
            spec, model.layer(i), inputs[i], positions, g, sampled, skip=SKIP
        )
        np.asarray(rows)
        for side in jax.device_get(reduced).values():
            to_host(side)
    jax.block_until_ready(g)
    return time.perf_counter() - begun


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    (tokens,) = windows_of(
        model, ["topics:calibration"], LENGTH.value, WINDOWS.value
    ).values()  # fmt: skip
    x, positions = embed_tokens(model, tokens), decoder.default_positions(jnp.asarray(tokens))
    for compiled in (bare, observed):
        compiled(model, x, positions)
    pairs = [
        (bare(model, x, positions), observed(model, x, positions)) for _ in range(REPEATS.value)
    ]
    alone, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    result = {
        "model": model.spec.name,
        "windows": WINDOWS.value,
        "window_tokens": LENGTH.value,
        "bare_seconds": [round(a, 3) for a, _ in pairs],
        "observe_seconds": [round(b, 3) for _, b in pairs],
        "ratio": round(whole / alone, 3),
        "tokens_per_second": {
            "bare": round(tokens.size / alone), "observe": round(tokens.size / whole)
        },
    }  # fmt: skip
    write_json(out / "capture_overhead.json", result)
    print(json.dumps(result, indent=1))
    print(f"result  {out / 'capture_overhead.json'}")


if __name__ == "__main__":
    main(run, OUT)
