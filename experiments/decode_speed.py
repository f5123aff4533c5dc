"""Is decode over packed caches right and fast on this GPU, next to exact bfloat16 ones?

    scripts/on_gpu                    # sets paths and a time limit; or --tiny on a CPU

In this order, each within its share of --seconds (`GROUPS`; what one leaves, the next ones have):

checks   kernels of decode, prefill, encode and bit columns against float64 (`device_checks`)
floors   the card's copy rate, what a call costs that reads one page, integer rates of the matrix
         unit (`turboq_kernels.bench.rates`)
bare     attention of one query token, 8 KV heads of 4 query heads, D = 128, at B = 1, 8, 32 and
         S = 4k .. 128k: bfloat16 caches (`jax.nn.dot_product_attention` by cuDNN and by XLA,
         tokamax where installed; the best one is the baseline), int8, fp8 (e4m3), 4, 3 and 2 bits,
         and bit columns of learned plans; also a prefill chunk (T query tokens) over its history
steps    one token written and read at the same shapes (`turboq_kernels.bench.steps`)
models   whole models (`timed_steps`): Llama 8B's shape with random weights, and SmolLM2
encode   encoding of one side's tokens
tunings  a few of the 3-bit decode kernel

Timing: kernels/turboq_kernels/bench/timing.py. GB/s counts the bytes that must be read (codes and
scales); `of_copy` is that over the card's own copy rate, measured in the same run. Rows of "steps"
are compared with exact steps.

Writes one JSON after every shape, {device, versions, date, copy_gb_per_s, floor_us, rates, checks,
rows, models, encode, tunings, skipped}, and prints tables. Ends by itself: what there is no time
for is in `skipped` by name, and printed. Exit status 1 if a check failed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from turboq.files import atomic_write
from turboq.version import __version__
from turboq_kernels.bench import methods, rates, steps, timing

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parents[1] / "tests"),
]
device_checks: Any = importlib.import_module("device_checks")

BATCHES, LENGTHS = (1, 8, 32), (32768, 4096, 131072, 16384)  # most telling first
# Groups of what is run, in order, with their shares of the time.
GROUPS = {
    "checks": 0.17, "floors": 0.03, "bare": 0.2, "steps": 0.22, "models": 0.3, "encode": 0.03,
    "tunings": 0.05,
}  # fmt: skip
MODELS = ((4, 16384), (1, 4096), (8, 4096), (1, 32768))  # sequences and their tokens

OUT = flags.DEFINE_string("out", "runs/on_gpu/decode_speed.json", "JSON file to write.")
SECONDS = flags.DEFINE_float("seconds", 430.0, "Nothing new begins after this long.")
TINY = flags.DEFINE_bool("tiny", False, "Interpret mode and one tiny shape: a test of the program.")

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
    """What has been found so far, and until when the group that is run has time."""

    begin: float
    report: dict[str, Any]
    group: str = "checks"

    def late(self) -> bool:
        return self.left() < 0

    def left(self) -> float:
        """Seconds of this group, with those that earlier ones left."""
        names = list(GROUPS)
        share = sum(GROUPS[name] for name in names[: names.index(self.group) + 1])
        return self.begin + share * SECONDS.value - time.monotonic()

    def skip(self, text: str) -> None:
        self.report["skipped"].append(f"{self.group}: {text}")
        print(f"skipped {self.group}: {text}", flush=True)

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
    run = Run(begin, _header(device))
    for name, part in _PARTS.items():
        run.group = name
        part(run)
        run.report["seconds"][name] = round(time.monotonic() - begin, 1)  # at its end
        run.write()
    print(table(run.report))
    failed = [check for check in run.report["checks"] if check["error"]]
    passed = len(run.report["checks"]) - len(failed)
    print(f"{passed} checks passed, {len(failed)} failed; {OUT.value}")
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # what is still being compiled is not waited for


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
        "models": [],
        "rates": {},
        "seconds": {},
    }


def _checks(run: Run) -> None:
    """Every kernel against float64 (`device_checks`)."""
    for op, name, options, check in device_checks.checks(TINY.value):
        if run.late():
            run.skip(f"{op} {name} {options}: no time left")
            continue
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
    """The card's copy rate, what a call costs that reads one page, rates of the matrix unit."""
    size = 2**16 if TINY.value else 2**30
    run.report["copy_gb_per_s"] = round(timing.copy_rate(size) / 1e9, 1)
    dims = {"heads": 1, "group": 2, "dim": 16} if TINY.value else {}
    shape = methods.Shape(batch=1, tokens=methods.PAGE, **dims)
    method = methods.packed("floor", 3, "table", interpret=TINY.value)
    floor = _timed(method.job(shape))
    run.report["floor_us"] = round(floor.seconds * 1e6, 2)
    for name in rates.MMA:
        try:
            run.report["rates"][name] = round(rates.rate(name) / 1e12, 1)
        except Exception as problem:  # what a card has not is a result
            run.skip(f"rate of {name}: {type(problem).__name__}: {problem}"[:300])
    print(f"rates in 10^12 products a second {run.report['rates']}")
    print(f"copy {run.report['copy_gb_per_s']} GB/s, floor {run.report['floor_us']} us", flush=True)


