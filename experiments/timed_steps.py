"""Decode steps of a whole model through caches side by side, and their attention alone: how timed.

A step is what `greedy` does for a token: `decode_cache.feed`, and the arg-max on the host. What is
timed has been compiled: a program that is compiled in a timed step is an error.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timed_caches import Cache, caches, fill

from turboq.cache import overflow
from turboq.errors import TurboqError
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.measure.attention_plugs import Pooled
from turboq_calibrate.measure.decode_cache import OnePool, feed
from turboq_calibrate.models import Model

COMPILED = "/jax/core/compile/backend_compile_duration"
EXACT = ("bf16 cudnn", "bf16 xla", "exact")
LOOP = 16  # tokens of attention alone in one dispatch
PREPARED, THREADS = 0.8, 8  # of the time, until all is compiled; caches that are made at a time
_programs: list[int] = []  # the thread that asked for each compiled one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of S cached tokens; `rounds` of `steps` steps."""

    batch: int
    context: int
    rounds: int
    steps: int

    @property
    def capacity(self) -> int:
        """Tokens of the steps, the first two untimed; or of the loops, the first untimed."""
        return self.context + max(2 + self.rounds * self.steps, (1 + self.rounds) * LOOP)


class Decoding:
    """A cache with what it decodes, and one layer's cache for attention alone."""

    def __init__(self, model: Model, opened: Callable[[int, int], Cache], shape: Shape, prompt):
        self.model, self.shape, self.at = model, shape, shape.context
        self.cache = opened(len(model.spec.layers), shape.capacity)
        self.token = np.zeros(shape.batch, np.int32)
        if prompt is None:
            fill(self.cache, shape.context)
        else:
            self._choose(feed(model, self.cache, jnp.asarray(prompt), 0))
        self.one, self.one_at = opened(1, shape.capacity), shape.context
        fill(self.one, shape.context)
        begin = compiled_here()
        self.steps(2)
        self.loop()
        self.programs = compiled_here() - begin

    def _choose(self, logits) -> None:
        self.token = np.asarray(logits[:, 0]).argmax(axis=-1).astype(np.int32)

    def steps(self, count: int) -> float:
        """Milliseconds of a step, mean of so many."""
        begin = time.perf_counter()
        for _ in range(count):
            self._choose(feed(self.model, self.cache, jnp.asarray(self.token)[:, None], self.at))
            self.at += 1
        return (time.perf_counter() - begin) * 1e3 / count

    def loop(self) -> float:
        """Milliseconds that all layers' writes and attention take alone."""
        spec, one = self.model.spec.layers[0], self.one
        state: Any = one.states[0]
        if isinstance(one, OnePool):
            state = Pooled(layer=state, words=one.pools[0], matrices=one.matrices[0])
        at = jnp.int32(self.one_at)
        begin = time.perf_counter()
        state = jax.block_until_ready(_loop(spec, one.attend, state, at, self.shape.batch))
        seconds = time.perf_counter() - begin
        if isinstance(one, OnePool):
            one.states[0], one.pools[0], one.matrices[0] = state.layer, state.words, state.matrices
        else:
            one.states[0] = state
        self.one_at += LOOP
        return seconds * 1e3 / LOOP * len(self.model.spec.layers)


@functools.partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=2)
def _loop(spec, attend, state, at, batch: int):
    keys = jax.random.split(jax.random.key(1), 3)
    sizes = (spec.heads, spec.kv_heads, spec.kv_heads)
    new = [
        jax.random.normal(key, (batch, 1, n, spec.head_dim))
        for key, n in zip(keys, sizes, strict=True)
    ]

    def token(i, carry):
        state, new = carry
        out, state = attend(spec, *new, jnp.full((batch, 1), at + i, jnp.int32), state)
        trace = 1e-3 * jnp.mean(out)
        return state, [x + trace for x in new]  # the next token waits for this one

    state, new = jax.lax.fori_loop(0, LOOP, token, (state, new))
    return jax.lax.optimization_barrier((state, new))[0]


@contextlib.contextmanager
def none_compiled() -> Iterator[None]:
    """Refuses programs that are compiled inside.

    Raises:
      TurboqError: says how many.
    """
    begin = compiled_here()
    yield
    if more := compiled_here() - begin:
        raise TurboqError(f"{more} programs were compiled in timed steps: none may be")


def compiled_here() -> int:
    """Programs that this thread had compiled."""
    return _programs.count(threading.get_ident())


