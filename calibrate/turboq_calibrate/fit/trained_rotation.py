"""Learned rotations: the basis of `transform` trained with optax on what attention loses.

    z = B (x - mean),  |B e|^2 = e^T M e,   y = R^T z,   sigma_i^2 = sum_j R_ji^2 v_j
    A = diag(1/(sigma m)) R^T B,   S = B^-1 R diag(sigma m),   m = stretch0 exp(s)

R = cayley(X sqrt(min(v_i, v_j) / max(v_i, v_j))) entry by entry: a step of X adds to the smaller
variance of a pair a share of itself, whatever the larger one is. B is the joint basis of
`turboq.codecs.fit_basis` (uncorrelated, variances v), M its metric: with gradients the Fisher
information, and tokens weighted by what they cost; without, the second moment of the head's queries
for K (e^T M e is the squared logit error); for V that is the squared error of the attention
output, E[p^2] weights included, for errors that are uncorrelated between tokens. Free are X and s,
starting at 0; segments and bits are fixed.

The loss of a token is the sum over coordinates of (sigma m)^2 |u - nearest point|^2, dropped
coordinates having the one point 0. It is continuous and piecewise smooth in R and s: with codes
held still its gradient is exact, so no soft or straight-through quantizer is needed. The trellis
trains on the scalar points of its bits; a gain code counts as constant.

Heads of a layer train at once under one jit, and layers of equal shapes share the program. A head
keeps what it learned only if the codec's own error on tokens that training did not see is lower. A
start that was fitted on these tokens too has the advantage there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from turboq.codecs.fit_basis import token_weights
from turboq.codecs.fit_transform import Arrays, HeadFit
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import PaddedTransform, pad_side
from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq_calibrate.fit.orthogonal import cayley, cayley_host
from turboq_calibrate.run.checkpoints import Checkpoints
from turboq_calibrate.run.progress import Progress

Key = tuple[int, str]  # layer index, "k" or "v"
Heads = list[tuple[Transform, Arrays]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rotations are trained: Adam with a cosine decay on random batches of tokens.

    `every` steps run as one program, after which the state is saved; `validation` is the share of
    tokens, the last ones, that training does not see; `emphasis` mixes token weights: 0 counts
    tokens alike, 1 by what they cost (with gradients).

    Raises:
      ValueError: a field out of range, or steps that are no multiple of `every`.
    """

    steps: int = 150
    batch: int = 1024
    learning_rate: float = 0.001
    every: int = 50
    validation: float = 0.25
    emphasis: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.every < 1 or self.steps % self.every:
            raise ValueError(f"{self.steps=} must be a positive multiple of {self.every=}")
        if self.batch < 1 or not self.learning_rate > 0:
            raise ValueError(f"{self.batch=} and {self.learning_rate=} must be positive")
        if not 0 < self.validation < 1 or not 0 <= self.emphasis <= 1:
            raise ValueError(f"{self.validation=} must be in (0, 1), {self.emphasis=} in [0, 1]")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rotated:
    """One side of a layer: codecs with arrays per head, and errors on the validation tokens.

    `start` and `trained` [K] are errors over the signal, e^T M e / z^T z; `accepted` [K] says where
    the trained arrays are in `heads`, elsewhere these are the start's.
    """

    heads: Heads
    start: Float[np.ndarray, "K"]
    trained: Float[np.ndarray, "K"]

    @property
    def accepted(self) -> np.ndarray:
        return self.trained < self.start


