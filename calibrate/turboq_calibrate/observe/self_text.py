"""Text that the model writes itself: windows drawn from its own distribution at temperature 1.

    x_0 = start token,   x_{t+1} = argmax_v (logits_v(x_0..x_t) + g_v),   g_v standard Gumbel,

which is a draw from softmax(logits). The noise of window n at position t has the key (seed, n, t),
so a window is the same whichever others are drawn with it (up to rounding, which the shape of the
batch can change). An end-of-text token does not end a window: what the model puts after it belongs
to the window too.

All tokens of a block are one compiled loop over an exact float32 KV cache of fixed capacity; blocks
of one run share one executable.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from safetensors import SafetensorError
from safetensors import numpy as st_numpy

from turboq.cache.exact_attention import HIGHEST, causal, soft_cap
from turboq.errors import TurboqError, shortened
from turboq.files import atomic_write, make_folder
from turboq.plan import TextSource
from turboq_calibrate.models import LayerSpec, Model, ModelSpec, Tokenizer, decoder, recurrence
from turboq_calibrate.models.streamed_experts import whole
from turboq_calibrate.run.progress import Progress

BATCH = 12  # a step reads all weights, however many windows take it
BLOCK = 64  # tokens of a window per call
SEEDS = 2**32


def seed_of(source: str) -> int:
    """The seed of "self:SEED".

    Raises:
      TurboqError: SEED is no number in 0..2^32 - 1.
    """
    seed = source.partition(":")[2]
    if not (seed.isascii() and seed.isdecimal() and int(seed) < SEEDS):
        raise TurboqError(f"text {source!r}: {seed!r} must be a seed of 0 to {SEEDS - 1}: self:0")
    return int(seed)


def start_token(tokenizer: Tokenizer) -> int:
    """The token that a window begins with: the BOS that the files name, else their first EOS.

    It is named whether or not the tokenizer puts it in front of a text.

    Raises:
      TurboqError: the files name neither.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    raise TurboqError(
        "self: the model's files name neither a BOS nor an EOS token to begin with: name other "
        "text, such as --text=topics:calibration,source:calibration"
    )


def text_source(model: Model, seed: int) -> TextSource:
    """Name and hash of the endless text of `seed`: of what determines it, not of windows of it."""
    identity = json.dumps(_identity(model, seed), sort_keys=True)
    return TextSource(name=f"self:{seed}", sha256=hashlib.sha256(identity.encode()).hexdigest())


def _identity(model: Model, seed: int) -> dict[str, str]:
    return {
        "model": model.fingerprint,
        "dtype": model.dtype,
        "seed": str(seed),
        "start": str(start_token(model.tokenizer)),
    }


def self_windows(
    model: Model,
    *,
    seed: int,
    length: int,
    count: int,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    batch: int = BATCH,
) -> Int[np.ndarray, "N T"]:
    """Windows 0..count-1 of `seed`, int32, each `length` tokens with the start token.

    All weights are in memory meanwhile, also of a streamed model, and
    2 * batch * length * 4 bytes of keys and values per layer, KV head and channel.

    Args:
      folder: finished windows are kept in a file there and read again by a run of the same model,
        seed and length: killed and run again, it goes on after the last finished batch.
      batch: windows drawn at once.

    Raises:
      TurboqError: no start token, windows longer than the model's context, a damaged file, logits
        that are not finite.
      ValueError: length, count, batch or seed make no sense.
    """
    if length < 2 or count < 1 or batch < 1 or not 0 <= seed < SEEDS:
        raise ValueError(
            f"{length=} must be 2 or more, {count=} and {batch=} 1 or more, {seed=} below 2^32"
        )
    model.spec.check_length(length, f"self:{seed}: windows")
    kept = None if folder is None else Kept(model, seed, length, make_folder(folder))
    done = np.zeros((0, length), np.int32) if kept is None else kept.read()
    if len(done) >= count:
        return done[:count]
    start = start_token(model.tokenizer)
    batches = -(-(count - len(done)) // batch)
    total = (len(done) + batches * batch) * length
    label = f"self:{seed} from {model.tokenizer.decode([start])!r}"
    weights = _weights(model)
    with Progress(total, label=label, done=done.size, enabled=progress) as bar:
        while len(done) < count:
            first = len(done)
            # A batch is always whole, so that a window's arithmetic never depends on `count`.
            numbers = np.arange(first, first + batch, dtype=np.uint32)
            new = _write(model.spec, weights, seed, numbers, start, length, bar)
            done = np.concatenate([done, new])
            if kept is not None:
                kept.write(done)
    return done[:count]


def _write(
    spec: ModelSpec, weights, seed: int, numbers: np.ndarray, start: int, length: int, bar: Progress
) -> Int[np.ndarray, "B T"]:
    batch, steps = len(numbers), min(BLOCK, length - 1)
    blocks = -(-(length - 1) // steps)
    base = jax.random.key(np.uint32(seed), impl="threefry2x32")
    keys = jax.vmap(lambda n: jax.random.fold_in(base, n))(jnp.asarray(numbers))
    token, caches = jnp.full(batch, start, jnp.int32), _caches(spec, batch, blocks * steps)
    tokens = [np.full((batch, 1), start, np.int32)]
    for block in range(blocks):
        at = jnp.int32(block * steps)
        token, caches, drawn, finite = write_block(
            spec, weights, keys, token, at, caches, steps=steps
        )
        if not bool(finite):
            raise TurboqError(
                f"logits of self-written tokens {block * steps + 1} to {(block + 1) * steps} are "
                "not finite"
            )
        tokens.append(np.asarray(drawn))
        real = min(steps, length - 1 - block * steps)
        bar.advance(batch * (real + (block == 0)), f"windows {numbers[0]} to {numbers[-1]}")
    return np.concatenate(tokens, axis=1)[:, :length]  # the last block may run over


@functools.partial(jax.jit, static_argnames=("spec", "steps"), donate_argnames=("caches",))
def write_block(
    spec: ModelSpec,
    weights: tuple[decoder.Params, list[decoder.Params], decoder.Params],
    keys: Key[Array, "B"],
    token: Int[Array, "B"],
    at: Int[Array, ""],
    caches: list[Any],
    *,
    steps: int,
) -> tuple[Int[Array, "B"], list[Any], Int[Array, "B steps"], Bool[Array, ""]]:
    """Draws `steps` tokens after `token` [B], which stands at position `at` of every window.

    Returns the last token, the caches with `steps` more tokens, the tokens drawn, and whether all
    logits were finite.
    """
    embedding, layers, head = weights

    def step(carry, position):
        token, caches, finite = carry
        x = decoder.embed(spec, embedding, token[:, None])
        positions = jnp.broadcast_to(position, (len(token), 1))
        written = []
        for i, (one, params) in enumerate(zip(spec.layers, layers, strict=True)):
            # A borrower writes the same once more into its owner's cache.
            at = one.cache_at(i)
            given = caches[i] if at == i else written[at]
            x, cache = decoder.layer(one, params, x, positions, append_and_attend, given)
            written.append(cache if at == i else ())
            written[at] = cache
        logits = decoder.head(spec, head, x)[:, 0]
        token = draw(logits, keys, position)
        return (token, written, finite & jnp.isfinite(logits).all()), token

    carry = (token, caches, jnp.bool_(True))
    positions = at + jnp.arange(steps, dtype=jnp.int32)
    (token, caches, finite), drawn = jax.lax.scan(step, carry, positions)
    return token, caches, drawn.T, finite


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], position: Int[Array, ""]
) -> Int[Array, "B"]:
    """One token per window from softmax(logits): the arg-max after adding Gumbel noise."""

    def noise(key):
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(keys), axis=-1).astype(jnp.int32)


