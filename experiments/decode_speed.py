"""Is decode over a packed cache right and fast on this GPU, next to exact bfloat16 caches?

    scripts/on_gpu                    # sets paths and a time limit; or --tiny on a CPU

First the kernels of decode, prefill and encode are compared with float64 (`device_checks`). Then
one decode step (one query token, 8 KV heads of 4 query heads, D = 128) is timed at B = 1, 8, 32 and
S = 4k .. 128k for bfloat16 caches (`jax.nn.dot_product_attention` by cuDNN and by XLA, tokamax
where installed; the best one is the baseline) and for the packed ones: int8, fp8 (e4m3), 4, 3 and 2
bits; and a prefill chunk (T query tokens) over its history by the same methods. Then encoding, and
a few tunings of the 3-bit decode kernel.

Timing: kernels/turboq_kernels/bench/timing.py. GB/s counts the bytes that must be read (codes and
scales); `of_copy` is that over the card's own copy rate, measured in the same run. The launch floor
is the same loop over a single page per sequence.

Writes one JSON after every shape, {device, versions, date, copy_gb_per_s, floor_us, checks, rows,
encode, tunings, skipped}, and prints one table. Ends by itself: what --seconds does not suffice for
is listed as skipped. Exit status 1 if a check failed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from turboq.files import atomic_write
from turboq.version import __version__
from turboq_kernels.bench import methods, timing

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parents[1] / "tests"),
]
device_checks: Any = importlib.import_module("device_checks")

OUT = flags.DEFINE_string("out", "runs/on_gpu/decode_speed.json", "JSON file to write.")
SECONDS = flags.DEFINE_float("seconds", 420.0, "Nothing new begins after this long.")
TINY = flags.DEFINE_bool("tiny", False, "Interpret mode and one tiny shape: a test of the program.")

BATCHES, LENGTHS = (1, 8, 32), (4096, 16384, 32768, 131072)
CHUNKS = (
    methods.Shape(batch=1, tokens=16384, chunk=2048),
    methods.Shape(batch=8, tokens=4096, chunk=512),
)
TUNINGS = [
    {"tile_rows": rows, "num_warps": warps, "num_stages": stages, "residency": residency}
    for rows, warps, residency in ((4, 4, 3), (4, 4, 6), (8, 8, 1))
    for stages in (1, 5, 6)  # 2 to 4 compile to one buffer
]


@dataclasses.dataclass
class Run:
    """What has been found so far, and until when."""

    deadline: float
    report: dict[str, Any]

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def write(self) -> None:
        path = Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(self.report, indent=1) + "\n")


def main(argv: list[str]) -> None:
    del argv
    begin = time.monotonic()
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    device = jax.devices()[0]
    if not TINY.value and device.platform != "gpu":
        raise app.UsageError(f"needs a GPU, found {device.platform}; --tiny runs on a CPU")
    run = Run(begin + SECONDS.value, _header(device))
    _checks(run)
    _floors(run)
    if TINY.value:
        one = methods.Shape(batch=1, tokens=512, heads=1, group=2, dim=16)
        shapes = [one, dataclasses.replace(one, chunk=40)]
        chosen = [
            m for m in methods.all_methods(interpret=True) if m.name in ("bf16 xla", "3 bits")
        ]
    else:
        shapes = [methods.Shape(batch=b, tokens=s) for s in LENGTHS for b in BATCHES]
        shapes[6:6] = CHUNKS  # while there is time
        chosen = methods.all_methods()
    for shape in shapes:
        _bench(run, shape, chosen)
        run.write()
    _encoders(run)
    if not TINY.value:
        _tunings(run)
    run.report["seconds"] = round(time.monotonic() - begin, 1)
    run.write()
    print(table(run.report))
    failed = [check for check in run.report["checks"] if check["error"]]
    passed = len(run.report["checks"]) - len(failed)
    print(f"{passed} checks passed, {len(failed)} failed; {OUT.value}")
    if failed:
        sys.exit(1)


def _header(device) -> dict[str, Any]:
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "tokamax")
    versions = {"turboq": __version__}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checks": [],
        "rows": [],
        "skipped": [],
        "tunings": [],
        "encode": [],
    }


def _checks(run: Run) -> None:
    """Every kernel against float64 (`device_checks`)."""
    for op, name, options, check in device_checks.checks(TINY.value):
        error = ""
        try:
            check()
        except Exception as problem:  # everything that goes wrong is a result
            error = f"{type(problem).__name__}: {problem}"[:600]
        found = {"op": op, "reading": name, "options": repr(options), "error": error}
        run.report["checks"].append(found)
        print(f"check {op} {name} {options}: {error or 'ok'}", flush=True)
        run.write()


def _floors(run: Run) -> None:
    """The card's copy rate, and what a call costs that reads one page."""
    size = 2**16 if TINY.value else 2**30
    run.report["copy_gb_per_s"] = round(timing.copy_rate(size) / 1e9, 1)
    dims = {"heads": 1, "group": 2, "dim": 16} if TINY.value else {}
    shape = methods.Shape(batch=1, tokens=methods.PAGE, **dims)
    method = methods.packed("floor", 3, "table", interpret=TINY.value)
    floor = _timed(method.job(shape))
    run.report["floor_us"] = round(floor.seconds * 1e6, 2)
    print(f"copy {run.report['copy_gb_per_s']} GB/s, floor {run.report['floor_us']} us", flush=True)