def _timed(job: methods.Job, compiled=None) -> timing.Timing:
    arrays = jax.jit(job.make)()
    compiled = compiled or _compiled(job)
    query = jax.random.normal(jax.random.key(0), job.query.shape, job.query.dtype)
    repeats = 2 if TINY.value else timing.REPEATS
    held = [arrays]
    del arrays  # donated ones are held once

    def call():
        if not job.donated:
            return compiled(query, held[0])
        out, after = compiled(query, held.pop())
        held.append(after)
        return out

    return timing.measure(call, job.calls, repeats)


def _compiled(job: methods.Job):
    run = jax.jit(job.run, donate_argnums=1 if job.donated else ())
    return run.lower(job.query, jax.eval_shape(job.make)).compile()


def _bare(run: Run) -> None:
    """Attention alone at every shape, and two prefill chunks."""
    if TINY.value:
        one = methods.Shape(batch=1, tokens=512, heads=1, group=2, dim=16)
        every = methods.all_methods(interpret=True)
        chosen = [m for m in every if m.name in ("bf16 xla", "3 bits")]
        _bench(run, one, chosen + _tiny(steps.column_methods(interpret=True)))
        _bench(run, dataclasses.replace(one, chunk=40), chosen)
        return
    decode, chunk = methods.all_methods() + steps.column_methods(), methods.all_methods()
    for i, shape in enumerate(_shapes()):
        _bench(run, shape, decode)
        if i < len(CHUNKS):
            _bench(run, CHUNKS[i], chunk)


def _steps(run: Run) -> None:
    """Whole steps of a layer at every shape."""
    if TINY.value:
        one = methods.Shape(batch=1, tokens=256, heads=1, group=2, dim=16)
        _bench(run, one, _tiny(steps.step_methods(interpret=True)))
        return
    for shape in _shapes():
        _bench(run, shape, steps.step_methods())


def _tiny(chosen: list[methods.Method]) -> list[methods.Method]:
    return [m for m in chosen if m.name in ("step bf16 xla", "step 3 bits", "columns T=256")]


def _shapes() -> list[methods.Shape]:
    return [methods.Shape(batch=b, tokens=s) for s in LENGTHS for b in BATCHES]