def append_and_attend(
    spec: LayerSpec,
    q: Float[Array, "B 1 H Q"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K Dv"],
    positions: Int[Array, "B 1"],
    cache: tuple[Float[Array, "B K S D"], Float[Array, "B K S Dv"]],
) -> tuple[Float[Array, "B 1 H Dv"], Any]:
    """The attention plug: one token into the cache at its position, then attention over it.

    Heads come before tokens in the cache: a head's keys lie together, as its products read them.
    Nothing here may copy the cache, which is most of what a step reads.
    """
    at = positions[0, 0]  # all windows are at the same position
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(whole, new.swapaxes(1, 2), at, axis=2)
        for whole, new in zip(cache, (k, v), strict=True)
    )
    batch, _, heads, dim = q.shape
    group = q.reshape(batch, spec.kv_heads, heads // spec.kv_heads, dim)
    product = functools.partial(jnp.einsum, "bkgd,bksd->bkgs", precision=HIGHEST)
    logits = product(group[..., -spec.head_dim :], keys)
    if spec.latent is not None:
        logits += product(group[..., : -spec.head_dim], values)
    logits *= spec.scale
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
    seen = causal(slots[None], window=spec.window)(positions)
    p = jax.nn.softmax(jnp.where(seen[:, None], soft_cap(logits, spec.softcap), -jnp.inf))
    out = jnp.einsum("bkgs,bkse->bkge", p, values, precision=HIGHEST)
    out = out.reshape(batch, 1, heads, -1)
    return out, (keys, values)


def _caches(spec: ModelSpec, batch: int, capacity: int) -> list[Any]:
    """Keys and values of every layer, the state of a recurrent layer, nothing of a borrower."""
    return [
        recurrence.empty(one.recurrent, batch)
        if one.recurrent is not None
        else ()
        if one.borrows_cache_of is not None
        else (
            jnp.zeros((batch, one.kv_heads, capacity, one.head_dim), jnp.float32),
            jnp.zeros((batch, one.kv_heads, capacity, one.v_head_dim), jnp.float32),
        )
        for one in spec.layers
    ]


def _weights(model: Model) -> tuple[decoder.Params, list[decoder.Params], decoder.Params]:
    """All weights at once; a tied embedding is one array."""
    head = model.head_params()
    tied = model.spec.tied_embeddings
    embedding = model.embed_params()
    if tied:
        embedding = embedding | {"embedding": head["unembedding"]}
    layers = [whole(one, model.layer(i)) for i, one in enumerate(model.spec.layers)]
    return embedding, layers, head


class Kept:
    """Finished windows of one model, seed and length in one file of a folder."""

    def __init__(self, model: Model, seed: int, length: int, folder: Path):
        self.length = length
        self.identity = _identity(model, seed) | {"length": str(length)}
        name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"self_{seed}_{name}.safetensors"

    def read(self) -> Int[np.ndarray, "N T"]:
        """The windows that are there, none without a file.

        Raises:
          TurboqError: the file is damaged or of something else.
        """
        if not self.path.is_file():
            return np.zeros((0, self.length), np.int32)
        try:
            with open(self.path, "rb") as f:
                raw = f.read()
            tokens = st_numpy.load(raw)["tokens"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise TurboqError(f"{self.path} is damaged ({shortened(error)}): remove it") from error
        if tokens.dtype != np.int32 or tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise TurboqError(f"{self.path} holds {tokens.dtype}{tokens.shape}: remove it")
        return tokens

    def write(self, tokens: Int[np.ndarray, "N T"]) -> None:
        """All windows so far, in place of those before."""
        atomic_write(self.path, st_numpy.save({"tokens": tokens}, metadata=self.identity))
