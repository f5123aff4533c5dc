"""A run on a mesh of virtual CPU devices, in one process or as one of several on 127.0.0.1.

    python mesh_worker.py OUT PROCESS PROCESSES PORT MODEL_AXIS [EVENT COUNT]

Started with XLA_FLAGS=--xla_force_host_platform_device_count=N. Ends itself with SIGKILL right
after the COUNT-th EVENT.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "llama3"


def main(out: str, process: int, processes: int, port: str, axis: int, event: str, last: int):
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    from turboq_calibrate.observe.placement import make_mesh

    seen = 0

    def observer(name: str, fields: dict) -> None:
        nonlocal seen
        seen += name == event
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

    fitted, arrays = run(out, make_mesh(model=axis), observer)
    np.savez(Path(out) / f"fitted_{process}.npz", fitted=np.array(fitted), **arrays)


def run(out, mesh=None, observer=None) -> tuple[int, dict[str, np.ndarray]]:
    """Observes, or reads what is finished; then fits: how many units here, and all arrays."""
    from turboq.codecs import PerHead
    from turboq.plan import TextSource, uniform_plan
    from turboq_calibrate.fit.shared import collect_shared
    from turboq_calibrate.models import load_model
    from turboq_calibrate.models.geometry import model_geometry
    from turboq_calibrate.observe.observe import observe
    from turboq_calibrate.observe.recipe import ObserveRecipe
    from turboq_calibrate.observe.texts import Windows

    model = load_model(GOLDEN, resident=False)
    tokens = np.random.default_rng(7).integers(0, model.spec.vocab, (18, 12), dtype=np.int32)
    source = TextSource(name="random", sha256="0" * 64)
    text = np.zeros(18, np.int32)
    windows = Windows(tokens=tokens, texts=(source,), text=text, available=18)
    recipe = ObserveRecipe(skip=2, windows_per_chunk=8, reservoir=60)
    found = observe(
        model, windows, out, recipe, mesh=mesh, checkpoint_every=1, progress=False,
        observer=observer,
    )  # fmt: skip

    codec = PerHead(dim=model.spec.layers[0].head_dim, bits=2)
    plan = uniform_plan(model_geometry(model), k=codec, v=codec)
    fitted = []

    def fit(index: int, side: str, codec: PerHead):
        fitted.append((index, side))
        seen = found.layers[index].observed(side)
        deviation = np.sqrt(np.einsum("kdd->k", seen.covariance) / codec.dim)
        levels = np.linspace(-1, 1, 2**codec.bits) * deviation[:, None]
        return {"mean": seen.mean.astype(np.float32), "codebook": levels.astype(np.float32)}

    arrays = collect_shared(plan, fit)
    return len(fitted), arrays


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    first = [sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])]
    rest = sys.argv[6:] or ["never", "1"]
    main(*first, rest[0], int(rest[1]))