def _bench(run: Run, shape: methods.Shape, chosen: list[methods.Method]) -> None:
    """All methods at one shape: compiled side by side, then timed one after the other."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 64 * 2**30)

    def skip(name, reason):
        run.skip(f"{name} B={shape.batch} S={shape.tokens} T={shape.chunk}: {reason}")

    if run.late():
        skip(", ".join(method.name for method in chosen), "no time left")
        return
    jobs: dict[str, methods.Job] = {}
    for method in chosen:
        try:
            job = method.job(shape)
        except Exception as problem:  # what a method cannot do here is a result
            skip(method.name, f"{type(problem).__name__}: {problem}"[:300])
            continue
        if job.resident > 0.6 * limit:
            skip(method.name, f"{job.resident / 2**30:.1f} GiB do not fit")
        else:
            jobs[method.name] = job
    pool = concurrent.futures.ThreadPoolExecutor(8)
    compiling = {name: pool.submit(_compiled, job) for name, job in jobs.items()}
    concurrent.futures.wait(compiling.values(), timeout=max(run.left(), 0))
    pool.shutdown(wait=False, cancel_futures=True)
    baseline = None
    for method in (m for m in chosen if m.name in jobs):
        job = jobs[method.name]
        if run.late() or not compiling[method.name].done():
            skip(method.name, "no time left")
            continue
        try:
            found = _timed(job, compiling[method.name].result())
        except Exception as problem:  # as above
            skip(method.name, f"{type(problem).__name__}: {problem}"[:300])
            continue
        if method.exact:
            baseline = min(baseline or found.seconds, found.seconds)
        row = {
            "group": run.group,
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
    run.write()


def _models(run: Run) -> None:
    """Whole models through caches of every kind; programs and packages they need may be missing."""
    try:
        program: Any = importlib.import_module("timed_steps")
        caches: Any = importlib.import_module("timed_caches")
        models: Any = importlib.import_module("turboq_calibrate.models")
    except ImportError as problem:
        run.skip(f"llama8b, embedded: {problem}")
        return
    tiny = {"only": ("none", "bf16 xla")} if TINY.value else {}
    cases = [("llama8b", 2, 40)] if TINY.value else [("llama8b", *m) for m in MODELS]
    model = None
    for name, batch, context in cases + ([] if TINY.value else [("embedded", 1, 2048)]):
        what = f"{name} B={batch} S={context}"
        if run.late():
            run.skip(f"{what}: no time left")
            continue
        try:
            if name == "embedded":
                model = models.load_model(name, dtype="bfloat16")
            elif model is None:
                model = caches.llama8b(2 if TINY.value else 32, tiny=TINY.value)
            counts = {"rounds": 2, "steps": 2} if TINY.value else {"rounds": 7, "steps": 8}
            shape = program.Shape(batch=batch, context=context, **counts)
            found = program.compare(model, shape, seconds=run.left(), **tiny)
        except Exception as problem:  # as above
            run.skip(f"{what}: {type(problem).__name__}: {problem}"[:300])
            continue
        for text in found["skipped"]:
            run.skip(f"{what}: {text}")
        run.report["models"].append(found)
        print(program.table(found), flush=True)
        run.write()


def _tunings(run: Run) -> None:
    """Other tunings of the 3-bit kernel at two shapes, while there is time."""
    from turboq_kernels.decode import triton

    if TINY.value:
        return

    for shape in (methods.Shape(batch=8, tokens=32768), methods.Shape(batch=1, tokens=32768)):
        for numbers in TUNINGS:
            if run.late():
                run.skip(f"B={shape.batch} S={shape.tokens} {numbers}: no time left")
                continue
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
            run.skip(f"B={shape.batch} T={shape.chunk}: no time left")
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
        f"{row['batch']:>3} {row['tokens']:>7} {row['chunk']:>5} {row['method']:<21}"
        f"{row['us']:>10.1f}{row['gb_per_s']:>8.0f}{row['of_copy']:>8.0%}"
        f"{row['elements_per_s'] / 1e12:>8.2f}{row['tflop_per_s']:>8.1f}{row['vs_bf16'] or 0:>8.2f}"
    )


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{report['device']}, {report['date']}, {report['versions']}\n"
    head += f"copy {report['copy_gb_per_s']} GB/s, launch floor {report['floor_us']} us\n"
    names = f"{'B':>3} {'S':>7} {'T':>5} {'method':<21}{'us':>10}{'GB/s':>8}{'of copy':>8}"
    names += f"{'Telem/s':>8}{'TFLOP/s':>8}{'x bf16':>8}"
    lines = [head + names, *(_line(row) for row in report["rows"])]
    lines += [f"encode B={e['batch']} T={e['chunk']}: {e['us']} us" for e in report["encode"]]
    lines += [
        f"tuning B={t['batch']} S={t['tokens']} tile {t['tile_rows']} warps {t['num_warps']} "
        f"stages {t['num_stages']} residency {t['residency']}: {t['us']} us"
        for t in report["tunings"]
    ]
    return "\n".join(lines + [f"skipped: {text}" for text in report["skipped"]])


_PARTS = dict(
    zip(GROUPS, (_checks, _floors, _bare, _steps, _models, _encoders, _tunings), strict=True)
)

if __name__ == "__main__":
    app.run(main)
