"""What a cache does to one example: the likelihood of every answer, the rank of the right one.

The prompt is prefilled into the packed cache, as an engine does; then every answer is read from it
in turn, teacher-forced, and the cache left as it was. With p the model's probabilities,

    logp   = sum_i log p(a_i | prompt, a_<i)    of the right and every wrong answer, nats
    rank   = max_i 1 + |{v: p(v | ...) > p(a_i | ...)}|    of the right one; 1: greedy writes it
    agrees = greedy decoding writes what it writes with the exact cache
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq_calibrate.cost.metrics import log_softmax
from turboq_calibrate.measure.decode_cache import ByLayer, OnePool, feed, open_cache
from turboq_calibrate.models import Model
from turboq_calibrate.tasks.examples import Example

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """logp: of the right answer, then of the wrong ones.

    greedy: what is written with the exact cache, as many tokens as the right answer has.
    """

    logp: tuple[float, ...]
    rank: int
    agrees: bool
    greedy: tuple[int, ...]

    @property
    def chosen(self) -> bool:
        """The right answer is the likeliest."""
        return self.logp[0] > max(self.logp[1:])

    @property
    def matches(self) -> bool:
        """Greedy decoding writes the right answer."""
        return self.rank == 1


def score(
    model: Model, layers: Sequence[KVLayer], example: Example, greedy: Tokens | None = None
) -> Score:
    """One example under one plan; without `greedy` the plan is the exact cache and writes it.

    Raises:
      TurboqError: predictions that are not finite.
    """
    prompt, room = example.prompt, example.length - len(example.prompt)
    start = len(prompt) - 1
    cache = open_cache(layers, 1, example.length)
    feed(model, cache, jnp.asarray(prompt[None, :-1]), 0)

    def read(answer: Tokens) -> tuple[np.ndarray, np.ndarray]:
        given = np.full(room, prompt[-1], np.int32)  # what follows the answer is seen by nothing
        given[1 : len(answer)] = answer[:-1]
        target = np.zeros(room, np.int32)
        target[: len(answer)] = answer
        logits = feed(model, cache, jnp.asarray(given[None]), start, last=room, keep=True)[0]
        logp, rank = jax.device_get(_read(logits, jnp.asarray(target)))
        if not np.isfinite(logp[: len(answer)]).all():
            raise TurboqError(
                f"task {example.task}, example {example.index}: predictions are not finite"
            )
        return logp[: len(answer)], rank[: len(answer)]

    found = [read(answer) for answer in example.answers]
    rank = int(found[0][1].max())
    if greedy is None:
        right = example.answers[0]
        greedy = right if rank == 1 else _write(model, cache, int(prompt[-1]), start, len(right))
        agrees = True
    else:
        agrees = rank == 1 if greedy == example.answers[0] else bool((read(greedy)[1] == 1).all())
    return Score(
        logp=tuple(float(np.sum(logp, dtype=np.float64)) for logp, _ in found),
        rank=rank,
        agrees=agrees,
        greedy=greedy,
    )


def _write(model: Model, cache: ByLayer | OnePool, last: int, start: int, count: int) -> Tokens:
    """Greedy decoding behind the prompt; the cache grows."""
    written = [last]
    for step in range(count):
        logits = feed(model, cache, jnp.asarray([written[-1:]], jnp.int32), start + step)
        written.append(int(jnp.argmax(logits)))
    return tuple(written[1:])


@jax.jit
def _read(
    logits: Float[Array, "n V"], target: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """log p of every target, and 1 + how many tokens are likelier (an earlier one on a tie)."""
    own = jnp.take_along_axis(logits, target[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] < target[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    logp = jnp.take_along_axis(log_softmax(logits), target[:, None], axis=-1)
    return logp[:, 0], 1 + jnp.sum(ahead, axis=-1, dtype=jnp.int32)