@functools.cache
def count_programs() -> None:
    """From now on every compiled program is counted (listeners cannot be taken off)."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            _programs.append(threading.get_ident())

    jax.monitoring.register_event_duration_secs_listener(listen)


def compare(
    model: Model, shape: Shape, prompt: np.ndarray | None = None, *,
    only: Collection[str] = (), seconds: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """All caches side by side, or those named: {model, shape, baseline, rows, skipped}.

    Without a prompt [B, S] caches are filled with random bits. They are made side by side; what is
    not ready after `PREPARED` of the seconds is skipped by name; two rounds are always run.

    Raises:
      TurboqError: a program was compiled in a timed step, or a cache was too small.
    """
    count_programs()
    end = time.monotonic() + seconds
    ready: dict[str, Decoding] = {}
    skipped: list[str] = []
    chosen = {n: c for n, c in caches(model, shape.batch).items() if not only or n in only}
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    making = {
        name: pool.submit(Decoding, model, opened, shape, prompt) for name, opened in chosen.items()
    }
    limit = None if seconds == math.inf else max(PREPARED * seconds, 0)
    concurrent.futures.wait(making.values(), timeout=limit)
    pool.shutdown(wait=False, cancel_futures=True)
    for name, one in making.items():
        if not one.done() or one.cancelled():
            skipped.append(f"{name}: no time left")
        elif (problem := one.exception()) is not None:  # what a cache cannot do is a result
            skipped.append(f"{name}: {type(problem).__name__}: {problem}"[:300])
        else:
            ready[name] = one.result()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    with none_compiled():
        for done in range(shape.rounds if ready else 0):
            if done >= 2 and time.monotonic() > end:
                skipped.append(f"rounds {done} to {shape.rounds - 1}: no time left")
                break
            for name, one in ready.items():
                times[name].append((one.steps(shape.steps), one.loop()))
    for one in ready.values():
        overflow.check([*one.cache.counters(), *one.one.counters()])
    return {
        "model": model.spec.name, "layers": len(model.spec.layers), "weights": model.dtype,
    } | dataclasses.asdict(shape) | _rows(ready, times) | {"skipped": skipped}  # fmt: skip


def _rows(
    ready: Mapping[str, Decoding], times: Mapping[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    """Medians over rounds, and ratios of exact over own; empty without two rounds."""
    found = {name: np.array(rounds) for name, rounds in times.items() if len(rounds) > 1}
    none = found.pop("none", None)
    median = {name: np.median(x, axis=0) for name, x in found.items()}
    exact = [name for name in EXACT if name in found]
    best = [min(exact, key=lambda name: median[name][i], default=None) for i in (0, 1)]
    rows = []
    for name, x in found.items():
        step, attention = median[name]
        row: dict[str, Any] = {
            "cache": name,
            "cache_bytes": ready[name].cache.nbytes(),
            "programs": ready[name].programs,
            "step_ms": _short(step),
            "tokens_per_s": _short(1e3 * ready[name].shape.batch / step),
            "attention_ms": _short(attention),
            "rounds_ms": [[_short(value) for value in pair] for pair in x],
        }
        if none is not None:
            row["attention_share"] = _short(np.median(1 - none[:, 0] / x[:, 0]))
        for i, what in enumerate(("step", "attention")):
            if (baseline := best[i]) is not None:
                logs = np.log(found[baseline][:, i] / x[:, i])
                row[f"{what}_ratio"] = _short(math.exp(logs.mean()))
                row[f"{what}_ratio_ci"] = [_short(math.exp(v)) for v in bootstrap_ci(logs) or ()]
        rows.append(row)
    without = None if none is None else _short(np.median(none[:, 0]))
    baselines = dict(zip(("step", "attention"), best, strict=True))
    return {"baseline": baselines, "without_cache_ms": without, "rows": rows}


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def table(found: Mapping[str, Any]) -> str:
    """A comparison as text."""
    lines = [
        f"{found['model']}, {found['layers']} layers, B={found['batch']} S={found['context']}: "
        f"{found['without_cache_ms']} ms a step without a cache; ratios to {found['baseline']}",
        f"{'cache':<20}{'ms/step':>9}{'tokens/s':>10}{'share':>7}{'x exact':>9} {'(95 %)':<16}"
        f"{'attention':>10}{'x exact':>9} (95 %)",
    ]
    for row in found["rows"]:
        step, attention = (
            " .. ".join(f"{v:g}" for v in row.get(f"{what}_ratio_ci", ()))
            for what in ("step", "attention")
        )
        lines.append(
            f"{row['cache']:<20}{row['step_ms']:>9g}{row['tokens_per_s']:>10g}"
            f"{row.get('attention_share', math.nan):>7.0%}{row.get('step_ratio', math.nan):>9.3g} "
            f"{step:<16}{row['attention_ms']:>10g}{row.get('attention_ratio', math.nan):>9.3g} "
            f"{attention}"
        )
    return "\n".join(lines + [f"skipped: {text}" for text in found["skipped"]])