def learn_rotations(
    seen: Mapping[Key, Observed],
    starts: Mapping[Key, Heads],
    fits: Mapping[Key, list[HeadFit]],
    folder: Path | str,
    *,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> dict[Key, Rotated]:
    """Trained arrays for every (layer, side) of `starts`, never worse there on validation tokens.

    Args:
      seen: what the fits were made from; gradients, where observed, weigh tokens.
      starts: codec and arrays of every head, of `fit_transform.arrays_of` with these `fits`.
      fits: of `turboq.codecs.fit_transform.fit_heads`; their metric and basis are trained in.
      folder: finished sides and the state of the unfinished one; the same call continues from it,
        with the same result.

    Raises:
      TurboqError: the folder holds results of other inputs, or cannot be written.
      ValueError: arrays that do not belong to the fits, or too few tokens.
    """
    recipe = recipe or Recipe()
    place = make_folder(folder)
    checkpoints = Checkpoints(place / "state")
    work, out = len(starts) * recipe.steps, {}
    finished = sum(_file(place, key).exists() for key in starts)
    try:
        with Progress(
            work, label="rotate", unit="steps", done=finished * recipe.steps, enabled=progress
        ) as bar:
            for key in sorted(starts):
                layer, side = key
                job = _job(seen[key], starts[key], fits[key], recipe)
                found = _read(_file(place, key), job.sha256)
                if found is None:
                    found = _train(job, checkpoints, bar, f"layer {layer} {side}")
                    _write(_file(place, key), job.sha256, found)
                out[key] = _result(job, found)
    finally:
        checkpoints.close()
    return out


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Job:
    """One side of a layer: everything training needs, with a leading head axis."""

    recipe: Recipe
    heads: Heads
    fits: list[HeadFit]
    padded: PaddedTransform
    data: dict[str, Array]  # fit tokens z, weights, v, stretch, points, coded, (gains)
    x: Float[np.ndarray, "K N D"]  # validation tokens
    weights: Float[np.ndarray, "K N"]
    sha256: str


def _job(seen: Observed, heads: Heads, fits: list[HeadFit], recipe: Recipe) -> _Job:
    x = seen.x
    cut = x.shape[1] - int(x.shape[1] * recipe.validation)
    if not 0 < cut < x.shape[1]:
        raise ValueError(f"{x.shape[1]=} tokens with {recipe.validation=} leave a part empty")
    weights = np.ones(x.shape[:2], np.float32)
    z, stretch = [], []
    for h, ((codec, arrays), fit) in enumerate(zip(heads, fits, strict=True)):
        frame = _frame(fit)
        stretch.append(_stretch(codec, arrays, fit))
        z.append((x[h, :cut] - arrays["mean"]) @ frame.T.astype(np.float32))
        if seen.g is not None:
            cost = token_weights(seen.g[h], frame.T @ frame)
            weights[h] = (1 - recipe.emphasis) + recipe.emphasis * cost
    padded, arrays = _padded([_surrogate(c) for c, _ in heads], heads)
    data = {name: arrays[name] for name in ("points", "coded", "gains") if name in arrays}
    data |= {
        "z": np.stack(z),
        "weights": weights[:, :cut],
        "variances": np.stack([f.basis.variances for f in fits]),
        "stretch": np.stack(stretch),
    }
    data = {name: jnp.asarray(a, jnp.float32) for name, a in data.items()}
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe)).encode())
    for codec, start in heads:
        digest.update(json.dumps(codec.config(), sort_keys=True).encode())
        for name in sorted(start):
            digest.update(np.ascontiguousarray(start[name], "<f4").tobytes())
    digest.update(np.ascontiguousarray(x, "<f4").tobytes() + weights.tobytes())
    for fit in fits:
        digest.update(_frame(fit).tobytes())
    return _Job(recipe, heads, fits, padded, data, x[:, cut:], weights[:, cut:], digest.hexdigest())


def _frame(fit: HeadFit) -> np.ndarray:
    """B [D, D], float64."""
    return np.sqrt(fit.basis.variances)[:, None] * fit.basis.analysis


def _stretch(codec: Transform, arrays: Arrays, fit: HeadFit) -> np.ndarray:
    """m of the start [D], 1 where nothing is coded."""
    rows = fit.basis.analysis[: codec.coded]
    m = np.linalg.norm(rows, axis=1) / np.linalg.norm(arrays["analysis"], axis=1)
    if not np.allclose(arrays["analysis"] * m[:, None], rows, atol=1e-4 * np.abs(rows).max()):
        raise ValueError("start arrays do not belong to these fits: their bases differ")
    return np.pad(m, (0, codec.dim - codec.coded), constant_values=1.0)


def _surrogate(codec: Transform) -> Transform:
    """The scalar codec whose points stand for the trellis."""
    if codec.quantizer == "scalar":
        return codec
    return dataclasses.replace(codec, quantizer="scalar", codebook="gaussian", free_start=False)


