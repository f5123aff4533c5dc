"""One's own flax.nnx transformer on a learned packed cache: everything that it takes.

    python experiments/own_model.py --out=runs/own_model

The model below is any model: its one seam is `attend(q, k, v, positions, state)`, which a block
calls where it would otherwise call attention. Nothing is trained; random weights are enough to show

    observe     run it with a plug that hands back keys (before RoPE) and values
    plan        a codec per (layer, head, K or V), fitted to them, saved as plan.json
    decode      a prompt and greedy steps through the packed cache of the plan: one program for the
                prompt and one for a step, a scan over the layers, the cache donated and so written
                in place
    checkpoint  stop in the middle, write the caches with Orbax, read them, go on

and prints what the cache takes, how far its logits are from those of plain attention, and whether
the continued run says the same. Half a minute on two cores.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from jaxtyping import Array, Float, Int

from turboq.cache import model_cache, overflow
from turboq.cache.exact_attention import attention
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Transform
from turboq.codecs.observed import Observed
from turboq.numbers.rope import Rope, rotate, unrotate
from turboq.plan import LayerGeometry, ModelGeometry, Plan, collect_arrays, head_plan, load, save
from turboq_calibrate.run.cache_files import load_caches, save_caches

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 4, 4, 2, 32, 96, 256
BATCH, PROMPT, CALIBRATION = 2, 40, 128
ROPE = Rope(dim=DIM, theta=1e4)
SCALE = DIM**-0.5

# q [B, T, H, D], k and v [B, T, K, D], positions [B, T], and what the cache is between calls.
Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


class Block(nnx.Module):
    """A layer: attention through the seam, then an MLP."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.before = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = linear(HEADS * DIM, WIDTH)
        self.between = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def __call__(self, x: Float[Array, "B T M"], positions: Array, attend: Attend, state: Any):
        heads = self.qkv(self.before(x)).reshape(*x.shape[:2], -1, DIM)
        q, k, v = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2)
        q, k = (rotate(ROPE, y, positions[:, :, None]) for y in (q, k))
        out, state = attend(q, k, v, positions, state)  # the seam
        x = x + self.out(out.reshape(*x.shape[:2], -1))
        return x + self.down(nnx.silu(self.up(self.between(x)))), state


class Transformer(nnx.Module):
    """Layers are one module whose weights have a leading axis: a scan goes through them."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.unembed = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        states: Any,
        shared: Any = None,
    ):
        """Logits [B, T, V], the states of the layers, and what they share (a pool of pages)."""
        graph, weights = nnx.split(self.blocks)

        def layer(carry, own):
            (x, shared), (weights, state) = carry, own
            x, (state, shared) = nnx.merge(graph, weights)(x, positions, attend, (state, shared))
            return (x, shared), state

        first = self.embed(tokens), shared
        (x, shared), states = jax.lax.scan(layer, first, (weights, states))
        return self.unembed(self.norm(x)), states, shared


def plain(q, k, v, positions, state):
    """Attention without a cache; hands back keys as they were before RoPE, and values."""
    out = attention(q, k, v, scale=SCALE)
    return out, ((unrotate(ROPE, k, positions[:, :, None]), v), state[1])


def packed(q, k, v, positions, state):
    """The same seam through turboq's cache: write, then attend to what is stored."""
    own, words = state
    own, words, tail = model_cache.write(own, words, k, v)
    out = model_cache.attend(q, own, words, tail, q_positions=positions, scale=SCALE)
    return out, (own, words)


