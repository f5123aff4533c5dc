"""Multi-head latent attention with the matrices of keys and values absorbed.

    [c, r] = W_down n,  latent = RMS norm of c,  rotated = rope(r)          one per token, all heads
    keys_h = [U_h latent, rotated],   values_h = V_h latent                 [U_h; V_h] rows of W_up
    logit_h = q_h . [U_h latent, rotated] = [U_h^T q_h', q_h''] . [latent, rotated]
    out_h = V_h sum_s p_s latent_s

so attention runs over one head whose value is the latent vector and whose key is [latent, rotated].
The latent vector is cached after its norm, as engines do.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq_calibrate.models.primitives import Params, linear, rms_norm
from turboq_calibrate.models.spec import LayerSpec

HIGHEST = jax.lax.Precision.HIGHEST


def project(
    spec: LayerSpec, params: Params, n: Float[Array, "B T M"]
) -> tuple[Float[Array, "B T H Q"], Float[Array, "B T 1 D"], Float[Array, "B T 1 E"]]:
    """Absorbed queries (Q = E + D), the part to be rotated, latent vectors; nothing is rotated."""
    assert spec.latent is not None
    eps, nope = spec.latent.norm_eps, spec.latent.nope_dim
    if spec.latent.query_rank is None:
        q = linear(n, params, "q")
    else:
        q = rms_norm(linear(n, params, "q_down"), params["q_latent_norm"], eps)
        q = linear(q, params, "q_up")
    q = q.reshape(*n.shape[:2], spec.heads, -1)
    down = linear(n, params, "kv_down")[:, :, None]
    latent = rms_norm(down[..., : spec.v_head_dim], params["latent_norm"], eps)
    keys = _up(spec, params)[:, :nope]
    absorbed = jnp.einsum("bthn,hne->bthe", q[..., :nope], keys, precision=HIGHEST)
    q = jnp.concatenate([absorbed, q[..., nope:]], axis=-1)
    return q, down[..., spec.v_head_dim :], latent


def expand(
    spec: LayerSpec, params: Params, out: Float[Array, "B T H E"]
) -> Float[Array, "B T H V"]:
    """Values of the heads from the latent vectors that attention summed."""
    assert spec.latent is not None
    values = _up(spec, params)[:, spec.latent.nope_dim :]
    return jnp.einsum("bthe,hve->bthv", out, values, precision=HIGHEST)


def _up(spec: LayerSpec, params: Params) -> Float[Array, "H N E"]:
    weight = params["kv_up"].astype(jnp.float32)
    return weight.reshape(spec.heads, -1, spec.v_head_dim)
