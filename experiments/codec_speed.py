"""How fast do codecs encode and decode on one CPU core, truly packed, next to a plain matmul?

    python experiments/codec_speed.py --out=FILE

For every registered codec (`turboq.conformance.ours` says at which settings; --codec picks some):
16,384 float32 vectors of D=128, encode and pack to words, then unpack and decode to float32, each
as one jitted function whose result is written to memory. `matmul_vectors_per_s` is the product of
the same vectors with a dense 128 x 128 float32 rotation in the same run, so that ratios compare
across machines.

One core: the process pins itself to one CPU before JAX starts (the size of XLA's thread pool
follows), and XLA_FLAGS gets --xla_cpu_multi_thread_eigen=false. Rates are medians of --repeats
rounds; in a round everything runs once, one after the other, so that other load on the machine
falls on all alike. `cpu_share` is CPU time over wall time of the run: well below 1 means that the
core was shared; then `*_per_cpu_s`, the same per second of CPU time, and ratios are what counts.

Writes a JSON list of {codec, config, bits, dim, encode_vectors_per_s, decode_vectors_per_s,
bytes_per_vector, matmul_vectors_per_s, ...} and prints a table. Expected for turboquant_mse at 3
bits: encode about as fast as the matmul, decode above it, well over 1 and 4 M vectors/s.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from turboq.codecs import CODECS
from turboq.conformance import ours
from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq.numbers.rotation import Rotation, product
from turboq.version import __version__

OUT = flags.DEFINE_string("out", None, "JSON file to write (its folder must exist).", required=True)
CODEC = flags.DEFINE_multi_string("codec", None, "Codecs to time (default: all registered).")
DIM = flags.DEFINE_integer("dim", 128, "Head dim.", lower_bound=8)
VECTORS = flags.DEFINE_integer("vectors", 16384, "Vectors, a multiple of 256.", lower_bound=512)
REPEATS = flags.DEFINE_integer("repeats", 15, "Rounds; medians are reported.", lower_bound=3)
CPU = flags.DEFINE_integer("cpu", -1, "CPU to pin to (-1: the last allowed one).")


def one_core(cpu: int) -> None:
    """Pins the process to one CPU. Must run before JAX makes its backend."""
    if not hasattr(os, "sched_setaffinity"):
        raise TurboqError("this machine cannot pin a process to one CPU (needs Linux)")
    allowed = sorted(os.sched_getaffinity(0))
    if cpu >= 0 and cpu not in allowed:
        raise TurboqError(f"--cpu={cpu} must be one of {allowed}")
    os.sched_setaffinity(0, {allowed[cpu]} if cpu < 0 else {cpu})
    known = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{known} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, result in memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def jobs(adapters: dict[str, ours.CodecAdapter], x: np.ndarray) -> dict[tuple, Callable]:
    """Everything of one round, compiled."""
    device = jnp.asarray(x)
    rotation = Rotation(kind="haar", dim=x.shape[-1]).matrix
    matmul = jax.jit(lambda v: product(v, rotation.T))
    made: dict[tuple, Callable] = {("matmul", ""): lambda: matmul(device)}
    for name, adapter in adapters.items():
        words = adapter.quantize(device)
        made[name, "encode"] = lambda a=adapter: a.quantize(device)
        made[name, "decode"] = lambda a=adapter, w=words: a.decoded(w)
    for run in made.values():  # compiles
        jax.block_until_ready(run())
    return made


def measure(adapters: dict[str, ours.CodecAdapter], x: np.ndarray, repeats: int) -> list[dict]:
    """One row per adapter."""
    made = jobs(adapters, x)
    times: dict[tuple, list[tuple[float, float]]] = {key: [] for key in made}
    for _ in range(repeats):
        for key, run in made.items():
            times[key].append(timed(run))
    total = np.sum([t for values in times.values() for t in values], axis=0)
    # Columns: vectors per second of wall time, and of CPU time.
    rate = {k: x.shape[0] / np.median(v, axis=0) for k, v in times.items()}
    common = machine() | {
        "vectors": x.shape[0],
        "repeats": repeats,
        "cpu_share": round(float(total[1] / total[0]), 3),
        "matmul_vectors_per_s": round(rate["matmul", ""][0]),
        "matmul_vectors_per_cpu_s": round(rate["matmul", ""][1]),
    }
    return [row(name, a, x, rate) | common for name, a in adapters.items()]


def row(name: str, adapter: ours.CodecAdapter, x: np.ndarray, rate: dict) -> dict:
    words = adapter.quantize(x)
    return {
        "codec": adapter.codec.name,
        "config": adapter.codec.config(),
        "bits": adapter.bits or adapter.codec.bits_per_channel,
        "dim": adapter.dim,
        "encode_vectors_per_s": round(rate[name, "encode"][0]),
        "decode_vectors_per_s": round(rate[name, "decode"][0]),
        "encode_vectors_per_cpu_s": round(rate[name, "encode"][1]),
        "decode_vectors_per_cpu_s": round(rate[name, "decode"][1]),
        "bytes_per_vector": adapter.nbytes(words) / x.shape[0],
    }


def machine() -> dict[str, str]:
    """Date, processor and versions; no names of hosts."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flag = [line for line in lines if line.startswith("flags")]
    wide = next((w for w in ("avx512f", "avx2") if flag and w in flag[0].split()), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": " ".join(filter(None, [names[0] if names else platform.machine(), wide])),
        "cores": "1",
        "turboq": __version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
    }


def table(rows: list[dict], names: list[str]) -> str:
    """Millions of vectors per second of CPU time, and ratios to the matmul of the run."""
    wide = max(len(name) for name in names)
    matmul = rows[0]["matmul_vectors_per_cpu_s"]
    lines = [
        f"matmul {matmul / 1e6:.2f} M vectors per CPU second; CPU share {rows[0]['cpu_share']:.2f}",
        f"{'':{wide}}   encode M/s   x matmul   decode M/s   x matmul   bytes",
    ]
    for name, r in zip(names, rows, strict=True):
        encode, decode = r["encode_vectors_per_cpu_s"], r["decode_vectors_per_cpu_s"]
        lines.append(
            f"{name:{wide}}   {encode / 1e6:10.3f} {encode / matmul:10.3f}"
            f"   {decode / 1e6:10.3f} {decode / matmul:10.3f} {r['bytes_per_vector']:7.1f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        one_core(CPU.value)
        if VECTORS.value % 256:
            raise TurboqError(f"--vectors={VECTORS.value} must be a multiple of 256")
        chosen = ours.adapters([DIM.value], CODEC.value or list(CODECS))
        x = np.random.default_rng(0).standard_normal((VECTORS.value, DIM.value), np.float32)
        rows = measure(chosen, x, REPEATS.value)
        atomic_write(OUT.value, json.dumps(rows, indent=1) + "\n")
    except TurboqError as error:
        sys.exit(f"codec_speed: error: {error}")
    print(table(rows, list(chosen)))


if __name__ == "__main__":
    app.run(main)
