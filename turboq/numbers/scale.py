"""Scale rules: which multiple of the codebook values stands for a vector. All cost the same bits.

With u = y / rms(y) (so |u|^2 = D), c the codebook values of u, and x_hat = scale * c:

    rule           scale / rms        error E|x - x_hat|^2 / |x|^2   (D_b: Lloyd-Max distortion)
    raw            1                  D_b             TurboQuant, arXiv 2504.19874, Algorithm 1
    matched        |u| / |c|          2 - 2 sqrt(1 - D_b)            keeps the norm
    unbiased       |u|^2 / <u, c>     D_b / (1 - D_b)                EDEN/RaBitQ: <x, x_hat> = |x|^2
    least_squares  <u, c> / |c|^2     D_b, slightly below            smallest error for this vector

The three corrections tend to 1 as D grows (Ben-Basat et al., arXiv 2604.18555).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

RULES = ("raw", "matched", "unbiased", "least_squares")


def unit_rms(
    x: Float[Array, "*n D"],
) -> tuple[Float[Array, "*n D"], Float[Array, "*n"]]:
    """x = rms * u with mean(u^2) = 1, without overflow or underflow of the squares in float32.

    A vector with no entry above 4.7e-38 (four times the least normal float32) has u = 0 and rms =
    0. NaN or Inf in x gives a NaN rms, so it shows in what is stored.
    """
    peak = jnp.max(jnp.abs(x), axis=-1)
    zero = peak < 4 * np.finfo(np.float32).tiny
    # XLA divides by multiplying with the reciprocal, which it flushes to zero when subnormal: a
    # quarter of the peak keeps the reciprocal normal up to the largest float32.
    # XLA's maximum on a CPU drops NaN in long reductions: 0 * NaN keeps what `zero` then hides.
    v = x * jnp.where(zero, 0.0, 0.25)[..., None] / jnp.where(zero, 1.0, peak * 0.25)[..., None]
    square = jnp.mean(v * v, axis=-1)
    root = jnp.sqrt(jnp.where(zero, 1.0, square))
    return v / root[..., None], jnp.where(zero, square, peak * root)


def vector_scale(
    rule: str,
    u: Float[Array, "*n D"],
    c: Float[Array, "*n D"],
    rms: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Scale per vector (units of x) by one of `RULES`.

    Where the rule's denominator is not positive (u = 0, c = 0, or codes uncorrelated with the
    vector under `unbiased`) the scale is 0: such a vector is stored as zero.

    Raises:
      ValueError: unknown rule.
    """
    if rule == "raw":
        return rms
    if rule not in RULES:
        raise ValueError(f"{rule=} must be one of {RULES}")
    uc = jnp.sum(u * c, axis=-1)
    uu = jnp.sum(u * u, axis=-1)
    cc = jnp.sum(c * c, axis=-1)
    top, bottom = {
        "matched": (jnp.sqrt(uu * cc), cc),
        "unbiased": (uu, uc),
        "least_squares": (uc, cc),
    }[rule]
    # `<= 0`, not `> 0`: a NaN denominator must stay NaN instead of becoming a quiet zero.
    return rms * jnp.where(bottom <= 0, 0.0, top / jnp.where(bottom <= 0, 1.0, bottom))