def at(start: Any, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions of tokens that begin at `start`."""
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32) + jnp.int32(start)
    return jnp.broadcast_to(steps[None], tokens.shape)


def geometry() -> ModelGeometry:
    """What a plan must know of the model. The fingerprint is whatever tells its weights apart."""
    layers = [
        LayerGeometry(
            index=i, path=f"blocks.{i}", kv_heads=KV_HEADS, q_heads=HEADS,
            k_dim=DIM, v_dim=DIM, rope=ROPE,
        )
        for i in range(LAYERS)
    ]  # fmt: skip
    return ModelGeometry(fingerprint="own:1", family="own", name="own model", layers=tuple(layers))


def planned(model: Transformer, policy: TokenPolicy) -> tuple[Plan, dict[str, np.ndarray]]:
    """A plan whose heads differ in bits, fitted to what the model's own keys and values are."""
    tokens = jax.random.randint(jax.random.key(1), (8, CALIBRATION), 0, VOCAB)
    _, seen, _ = model(tokens, at(0, tokens), plain, jnp.arange(LAYERS))
    bits = {0: ((16, 3), (16, 2)), 1: ((16, 4), (8, 2))}

    def choose(layer: int, side: str, head: int) -> Transform:
        return Transform(dim=DIM, segments=bits[(layer + head) % 2], gain="code", gain_bits=4)

    def fit(layer: int, side: str, codec):
        x = np.asarray(seen[side == "v"][layer])  # [B, T, K, D]
        return codec.fit(Observed.of(x.transpose(2, 0, 1, 3).reshape(KV_HEADS, -1, DIM)))

    plan = head_plan(geometry(), choose, k_rope="before", policy=policy)
    return plan, collect_arrays(plan, fit)


def stacked(plan: Plan, arrays, capacity: int):
    """Empty caches: states of the layers with a leading axis, for the scan, and the pool."""
    form = model_cache.forms(plan.kv_layers(arrays))
    assert form is not None  # all codecs are transforms of one kind
    states, (words,) = model_cache.init(form, batch=BATCH, capacity=capacity)  # no window: one pool
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), words


def run(out: Path, steps: int, policy: TokenPolicy) -> dict[str, Any]:
    """All of it; what is printed."""
    model = Transformer(nnx.Rngs(0))
    save(*planned(model, policy), out)
    plan, arrays = load(out)
    prompt = jax.random.randint(jax.random.key(2), (BATCH, PROMPT), 0, VOCAB)

    graph, weights = nnx.split(model)

    # The cache is donated: its buffers are written in place, and the old ones are gone.
    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def forward(weights, tokens, start, states, words):
        positions = at(start, tokens)
        logits, states, words = nnx.merge(graph, weights)(tokens, positions, packed, states, words)
        return logits[:, -1], states, words

    half = steps // 2
    empty = functools.partial(stacked, plan, arrays, PROMPT + steps)
    logits, *caches = forward(weights, prompt, jnp.int32(0), *empty())
    found = [(jnp.argmax(logits, axis=-1, keepdims=True), logits)]
    # Compiled by itself, so that it can be asked what it does in place.
    decode = forward.lower(weights, found[0][0], jnp.int32(0), *caches).compile()

    def go_on(found, until, caches):
        """`found` with what follows, up to `until` tokens, and the caches behind them."""
        found = list(found)
        while len(found) < until:
            start = jnp.int32(PROMPT + len(found) - 1)
            logits, *caches = decode(weights, found[-1][0], start, *caches)
            found.append((jnp.argmax(logits, axis=-1, keepdims=True), logits))
        overflow.check(caches)  # a compiled step cannot raise: asked afterwards
        return found, tuple(caches)

    first, caches = go_on(found, half, caches)
    shutil.rmtree(out / "caches", ignore_errors=True)
    save_caches(out / "caches", caches)
    found, (states, words) = go_on(first, steps, caches)
    again, _ = go_on(first, steps, load_caches(out / "caches", like=empty()))

    # The same tokens by plain attention, in one pass.
    generated = [tokens for tokens, _ in found]
    whole = jnp.concatenate([prompt, *generated[:-1]], axis=1)
    exact, _, _ = model(whole, at(0, whole), plain, jnp.arange(LAYERS))
    ours = jnp.stack([logits for _, logits in found], axis=1)
    log_p, log_q = (jax.nn.log_softmax(x) for x in (exact[:, PROMPT - 1 :], ours))
    kl = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    memory = decode.memory_analysis()
    pairs = zip(found, again, strict=True)
    return {
        "bits per channel": plan.bytes.bits_per_channel,
        "bytes per token": plan.bytes_per_token,
        "bytes per token in bfloat16": 2 * 2 * LAYERS * KV_HEADS * DIM,
        "KL to plain attention, nats per token": float(kl),
        "bytes of the caches": states.nbytes + words.nbytes,
        "bytes that a step writes in place": memory.alias_size_in_bytes if memory else None,
        "continued from the checkpoint alike": all(
            np.array_equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)
        ),
        "tokens": np.concatenate(generated, axis=1).tolist(),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax says much
    for name, value in run(Path(flags.FLAGS.out), flags.FLAGS.steps, TokenPolicy(sinks=4)).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    app.run(main)
