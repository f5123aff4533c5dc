"""What some windows measured, as arrays and as a file: the unit that an interruption keeps.

    exact          [1, B, P]      NLL of the exact model, nats
    kl, nll, top1  [plans, B, P]  `metrics.compare`, at every position that predicts a token
    steps.*        [plans, B, S]  kl and top1 of the last S positions, token by token
    errors.i.*     [plans, B, K]  `attention_plugs.head_errors` of layer i

All float64, of B windows with P = T - 1 positions each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int

from turboq.errors import TurboqError, shortened
from turboq.files import atomic_write
from turboq.plan import Plan, document
from turboq.version import __version__
from turboq_calibrate.models import Model
from turboq_calibrate.models.spec import ModelSpec

Measured = dict[str, np.ndarray]
TOKENS = ("kl", "nll", "top1")
STEPS = ("kl", "top1")
ERRORS = ("k_logit_mse", "k_rel_mse", "v_rel_mse")


def shapes(
    spec: ModelSpec, plans: int, windows: tuple[int, int], steps: int
) -> dict[str, tuple[int, ...]]:
    """What there is, and its shape, of `windows` = (B, T)."""
    count, positions = windows[0], windows[1] - 1
    found: dict[str, tuple[int, ...]] = {"exact": (1, count, positions)}
    found |= dict.fromkeys(TOKENS, (plans, count, positions))
    found |= {f"steps.{name}": (plans, count, steps) for name in STEPS if steps}
    for i, layer in enumerate(spec.layers):
        if layer.owns_cache:
            found |= {f"errors.{i}.{name}": (plans, count, layer.kv_heads) for name in ERRORS}
    return found


def join(batches: Sequence[Measured]) -> Measured:
    """All windows of one text."""
    return {name: np.concatenate([x[name] for x in batches], axis=1) for name in batches[0]}


def write(path: Path, measured: Measured) -> None:
    """The file, whole or not at all."""
    atomic_write(path, safetensors.numpy.save(measured))


def read(path: Path, due: dict[str, tuple[int, ...]]) -> Measured | None:
    """What `write` wrote; None where there is no file.

    Raises:
      TurboqError: the file does not hold exactly the arrays that are `due`.
    """
    if not path.exists():
        return None
    try:
        found = safetensors.numpy.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise TurboqError(f"{path}: {shortened(error)}: remove it to measure it again") from error
    if {name: x.shape for name, x in found.items()} != due or any(
        x.dtype != np.float64 for x in found.values()
    ):
        raise TurboqError(f"{path}: other arrays than are due: remove it to measure it again")
    return found


def file_name(
    model: Model,
    plans: Sequence[tuple[str, Plan, dict[str, np.ndarray]]],
    windows: Int[np.ndarray, "B T"],
    how: dict[str, Any],
) -> str:
    """File of these plans on these windows: a hash of all that its numbers follow from."""
    inputs = [
        [__version__, jax.__version__, jax.default_backend()],
        [model.fingerprint, model.dtype],
        [windows.shape, sha256(windows)],
        how,
        [(document(plan)["hash"], arrays_sha256(arrays)) for _, plan, arrays in plans],
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32] + ".safetensors"


def sha256(windows: Int[np.ndarray, "N T"]) -> str:
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype.str} {x.shape}\n".encode() + x.tobytes())
    return digest.hexdigest()
