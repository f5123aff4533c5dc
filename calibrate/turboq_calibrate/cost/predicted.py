"""What every candidate is predicted to cost, from what was observed alone: no model is run.

With e = x_hat - x of a sampled token, g the gradient of the log likelihood there, F = 1/2 E[g g^T]
the metric of the head and w = g^T F^-1 g over its mean, nats per token on the tokens of one text:

    cost = mean over tokens of  1/2 w e^T F e  +  1/4 (g . e)^2

Both terms estimate the same second-order expansion of the KL: the first smooths over tokens, the
second is exact for the token at hand and noisy. Costs of heads, sides and layers add up. Tokens
that a policy keeps exact are not in the sample.

Source: second-order expansion of the KL, Fisher information with labels drawn from the model
(Martens, "New insights and perspectives on the natural gradient method", 2020, section 5).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.cache.simulate import quantize_dequantize
from turboq.codecs.fit_basis import token_weights
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.plan.build import Side
from turboq_calibrate.candidates.table import Option, Table
from turboq_calibrate.run.progress import Progress

HIGHEST = jax.lax.Precision.HIGHEST


def predicted_costs(
    table: Table, observed: Callable[[int, Side], Observed], *, progress: bool = False
) -> Float[np.ndarray, "U C X"]:
    """Nats per token of every unit and candidate on each of X calibration texts (NaN: no token of
    the text was sampled).

    Candidates whose fit knows its own costs (`Option.costs`) are taken at their word; the others
    are coded on the sample.

    Raises:
      TurboqError: a candidate has to be coded and no gradients were observed.
    """
    costs = []
    with Progress(len(table.options), label="costs", unit="sides", enabled=progress) as bar:
        for layer, side in sorted(table.options):
            options = table.options[layer, side]
            seen = None
            if any(option.costs is None for option in options):
                seen = observed(layer, side)
            costs.append(np.stack([side_costs(option, seen) for option in options], axis=1))
            bar.advance(1)
    return np.concatenate(costs)


def side_costs(option: Option, seen: Observed | None) -> Float[np.ndarray, "K X"]:
    """One candidate of one side of a layer, every KV head and text."""
    if option.costs is not None:
        return option.costs
    if seen is None or seen.g is None:
        raise TurboqError(
            f"{option.codecs[0].name} has no predicted cost without gradients: run `turboq "
            "calibrate` again with a reservoir"
        )
    weights = np.stack(
        [token_weights(g, m) for g, m in zip(seen.g, seen.metric, strict=True)]
    ).astype(np.float32)
    parts = np.empty(seen.x.shape[:2], np.float64)
    for codec, heads, arrays in option.groups:
        at = np.array(heads)
        parts[at] = _token_costs(
            codec,
            jax.tree.map(jnp.asarray, arrays),
            seen.x[at],
            seen.g[at],
            seen.metric[at].astype(np.float32),
            weights[at],
        )
    tokens = np.bincount(seen.text)
    sums = np.stack([np.bincount(seen.text, weights=row) for row in parts])
    return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)


@jax.jit(static_argnames=("codec",))
def _token_costs(
    codec, arrays, x, g, metric: Float[Array, "K D D"], weights: Float[Array, "K N"]
) -> Float[Array, "K N"]:
    back = quantize_dequantize(codec, arrays, jnp.moveaxis(x, 0, 1)[None])[0]
    error = jnp.moveaxis(back, 1, 0) - x
    smooth = jnp.einsum("knd,kde,kne->kn", error, metric, error, precision=HIGHEST)
    own = jnp.square(jnp.einsum("knd,knd->kn", g, error, precision=HIGHEST))
    return 0.5 * weights * smooth + 0.25 * own
