"""How much faster does a whole model decode through a packed cache, and its attention alone?

    python experiments/model_decode_speed.py                         # SmolLM2-135M, 512 tokens
    python experiments/model_decode_speed.py --model=llama8b --batch=8 --context=4096
    python experiments/model_decode_speed.py --tiny                  # does it run at all?

A step is what `greedy` does for a token: `decode_cache.feed` through `open_cache`, and the arg-max
on the host. Its programs (one per kind of layer, embedding, head) are compiled before the first
timed step, and one that is compiled later is an error. Caches (`timed_caches`): bfloat16 in one
array, by `jax.nn.dot_product_attention` (XLA, on a GPU cuDNN too); turboq's own exact one;
turboquant_mse and per_head at 3 bits; what `turboq plan` makes by default, heads joined, keys in
blocks of 64 positions or 256. Ratios are to the fastest exact one.

The embedded model reads a prompt; caches of llama8b are filled with random bits. `attention_ms` is
write and attention of one layer in one compiled loop, times the layers; `attention_share` of a step
is what it takes longer than one without a cache and its attention. In a round every cache makes
--steps steps and one loop, so that other load falls on all alike; figures are medians of --rounds,
ratios have 95 % intervals (bootstrap over rounds). What does not fit or fails is listed as skipped.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from program import main, windows_of, write_json
from timed_caches import llama8b
from timed_steps import Shape, compare, table

from turboq_calibrate.models import load_model

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf, 'embedded' or 'llama8b'.")
LAYERS = flags.DEFINE_integer("layers", 32, "Layers of llama8b.", lower_bound=2)
TEXT = flags.DEFINE_string("text", "topics:heldout", "What the prompt is cut from.")
BATCH = flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 512, "Cached tokens of a sequence.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 8, "Steps of a round.", lower_bound=1)
MACHINE = flags.DEFINE_string("machine", "", "How the JSON names this machine.")
TINY = flags.DEFINE_boolean("tiny", False, "Two tiny layers of llama8b: does it run at all?")
OUT = flags.DEFINE_string("out", "runs/model_decode_speed.json", "JSON file to write.")


def run(out: Path) -> None:
    tiny = TINY.value
    context, rounds, steps = (40, 2, 2) if tiny else (CONTEXT.value, ROUNDS.value, STEPS.value)
    shape = Shape(batch=BATCH.value, context=context, rounds=rounds, steps=steps)
    text = prompt = None
    if tiny or MODEL.value == "llama8b":
        model = llama8b(2 if tiny else LAYERS.value, tiny=tiny)
    else:
        model = load_model(MODEL.value)
        ((text, prompt),) = windows_of(model, [TEXT.value], shape.context, shape.batch).items()
        model.spec.check_length(shape.capacity, "the prompt and the steps")
    found = compare(model, shape, prompt)
    report = {
        "machine": MACHINE.value or jax.devices()[0].device_kind,
        "text": text,
    } | found
    write_json(out, report)
    print(f"{table(found)}\n{out}")


if __name__ == "__main__":
    main(run, OUT)
