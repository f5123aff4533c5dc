"""Many prompts of any lengths through packed caches, in batches: greedy or sampled.

Sequences of a batch are as long as they are: a cache counts the tokens of each, and padding leaves
no trace in it. Prompts are read in chunks of one size, tokens one by one, and the last batch is
filled up, so that all batches run the same two programs per kind of layer. What is drawn for a
prompt depends on the seed and on its place among the prompts alone, not on what it shares a batch
with.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from turboq.cache import overflow
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq_calibrate.measure.broken import first_broken, of_every_layer
from turboq_calibrate.measure.decode_cache import ByLayer, OnePool, feed, open_cache
from turboq_calibrate.measure.generate import first_bad, not_finite
from turboq_calibrate.models import Model, Tokenizer
from turboq_calibrate.observe.self_text import draw
from turboq_calibrate.run.progress import Progress

CHUNK = 64  # prompt tokens that pass through a layer at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """softmax(logits / temperature), cut to the fewest tokens that have `top_p` of it; temperature
    0 takes the arg-max. Source: Holtzman et al. 2020 (nucleus sampling).

    Raises:
      ValueError: a temperature below 0, or top_p outside 0 < p <= 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"{self.temperature=} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{self.top_p=} must be above 0 and at most 1")


@dataclasses.dataclass(kw_only=True)
class Clock:
    """Tokens and seconds, without the first call of a kind, which compiles."""

    tokens: int = 0
    seconds: float = 0.0
    compiled: bool = False

    def add(self, tokens: int, seconds: float) -> None:
        if self.compiled:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.compiled = True

    @property
    def rate(self) -> float | None:
        """Tokens per second; None where no call but the first was made."""
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Per prompt its generated tokens and whether something stopped it; bytes of one batch's cache.

    A token of `stop_ids` is not among the tokens. `read` counts prompt tokens, `wrote` generated.
    """

    tokens: tuple[Int32[np.ndarray, "_"], ...]
    stopped: tuple[bool, ...]
    cache_bytes: int
    read: Clock
    wrote: Clock


Stop = Callable[[int, Sequence[int]], bool]  # (prompt, its tokens so far) -> is that all?


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    layers: Sequence[KVLayer],
    sampling: Sampling = Sampling(),
    stop_ids: Collection[int] = (),
    stop: Stop | None = None,
    batch: int = 8,
    chunk: int = CHUNK,
    attention: str | None = None,
    progress: bool = True,
) -> Answers:
    """At most `max_new_tokens` tokens behind every prompt, through caches of `layers`.

    Args:
      layers: of a plan (`Plan.kv_layers`), one for every decoder layer that owns a cache.
      stop_ids: tokens that end a sequence (the model's end tokens); stop: what else does.
      batch: sequences at once, prompts of like length together; chunk: prompt tokens at once.
      attention: the kernel that reads the caches, as in `generate.greedy`.

    Raises:
      TurboqError: no prompt or an empty one, a sequence beyond the model's context, logits that are
        not finite.
      ValueError: a size below 1; not one of `layers` for every layer that owns a cache.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> codec = turboq.TurboQuantMSE(dim=model.spec.layers[0].head_dim, bits=4)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec)
      >>> prompts = [model.tokenizer.encode(text) for text in ("Python is", "A cache of keys is")]
      >>> found = tc.generate(model, prompts, 2, layers=plan.kv_layers({}), progress=False)
      >>> [len(tokens) for tokens in found.tokens], found.stopped
      ([2, 2], (False, False))
    """
    if min(max_new_tokens, batch, chunk) < 1:
        raise ValueError(f"{max_new_tokens=}, {batch=} and {chunk=} must be 1 or more")
    rows = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
    _check(model, rows, max_new_tokens)
    sizes = np.array([len(row) for row in rows])
    batch, chunk = min(batch, len(rows)), min(chunk, int(sizes.max()))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(sampling.seed), jnp.arange(len(rows))
    )
    tokens: list[list[int]] = [[] for _ in rows]
    stopped = [False] * len(rows)
    read, wrote, nbytes = Clock(), Clock(), 0

    def take(i: int, token: int) -> bool:
        """Whether prompt i goes on after this token."""
        if token in stop_ids:
            stopped[i] = True
            return False
        tokens[i].append(token)
        stopped[i] = stop is not None and stop(i, tokens[i])
        return not stopped[i] and len(tokens[i]) < max_new_tokens

    order = np.argsort(sizes, kind="stable")
    with Progress(_most(sizes, max_new_tokens), label="generate", enabled=progress) as bar:
        for at in range(0, len(rows), batch):
            members = [int(i) for i in order[at : at + batch]]
            filled = members + [members[-1]] * (batch - len(members))
            # The last token is returned but never written, hence one token less.
            cache = open_cache(layers, batch, int(sizes.max()) + max_new_tokens - 1, attention)
            logits = _read(model, cache, [rows[i] for i in filled], len(members), chunk, read)
            bar.advance(int(sizes[members].sum()))
            lengths = sizes[filled].astype(np.int32)
            active = np.arange(batch) < len(members)
            for step in range(max_new_tokens):
                _check_finite(model, layers, logits, active, rows, tokens, filled, step)
                chosen = _choose(logits, keys[np.array(filled)], step, sampling)
                for row, i in enumerate(members):
                    if active[row]:
                        active[row] = take(i, int(chosen[row]))
                if not active.any():
                    break
                begun = time.perf_counter()
                logits = np.asarray(
                    feed(
                        model, cache, jnp.asarray(chosen)[:, None], jnp.asarray(lengths),
                        counts=jnp.asarray(active, jnp.int32),
                    )[:, 0]
                )  # fmt: skip
                wrote.add(int(active.sum()), time.perf_counter() - begun)
                bar.advance(int(active.sum()))
                lengths = lengths + active
            bar.advance(_most(sizes[order[: at + batch]], max_new_tokens) - bar.done)
            overflow.check(cache.counters())
            nbytes = cache.nbytes()
    return Answers(
        tokens=tuple(np.array(x, np.int32) for x in tokens), stopped=tuple(stopped),
        cache_bytes=nbytes, read=read, wrote=wrote,
    )  # fmt: skip


def _most(sizes: np.ndarray, new: int) -> int:
    """Tokens of prompts and of answers that nothing stops."""
    return int(sizes.sum()) + new * len(sizes)


def stops_at(tokenizer: Tokenizer, texts: Sequence[str]) -> Stop | None:
    """Stops where an answer holds one of the texts."""
    if not texts:
        return None

    def stop(_: int, tokens: Sequence[int]) -> bool:
        answer = tokenizer.decode(tokens)
        return any(text in answer for text in texts)

    return stop


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    return text[: min([len(text), *(at for at in map(text.find, stops) if at >= 0)])]


def _check(model: Model, rows: Sequence[np.ndarray], new: int) -> None:
    if not rows:
        raise TurboqError("no prompt to continue")
    for i, row in enumerate(rows):
        if not len(row):
            raise TurboqError(f"prompt {i} has no token")
        if len(row) + new > model.spec.context:
            raise TurboqError(
                f"prompt {i} has {len(row)} tokens, which with {new} new ones exceed the model's "
                f"context of {model.spec.context}"
            )


def _read(
    model: Model, cache: ByLayer | OnePool, rows: Sequence[np.ndarray], real: int, chunk: int,
    clock: Clock,
) -> Float[np.ndarray, "B V"]:  # fmt: skip
    """Logits behind the last token of every row, of which the first `real` are asked for."""
    sizes = np.array([len(row) for row in rows])
    longest = -(-int(sizes.max()) // chunk) * chunk
    padded = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    found: np.ndarray | None = None
    for first in range(0, longest, chunk):
        counts = np.clip(sizes - first, 0, chunk).astype(np.int32)
        begun = time.perf_counter()
        part = padded[:, first : first + chunk]
        logits = np.asarray(
            feed(model, cache, jnp.asarray(part), first, counts=jnp.asarray(counts))[:, 0]
        )
        clock.add(int(counts[:real].sum()), time.perf_counter() - begun)
        ends = (sizes - 1) // chunk == first // chunk
        found = logits if found is None else np.where(ends[:, None], logits, found)
    assert found is not None
    return found


def _choose(
    logits: Float[np.ndarray, "B V"], keys: Array, step: int, sampling: Sampling
) -> Int32[np.ndarray, "B"]:
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(np.int32)
    how = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
    kept = cast(Array, nucleus(jnp.asarray(logits), *how))
    return np.asarray(draw(kept, keys, jnp.int32(step)))


@jax.jit
def nucleus(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B V"]:
    """logits / temperature, -inf outside the fewest most probable tokens that have `top_p` in all.

    Of tokens as probable as the last one that is needed, all are kept.
    """
    scaled = logits / temperature
    falling = -jnp.sort(-scaled, axis=-1)
    p = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def _check_finite(
    model: Model, layers: Sequence[KVLayer], logits: np.ndarray, active: np.ndarray,
    rows: Sequence[np.ndarray], tokens: Sequence[Sequence[int]], filled: Sequence[int], step: int,
) -> None:  # fmt: skip
    if (bad := first_bad(logits[active])) is None:
        return
    i = filled[int(np.flatnonzero(active)[bad])]
    sequence = np.concatenate([rows[i], np.array(tokens[i], np.int32)])
    cause = first_broken(model, of_every_layer(model, layers), sequence)
    raise not_finite(step, i, cause or "nothing that the caches store is to blame")