def _padded(codecs: list[Transform], heads: Heads) -> tuple[PaddedTransform, dict[str, Array]]:
    arrays = [{n: jnp.asarray(v)[None] for n, v in a.items()} for _, a in heads]
    return pad_side(codecs, arrays, [1] * len(arrays))


def loss(
    params: dict[str, Array],
    head: dict[str, Array],
    z: Float[Array, "N D"],
    weights: Float[Array, "N"],
    gain: str,
) -> Float[Array, ""]:
    """Weighted error of tokens z of one head over their weighted signal.

    params: skew [D, D] and spread [D]; head: variances, stretch, points [D, P], coded, (gains).
    """
    v = head["variances"]
    ratio = jnp.minimum(v[:, None], v[None, :]) / jnp.maximum(v[:, None], v[None, :])
    turn = cayley(params["skew"] * jnp.sqrt(ratio))
    highest = jax.lax.Precision.HIGHEST
    y = jnp.matmul(z, turn, precision=highest)
    variances = jnp.matmul(head["variances"], jnp.square(turn), precision=highest)
    sigma = jnp.sqrt(variances) * head["stretch"] * jnp.exp(params["spread"])
    coded = jnp.arange(z.shape[1], dtype=z.dtype) < head["coded"]
    sigma = jnp.where(coded, sigma, 1.0)
    u = y / sigma[None, :]
    scale = jnp.ones(len(z), z.dtype)
    if gain != "none":
        power = jnp.sum(jnp.where(coded[None, :], jnp.square(u), 0.0), axis=1) / head["coded"]
        scale = jnp.sqrt(jnp.maximum(power, 1e-20))
    if gain == "code":
        edges = jnp.sqrt(head["gains"][1:] * head["gains"][:-1])
        code = jnp.sum(scale[:, None] > edges[None, :], axis=1)
        scale = jax.lax.stop_gradient(head["gains"][code])
    points = _nearest(head["points"], jax.lax.stop_gradient(u / scale[:, None]))
    error = jnp.square(sigma[None, :] * (u - scale[:, None] * points))
    signal = jnp.sum(weights * jnp.sum(jnp.square(z), axis=1))
    return jnp.sum(weights * jnp.sum(error, axis=1)) / jnp.maximum(signal, 1e-30)


