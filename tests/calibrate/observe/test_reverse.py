"""Gradients and what is made of them, against jax.grad of one function of the whole model."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stat_cases import random_windows, windows_of
from tolerances import TOL

from turboq.errors import TurboqError
from turboq.numbers import rope
from turboq_calibrate.models import load_model
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.models.model import forward
from turboq_calibrate.observe import passes
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.placement import Placement
from turboq_calibrate.observe.recipe import ObserveRecipe

GOLDEN = Path(__file__).parents[2] / "golden"
SKIP, SEED = 3, 9

CHUNKS = ObserveRecipe(windows_per_chunk=2)  # several, of few windows


def quiet(model, windows, out, recipe=CHUNKS, **options):
    return observe(model, windows, out, recipe, progress=False, log=lambda line: None, **options)


MODELS = {
    "gemma2": lambda: load_model(GOLDEN / "gemma2"),  # windows, soft caps, norms after
    "qwen2_moe": lambda: load_model(GOLDEN / "qwen2_moe"),  # a dense layer among them, windows
    "smollm3": lambda: load_model(GOLDEN / "smollm3"),  # layers with and without rotation
    "phi3": lambda: load_model(GOLDEN / "phi3"),  # partial rotation, times a factor
    "qwen3_5": lambda: load_model(GOLDEN / "qwen3_5"),  # delta-nets around gated attention
    "deepseek_v2": lambda: load_model(GOLDEN / "deepseek_v2"),  # latent attention, neighbours turn
    "gemma4": lambda: load_model(GOLDEN / "gemma4"),  # caches that two layers read
}


def drawn(logits):
    """Labels as `passes.labels` says it draws them, in float64 by searching sorted sums."""
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    run = math.ceil(math.sqrt(p.shape[-1]))
    out = np.empty(p.shape[:2], np.int32)
    for window in range(p.shape[0]):
        key = jax.random.fold_in(jax.random.key(SEED), window)
        for t, (u, v) in enumerate(np.asarray(jax.random.uniform(key, (p.shape[1], 2)))):
            runs = np.split(p[window, t], range(run, p.shape[-1], run))
            below = np.cumsum([r.sum() for r in runs])
            first = np.searchsorted(below, u * below[-1], side="right")
            inside = np.cumsum(runs[first])
            out[window, t] = first * run + np.searchsorted(inside, v * inside[-1], side="right")
    return out


def oracle(model, tokens):
    """q, k, v of every layer, and the gradients of sum log p(label) at its k and v."""

    def attend(spec, q, k, v, positions, state):
        group = spec.heads // spec.kv_heads
        t = np.arange(q.shape[1])
        seen = t[None, :] <= t[:, None]
        if spec.window is not None:
            seen &= t[None, :] > t[:, None] - spec.window
        keys, values = (x + d for x, d in zip((k, v), state, strict=True))
        if spec.latent is not None:
            keys = jnp.concatenate([values, keys], axis=-1)
        keys, values = (jnp.repeat(x, group, 2) for x in (keys, values))
        scale = spec.softmax_scale or q.shape[-1] ** -0.5
        raw = jnp.einsum("bthd,bshd->bhts", q, keys, precision="highest") * scale
        if spec.softcap is not None:
            raw = spec.softcap * jnp.tanh(raw / spec.softcap)
        p = jax.nn.softmax(jnp.where(seen[None, None], raw, -jnp.inf), axis=-1)
        out = jnp.einsum("bhts,bshd->bthd", p, values, precision="highest")
        return out, (q, k, v)

    offsets = [
        None
        if spec.recurrent is not None
        else tuple(
            jnp.zeros((*tokens.shape, spec.kv_heads, dim))
            for dim in (spec.head_dim, spec.v_head_dim)
        )
        for spec in model.spec.layers
    ]
    logits, kept = forward(model, tokens, attend, offsets)
    labels = jnp.asarray(drawn(logits))

    def score(offsets):
        logits = forward(model, tokens, attend, offsets)[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return jnp.sum(chosen)

    return kept, jax.grad(score)(offsets)


def turned_back(spec, x):
    """x [B, T, h, D] before rotary embedding: pairs are complex numbers, turned back."""
    if spec.rope is None:
        return x
    angle = np.arange(x.shape[1])[:, None] * rope.inverse_frequencies(spec.rope).astype(np.float64)
    first, second = np.arange(spec.rope.dim).reshape(2, -1)
    if spec.rope.layout == "interleaved":
        first, second = np.arange(spec.rope.dim).reshape(-1, 2).T
    z = (x[..., first] + 1j * x[..., second]) * np.exp(-1j * angle)[None, :, None]
    out = np.array(x)
    out[..., first], out[..., second] = z.real, z.imag
    return out


def heads(x):
    """[B, T, K, D] to [K, N, D] without the first tokens of each window."""
    return np.moveaxis(np.asarray(x, np.float64)[:, SKIP:], 2, 0).reshape(
        x.shape[2], -1, x.shape[3]
    )


def close(got, want, tolerance):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=TOL[tolerance] * np.abs(want).max())


@pytest.mark.parametrize("name", MODELS)
def test_everything_a_fit_may_use_equals_the_whole_model(name, tmp_path):
    model = MODELS[name]()
    windows = random_windows(model.spec.vocab, count=5, length=24)
    recipe = ObserveRecipe(skip=SKIP, seed=SEED, windows_per_chunk=2, reservoir=10**6)
    found = quiet(model, windows, tmp_path, recipe)
    kept, gradients = oracle(model, windows.tokens)
    assert found.texts == ("random",)
    for i, spec in enumerate(model.spec.layers):
        if spec.recurrent is not None:  # neither keys nor values
            assert [side.heads for side in found.layers[i].sides.values()] == [0, 0, 0]
            continue
        q, k, v = (np.asarray(x, np.float64) for x in kept[i])
        q = q[..., -spec.head_dim :]
        readers = [n for n, s in enumerate(model.spec.layers) if s.cache_at(n) == i] or [i]
        g_k, g_v = (
            sum(np.asarray(gradients[n][side], np.float64) for n in readers) for side in (0, 1)
        )
        layer = found.layers[i]
        assert ("k_before" in layer.sides) == ("q_before" in layer.sides) == bool(spec.rope)
        cases = {
            ("k", "after"): (k, g_k, q),
            ("k", "before"): tuple(turned_back(spec, x) for x in (k, g_k, q)),
            ("v", "after"): (v, g_v, None),
            ("v", "before"): (v, g_v, None),
        }
        for (side, when), (x, g, queries) in cases.items():
            seen = layer.observed(side, rope=when)
            x, g = heads(x), heads(g)
            n = x.shape[1]
            assert (seen.tokens, seen.text.tolist()) == (n, [0] * n)
            close(seen.x, x, "capture_golden")
            close(seen.g, g, "model_gradient")
            close(seen.mean, x.mean(axis=1), "gradient_moments")
            centered = x - x.mean(axis=1, keepdims=True)
            close(seen.covariance, np.swapaxes(centered, 1, 2) @ centered / n, "gradient_moments")
            close(seen.metric, np.swapaxes(g, 1, 2) @ g / (2 * n), "gradient_moments")
            weight = np.sum(g**2, axis=2, keepdims=True)
            weight /= weight.sum(axis=1, keepdims=True)
            mean = np.sum(weight * x, axis=1)
            centered = x - mean[:, None]
            close(seen.weighted_mean, mean, "gradient_moments")
            weighted = np.swapaxes(weight * centered, 1, 2) @ centered
            close(seen.weighted_covariance, weighted, "gradient_moments")
            turns = side == "k" and when == "after" and spec.rope is not None
            assert seen.rope_layout == (spec.rope.layout if turns else "none")
            assert seen.rope_dim == (spec.rope.dim if turns else None)
            if queries is None:
                assert seen.queries is None
                continue
            y = heads(queries).reshape(spec.kv_heads, -1, spec.head_dim)
            close(seen.queries, np.swapaxes(y, 1, 2) @ y / y.shape[1], "gradient_moments")


def shifted(spec, q, k, v, positions, state):
    """Plug: exact attention with offsets added to k and v."""
    return exact_attend(spec, q, k + state["k"], v + state["v"], positions, None)


@pytest.mark.parametrize("side", ["k", "v"])
def test_gradients_predict_the_kl_of_a_small_error(side, tmp_path):
    """KL = 1/2 E[(sum_s g_s . e_s)^2] to second order; 600 draws have 6 % standard error."""
    model, rng = load_model(GOLDEN / "llama3"), np.random.default_rng(0)
    tokens = rng.integers(0, model.spec.vocab, size=(1, 12)).astype(np.int32)
    recipe = ObserveRecipe(skip=0, windows_per_chunk=200, reservoir=10**6)
    found = quiet(model, windows_of(np.repeat(tokens, 600, axis=0)), tmp_path, recipe)
    errors, total = [], np.zeros(600)
    for i, spec in enumerate(model.spec.layers):
        zero = {"k": np.zeros((1, 12, spec.kv_heads, spec.head_dim), np.float32)}
        zero["v"] = np.zeros((1, 12, spec.kv_heads, spec.v_head_dim), np.float32)
        zero[side] = rng.normal(size=zero[side].shape).astype(np.float32)
        errors.append(zero)
        g = found.layers[i].observed(side).g.reshape(spec.kv_heads, 600, 12, -1)
        total += np.einsum("kbtd,tkd->b", g, zero[side][0])
    due = 0.5 * np.mean(total**2)
    size = np.sqrt(2e-3 / due)  # a KL far above rounding and still quadratic
    scaled = [{n: jnp.asarray(e * size, jnp.float32) for n, e in x.items()} for x in errors]

    def log_p(offsets):
        return np.asarray(jax.nn.log_softmax(forward(model, tokens, shifted, offsets)[0]), float)

    p, q = log_p([jax.tree.map(jnp.zeros_like, e) for e in scaled]), log_p(scaled)
    kl = np.sum(np.exp(p) * (p - q))
    assert abs(kl / (due * size**2) - 1) < 0.25


@pytest.mark.parametrize("size", [1, 2, 5, 16, 49])
def test_labels_follow_the_distribution(rng, size):
    """A grid of uniforms picks every token as often as its probability says."""
    p = rng.dirichlet(np.full(size, 0.5)).astype(np.float32)
    p[rng.integers(size)] = 0.0 if size > 1 else 1.0
    side = 400
    grid = ((np.arange(side) + 0.5) / side).astype(np.float32)
    u = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    rows = jnp.broadcast_to(jnp.asarray(p)[None], (len(u), size))
    counts = np.bincount(np.asarray(passes.labels(rows, jnp.asarray(u))), minlength=size)
    # Each of the two steps is off by less than one of the grid's lines.
    assert np.abs(counts / len(u) - p / p.sum()).max() <= 2 / side
    assert counts[p == 0].sum() == 0
    ends = jnp.asarray([[0.0, 0.0], [1 - 2.0**-24, 1 - 2.0**-24]], jnp.float32)
    assert np.all(p[np.asarray(passes.labels(rows[:2], ends))] > 0)


def test_gradients_that_overflow_are_located(tmp_path, monkeypatch):
    model, whole = load_model(GOLDEN / "qwen3"), Placement.head

    def huge(self, *arguments, **options):
        g, finite = whole(self, *arguments, **options)
        return g / jnp.max(jnp.abs(g)) * 3e38, finite

    monkeypatch.setattr(Placement, "head", huge)
    message = r"in the gradient at .* layer 1 \(model\.layers\.1\.self_attn\), chunk 0 \(windows 0"
    with pytest.raises(TurboqError, match=message):
        quiet(model, random_windows(model.spec.vocab), tmp_path)
    assert not (tmp_path / "statistics" / "manifest.json").exists()


def test_a_bad_head_is_located(tmp_path):
    model = load_model(GOLDEN / "qwen3")
    model._head = model._head | {"norm": model._head["norm"].at[2].set(jnp.nan)}
    message = r"NaN or infinity in the gradient at the input, head, chunk 0 \(windows 0 to 1\)"
    with pytest.raises(TurboqError, match=message):
        quiet(model, random_windows(model.spec.vocab), tmp_path)
