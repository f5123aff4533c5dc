"""Small layers in the one pool, and what its kernels must read of them: for tests and devices."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
from tolerances import TOL

from turboq.cache import composed, joint, model_cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy
from turboq.cache.simulate import simulate
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.numbers.rope import Rope
from turboq_kernels import columns

DIM, HEADS, GROUP, SCALE = 24, 3, 2, 0.3
SEGMENTS = [((8, 3), (8, 1)), ((16, 2), (8, 1)), ((24, 4),), ((8, 2),)]
ROPES = {
    "half": Rope(dim=DIM, theta=50.0),
    "partial": Rope(dim=10, theta=9.0, layout="interleaved"),
}
KERNELS = ("mosaic_tpu", "triton")
# Of query heads: between a hundredth and all of what the tokens weigh.
SINK_LOGITS = np.linspace(2.0, 7.0, GROUP * HEADS, dtype=np.float32)
# Compiled as one program each, and not operation by operation.
write = jax.jit(model_cache.write)
attend = jax.jit(
    columns.attend, static_argnames=("scale", "implementation", "interpret", "softcap", "window")
)


@functools.cache
def _fitted(segments, heads, side, gain, dim):
    """A codec and its arrays of some heads; fitted once for all cases."""
    codec = Transform(dim=dim, segments=segments, quantizer="window", states=16, gain=gain)
    rng = np.random.default_rng([len(heads), side])
    x = rng.normal(size=(len(heads), 60, dim)) * 0.8 ** np.arange(dim) + 0.5
    fitted = codec.fit(Observed.of(x.astype(np.float32)))
    return codec, {name: jnp.asarray(a) for name, a in fitted.items()}


def make_layers(rng, policy, rope=None, block=1, gain="code", joined=None, v_dim=DIM):
    """Two layers whose heads have other bits each, K and V alike, in groups out of order.

    `joined`: units of so many heads together. Of values of fewer channels all bits are as many.
    """

    def group(heads, k, v):
        v = v if v_dim == DIM else ((v_dim, 3),)
        (k, k_arrays), (v, v_arrays) = (
            _fitted(x, heads, i, gain, dim) for i, (x, dim) in enumerate(((k, DIM), (v, v_dim)))
        )
        return HeadGroup(heads=heads, k=k, v=v, k_arrays=k_arrays, v_arrays=v_arrays)

    def layer(*groups):
        alone = KVLayer(groups=groups, policy=policy, rope=rope, rope_block=block)
        if joined is None:
            return alone
        shape = joint.shapes(HEADS, joined, DIM, v_dim)
        turn = np.eye(shape["mean"][1]) + 0.05 * rng.normal(size=shape["synthesis"])
        own = {"mean": rng.normal(size=shape["mean"]), "synthesis": turn}
        return composed.join(alone, joined, own)

    a, b, c, d = SEGMENTS
    first = layer(group((0, 2), a, b), group((1,), c, d))
    return [first, layer(group((0, 1, 2), b, c))]


def inputs(rng, t, batch=2):
    shape = 0.8 ** np.arange(DIM)
    k, v = (rng.normal(size=(batch, t, HEADS, DIM)) * shape + 0.5 for _ in range(2))
    q = rng.normal(size=(batch, t, GROUP * HEADS, DIM))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def filled(rng, layers, t, capacity, batch=2):
    """States and pool of layers that hold t tokens, and the last layer's keys and values."""
    states, (words,) = model_cache.init(model_cache.forms(layers), batch=batch, capacity=capacity)
    out = []
    for state in states:
        _, k, v = inputs(rng, t, batch)
        state, words, tail = write(state, words, k, v)
        out.append((state, tail, k, v))
    return out, words


def check(
    rng, names, *, interpret, rope=None, block=1, gain="code", joined=None, tokens=1, sinks=False,
    **options,
):  # fmt: skip
    """Two pages and a bit, other bits in every head, ragged lengths, sinks, a recent window.

    Implementations `names` against decoding by XLA, and float64 of what the codecs store, for the
    last `tokens`; with `sinks` a logit sink of every query head.
    """
    options |= {"sink_logits": SINK_LOGITS} if sinks else {}
    policy = TokenPolicy(sinks=3, recent=2)
    layers = make_layers(rng, policy, rope and ROPES[rope], block, gain, joined)
    held, words = filled(rng, layers, 530, 600)
    # Whose queries are folded, and whose keys are decoded.
    exact = TOL["columns" if joined is None else "columns_joined"]
    off = {
        "triton": TOL["columns_decoded_float16"] if rope and block != 256 else exact,
        "mosaic_tpu": TOL["columns_decoded"] if rope and block < 128 else exact,
    }
    for layer, (state, _, k, v) in zip(layers, held, strict=True):
        q, more_k, more_v = inputs(rng, tokens)
        counts = jnp.array([tokens, 0], jnp.int32)
        state, after, tail = write(state, words, more_k, more_v, counts)
        at = state.lengths[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
        run = functools.partial(attend, q, state, after, tail, q_positions=at, scale=SCALE)
        want = run(implementation="xla", **options)
        # Of the sequence that got tokens.
        whole = [jnp.concatenate(x, axis=1)[:1] for x in ((k, more_k), (v, more_v))]
        every = jnp.zeros((1, 530 + tokens, *q.shape[2:])).at[:, -tokens:].set(q[:1])
        due = kernel_oracle.policy_attention(
            layer, every, *whole, scale=SCALE,
            stored_values=simulate(state.form.layer, *whole), since=530, **options,
        )  # fmt: skip
        for name in names:
            got = run(implementation=name, interpret=interpret, **options)
            decodes = off.get(name) == TOL["columns_decoded"]
            if tokens == 1 and (name == "triton" or (name == "mosaic_tpu" and decodes)):
                traced = run.func.trace(
                    *run.args, **run.keywords, implementation=name, interpret=interpret, **options
                )
                assert "name=turboq_finish" in str(traced.jaxpr), "the general way was taken"
            within = off.get(name, exact)
            np.testing.assert_allclose(got, want, atol=within, err_msg=name)
            np.testing.assert_allclose(got[:1], due, atol=within, err_msg=name)
