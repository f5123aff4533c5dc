"""What quantizers leave of a unit Gaussian at each number of bits.

Curves of sequence codes are measured, which takes seconds to a minute each: they are committed in
`turboq/numbers/distortion_curves.json`. `python -m turboq.codecs.distortion_curves` measures again
and writes them, as it must after a change of these codes.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs.transform import QUANTIZERS
from turboq.files import atomic_write
from turboq.numbers import codebook as codebooks
from turboq.numbers import trellis, trellis_fit, trellis_runs, window

_FILE = "distortion_curves.json"


@functools.cache
def distortion_curve(quantizer: str, states: int = 8, free_start: bool = False) -> np.ndarray:
    """d(b) for b = 0, 1, ...: mean squared error of a unit Gaussian, d(0) = 1 (dropped). Read-only.

    "scalar" is Lloyd-Max in closed form (9 values), "trellis" (7 values) and "window" (9) are
    measured on 1024 Gaussian sequences of 64 (standard error 0.5 %).

    Raises:
      ValueError: unknown quantizer or number of states.
    """
    if quantizer == "scalar":
        d = [codebooks.distortion("gaussian", codebooks.lloyd_max("gaussian", b)) for b in _bits(8)]
    elif quantizer in QUANTIZERS:
        (trellis if quantizer == "trellis" else window).check(states, 1)
        d = _measured()[_name(quantizer, states, free_start)]
    else:
        raise ValueError(f"{quantizer=} must be one of {', '.join(QUANTIZERS)}")
    curve = np.array([1.0, *d])
    curve.setflags(write=False)
    return curve


def measured(quantizer: str, states: int, free_start: bool, bits: int) -> float:
    """d(bits) of a sequence code, measured now."""
    u = jnp.asarray(trellis_fit.samples(1024, 64, seed=1))
    if quantizer == "trellis":
        points = jnp.asarray(trellis.codebook(states, bits), jnp.float32)
        return float(_trellis_mse(states, free_start, points, u))
    return float(_window_mse(window.rows(states, ((64, bits),)), u))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trellis_mse(
    states: int, free: bool, points: Float[Array, "P"], u: Float[Array, "N C"]
) -> Float[Array, ""]:
    runs = ((points, u.shape[1]),)
    codes, start = trellis_runs.encode(states, runs, u, free=free)
    back = trellis_runs.decode(states, runs, codes, start if free else None)
    return jnp.mean(jnp.square(u - back))


@jax.jit
def _window_mse(code: window.Rows, u: Float[Array, "N C"]) -> Float[Array, ""]:
    return jnp.mean(jnp.square(u - window.decode(code, window.encode(code, u))))


@functools.cache
def _measured() -> dict[str, list[float]]:
    return json.loads(resources.files("turboq.numbers").joinpath(_FILE).read_text("utf-8"))


def _name(quantizer: str, states: int, free_start: bool) -> str:
    return f"{quantizer}-{states}" + ("-free" if free_start and quantizer == "trellis" else "")


def _bits(most: int) -> range:
    return range(1, most + 1)


def main() -> None:
    """Measures all curves and writes them."""
    every = [("window", s, False, window.MAX_BITS) for s in window.MEMORY]
    every += [
        ("trellis", s, free, trellis.MAX_BITS)
        for s in trellis.POLYNOMIALS
        for free in (False, True)
    ]
    found = {
        _name(quantizer, states, free): [
            float(f"{measured(quantizer, states, free, bits):.7g}") for bits in _bits(most)
        ]
        for quantizer, states, free, most in every
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(d)}" for name, d in found.items())
    path = Path(codebooks.__file__).with_name(_FILE)
    atomic_write(path, f"{{\n{lines}\n}}\n".encode())


if __name__ == "__main__":
    main()