def _timed(job: methods.Job, compiled=None) -> timing.Timing:
    arrays = jax.jit(job.make)()
    compiled = compiled or _compiled(job)
    query = jax.random.normal(jax.random.key(0), job.query.shape, job.query.dtype)
    repeats = 2 if TINY.value else timing.REPEATS
    return timing.measure(lambda: compiled(query, arrays), job.calls, repeats)


def _compiled(job: methods.Job):
    return jax.jit(job.run).lower(job.query, jax.eval_shape(job.make)).compile()


def _bench(run: Run, shape: methods.Shape, chosen: list[methods.Method]) -> None:
    """All methods at one shape: compiled side by side, then timed one after the other."""
    jobs = {method.name: method.job(shape) for method in chosen}
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 64 * 2**30)

    def skip(name, reason):
        text = f"{name} B={shape.batch} S={shape.tokens} T={shape.chunk}: {reason}"
        run.report["skipped"].append(text)
        print("skipped", text, flush=True)

    if run.late():
        skip("all", "no time left")
        return
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiling = {name: pool.submit(_compiled, job) for name, job in jobs.items()}
        concurrent.futures.wait(compiling.values())
    baseline = None
    for method in chosen:
        job = jobs[method.name]
        if run.late():
            skip(method.name, "no time left")
            continue
        if job.resident > 0.6 * limit:
            skip(method.name, f"{job.resident / 2**30:.1f} GiB do not fit")
            continue
        try:
            found = _timed(job, compiling[method.name].result())
        except Exception as problem:  # what a method cannot do here is a result
            skip(method.name, f"{type(problem).__name__}: {problem}"[:300])
            continue
        if method.exact:
            baseline = min(baseline or found.seconds, found.seconds)
        row = {
            "method": method.name,
            "batch": shape.batch,
            "tokens": shape.tokens,
            "chunk": shape.chunk,
            "us": round(found.seconds * 1e6, 2),
            "us_range": [round(found.least * 1e6, 2), round(found.largest * 1e6, 2)],
            "bytes": job.nbytes,
            "gb_per_s": round(job.nbytes / found.seconds / 1e9, 1),
            "elements_per_s": round(shape.elements / found.seconds),
            "tflop_per_s": round(shape.flop / found.seconds / 1e12, 1),
            "of_copy": round(job.nbytes / found.seconds / 1e9 / run.report["copy_gb_per_s"], 3),
            "vs_bf16": round(baseline / found.seconds, 2) if baseline else None,
        }
        run.report["rows"].append(row)
        print(_line(row), flush=True)


def _tunings(run: Run) -> None:
    """Other tunings of the 3-bit kernel at two shapes, while there is time."""
    from turboq_kernels.decode import triton

    for shape in (methods.Shape(batch=8, tokens=32768), methods.Shape(batch=1, tokens=32768)):
        for numbers in TUNINGS:
            if run.late():
                run.report["skipped"].append("tunings: no time left")
                return
            method = methods.packed("3 bits", 3, "table", tuned=triton.Tuning(**numbers))
            try:
                us = round(_timed(method.job(shape)).seconds * 1e6, 2)
            except Exception as problem:  # a tuning that does not compile is a result
                us = f"{type(problem).__name__}: {problem}"[:200]
            run.report["tunings"].append(
                {"batch": shape.batch, "tokens": shape.tokens, "us": us} | numbers
            )
        run.write()


def _encoders(run: Run) -> None:
    """Encoding of one side's tokens at 3 bits."""
    shapes = [methods.Shape(batch=32, tokens=4096), methods.Shape(batch=8, tokens=4096, chunk=512)]
    if TINY.value:
        shapes = [methods.Shape(batch=1, tokens=512, heads=1, dim=16)]
    for shape in shapes:
        if run.late():
            run.report["skipped"].append(f"encode B={shape.batch} T={shape.chunk}: no time left")
            continue
        try:
            job = methods.encoder(shape, 1 if TINY.value else 3, interpret=TINY.value)
            us = round(_timed(job).seconds * 1e6, 2)
        except Exception as problem:  # as above
            us = f"{type(problem).__name__}: {problem}"[:200]
        run.report["encode"].append({"batch": shape.batch, "chunk": shape.chunk, "us": us})
        run.write()


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['batch']:>3} {row['tokens']:>7} {row['chunk']:>5} {row['method']:<13}"
        f"{row['us']:>10.1f}{row['gb_per_s']:>8.0f}{row['of_copy']:>8.0%}"
        f"{row['elements_per_s'] / 1e12:>8.2f}{row['tflop_per_s']:>8.1f}{row['vs_bf16'] or 0:>8.2f}"
    )


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{report['device']}, {report['date']}, {report['versions']}\n"
    head += f"copy {report['copy_gb_per_s']} GB/s, launch floor {report['floor_us']} us\n"
    names = f"{'B':>3} {'S':>7} {'T':>5} {'method':<13}{'us':>10}{'GB/s':>8}{'of copy':>8}"
    names += f"{'Telem/s':>8}{'TFLOP/s':>8}{'x bf16':>8}"
    lines = [head + names, *(_line(row) for row in report["rows"])]
    lines += [f"encode B={e['batch']} T={e['chunk']}: {e['us']} us" for e in report["encode"]]
    lines += [
        f"tuning B={t['batch']} S={t['tokens']} tile {t['tile_rows']} warps {t['num_warps']} "
        f"stages {t['num_stages']} residency {t['residency']}: {t['us']} us"
        for t in report["tunings"]
    ]
    return "\n".join(lines + [f"skipped: {text}" for text in report["skipped"]])


if __name__ == "__main__":
    app.run(main)
