"""Orthogonal matrices as functions of free numbers, for gradient descent: the Cayley transform.

    R(X) = (I + W)^-1 (I - W),   W = X - X^T,   R(0) = I

W is skew, so I + W is normal with singular values sqrt(1 + w^2) >= 1: it always has an inverse, its
condition is at most sqrt(1 + |W|^2), and R is orthogonal to a few roundings whatever X is. Turns by
exactly pi are out of reach, which only costs signs of axes. As R = 2 Y - I with Y = (I + W)^-1, and
dY = -Y dW Y, a gradient costs one inverse and two products. A product of D Householder reflections
reaches everything, but is D dependent steps per evaluation, and no vectors give the identity in a
smooth way.

Source: Cayley (1846); Wen and Yin, "A feasible method for optimization with orthogonality
constraints" (2013), section 2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cayley(x: Float[Array, "*k D D"]) -> Float[Array, "*k D D"]:
    """R(X), orthogonal with determinant 1."""
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return 2 * _inverse(eye + x - jnp.swapaxes(x, -1, -2)) - eye


@jax.custom_vjp
def _inverse(a: Float[Array, "*k D D"]) -> Float[Array, "*k D D"]:
    return jnp.linalg.inv(a)


def _forward(a):
    y = jnp.linalg.inv(a)
    return y, jnp.swapaxes(y, -1, -2)


def _backward(y, g):
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return (-product(product(y, g), y),)


_inverse.defvjp(_forward, _backward)


def cayley_host(x: Float[np.ndarray, "*k D D"]) -> Float[np.ndarray, "*k D D"]:
    """`cayley` in float64."""
    x = np.asarray(x, np.float64)
    w = x - np.swapaxes(x, -1, -2)
    eye = np.broadcast_to(np.eye(x.shape[-1]), x.shape)
    return np.linalg.solve(eye + w, eye - w)