def _nearest(points: Float[Array, "D P"], t: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Nearest point of every coordinate."""

    def closer(left, point):
        other = t - point[None, :]
        return jnp.where(jnp.abs(other) < jnp.abs(left), other, left), None

    left, _ = jax.lax.scan(closer, t - points[:, 0][None, :], points[:, 1:].T)
    return t - left


@functools.partial(jax.jit, static_argnames=("recipe", "gain"))
def advance(recipe: Recipe, gain: str, state, first: Array, data: dict[str, Array]):
    """`recipe.every` steps of all heads of a side from step `first`; the new state and losses."""
    fixed = {n: a for n, a in data.items() if n not in ("z", "weights")}

    def objective(params, z, weights):
        per_head = jax.vmap(functools.partial(loss, gain=gain))
        losses = per_head(params, fixed, z, weights)
        return jnp.sum(losses), losses

    def step(state, i):
        params, moments = state
        key = jax.random.fold_in(jax.random.key(recipe.seed), i)
        pick = jax.random.randint(key, (recipe.batch,), 0, data["z"].shape[1])
        batch = data["z"][:, pick], data["weights"][:, pick]
        gradient, losses = jax.grad(objective, has_aux=True)(params, *batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
            updates, moments = recipe.optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), losses

    return jax.lax.scan(step, state, first + jnp.arange(recipe.every))


def _initial(job: _Job):
    heads, _, dim = job.data["z"].shape
    params = {
        "skew": jnp.zeros((heads, dim, dim), jnp.float32),
        "spread": jnp.zeros((heads, dim), jnp.float32),
    }
    return params, job.recipe.optimizer.init(params)


def _train(job: _Job, checkpoints: Checkpoints, bar: Progress, name: str) -> dict[str, np.ndarray]:
    """Final skew and spread, continuing from the newest checkpoint where it is of this job."""
    recipe, state, done, last = job.recipe, _initial(job), 0, 0
    mark = int(job.sha256[:15], 16)
    kept = checkpoints.restore()
    if kept is not None:
        (owner, steps, last), named = kept
        if owner == mark:
            leaves, form = jax.tree.flatten(state)
            found = [np.asarray(named[f"leaf{i}"]) for i in range(len(leaves))]
            state, done = form.unflatten([jnp.asarray(x) for x in found]), steps
            bar.advance(done, f"{name}  continued")
        elif steps < recipe.steps:
            raise TurboqError(
                f"{checkpoints.folder} is unfinished training of other inputs: remove its parent "
                f"folder or choose another"
            )
    while done < recipe.steps:
        first = jnp.asarray(done, jnp.int32)
        state, losses = advance(recipe, job.padded.gain, state, first, job.data)
        done, last = done + recipe.every, last + recipe.every
        leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        checkpoints.save(last, (mark, done, last), leaves)
        bar.advance(recipe.every, f"{name}  loss {float(jnp.mean(losses)):.4g}")
    return {name: np.asarray(x) for name, x in state[0].items()}


def _file(folder: Path, key: Key) -> Path:
    return folder / f"layer{key[0]:04d}.{key[1]}.safetensors"


def _write(path: Path, sha256: str, params: dict[str, np.ndarray]) -> None:
    atomic_write(path, safetensors.numpy.save(params, metadata={"inputs": sha256}))


def _read(path: Path, sha256: str) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with safetensors.safe_open(path, framework="numpy") as f:
        if (f.metadata() or {}).get("inputs") != sha256:
            raise TurboqError(f"{path} is of other inputs: remove its folder or choose another")
        return {name: f.get_tensor(name) for name in ("skew", "spread")}


def _result(job: _Job, params: dict[str, np.ndarray]) -> Rotated:
    trained: Heads = [
        (codec, arrays | _arrays(job, h, params)) for h, (codec, arrays) in enumerate(job.heads)
    ]
    errors = [_errors(job, heads) for heads in (job.heads, trained)]
    heads = [b if e[1] < e[0] else a for a, b, *e in zip(job.heads, trained, *errors, strict=True)]
    return Rotated(heads, *errors)


def _arrays(job: _Job, h: int, params: dict[str, np.ndarray]) -> Arrays:
    """analysis and synthesis of one head, from float64."""
    codec, fit = job.heads[h][0], job.fits[h]
    v = fit.basis.variances
    reach = np.sqrt(np.minimum(v[:, None], v) / np.maximum(v[:, None], v))
    turn = cayley_host(params["skew"][h] * reach)[:, : codec.coded]
    stretch = np.asarray(job.data["stretch"][h], np.float64) * np.exp(params["spread"][h])
    sigma = np.sqrt(fit.basis.variances @ turn**2) * stretch[: codec.coded]
    back = fit.basis.synthesis / np.sqrt(fit.basis.variances)[None, :]
    cost = np.square(sigma)
    own = {"weights": (cost / cost.mean()).astype(np.float32)}
    return (own if codec.quantizer == "window" else {}) | {
        "analysis": (turn.T @ _frame(fit) / sigma[:, None]).astype(np.float32),
        "synthesis": (back @ turn * sigma[None, :]).astype(np.float32),
    }


def _errors(job: _Job, heads: Heads) -> Float[np.ndarray, "K"]:
    """Error of the codec itself on the validation tokens over their signal, per head, float64."""
    padded, arrays = _padded([c for c, _ in heads], heads)
    back = np.asarray(_roundtrip(padded, arrays, jnp.asarray(job.x)), np.float64)
    out = []
    for x, x_hat, weights, fit in zip(job.x, back, job.weights, job.fits, strict=True):
        frame, mean = _frame(fit), fit.basis.mean
        e, z = ((a @ frame.T) for a in (x - x_hat, x - mean))
        w = weights.astype(np.float64)
        out.append((w @ np.sum(e * e, axis=1)) / max(w @ np.sum(z * z, axis=1), 1e-300))
    return np.array(out)


@functools.partial(jax.jit, static_argnums=0)
def _roundtrip(codec: PaddedTransform, arrays: dict[str, Array], x: Float[Array, "K N D"]):
    return jax.vmap(lambda a, x: codec.decode(a, codec.encode(a, x)))(arrays, x)
