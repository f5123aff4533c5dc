"""A run in a process of its own that kills itself, or waits to be killed.

    python observe_worker.py OUT MODEL EVENT COUNT

Sends itself SIGKILL right after the COUNT-th EVENT of this process ("never": runs to the end).
Strict numerics as in the suite, because they are part of what is compiled.
"""

import os
import signal
import sys

import jax
import numpy as np

from turboq.plan import TextSource
from turboq_calibrate.models import load_model
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe
from turboq_calibrate.observe.texts import Windows


def case(vocab: int) -> tuple[Windows, ObserveRecipe]:
    """Seven windows in chunks of two: the last chunk is a short one."""
    tokens = np.random.default_rng(11).integers(0, vocab, (7, 20), dtype=np.int32)
    source = TextSource(name="random", sha256="0" * 64)
    text = np.zeros(7, np.int32)
    windows = Windows(tokens=tokens, texts=(source,), text=text, available=7)
    return windows, ObserveRecipe(skip=2, windows_per_chunk=2, reservoir=50)


def main(out: str, path: str, event: str, count: int) -> None:
    seen = 0

    def observer(name: str, fields: dict) -> None:
        nonlocal seen
        seen += name == event
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    model = load_model(path, resident=False)
    windows, recipe = case(model.spec.vocab)
    observe(model, windows, out, recipe, checkpoint_every=1, progress=False, observer=observer)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
