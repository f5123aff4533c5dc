"""Caches as Orbax checkpoints: any pytree of arrays, whole or not at all.

    save_caches(folder, (layers, caches))
    layers, caches = load_caches(folder, like=(layers, empty))

Orbax refuses arrays without elements, which caches have many of (no sinks, no recent window): those
are left out and made again. A checkpoint also holds what tells its form from others (structure,
shapes, capacity), so that none is read as another's. Codecs are part of a `KVLayer`, not of its
`LayerCache`: saved with their layers, caches of other codecs are refused too. States of
`turboq.cache.model_cache` hold their layers themselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from turboq.errors import TurboqError, shortened
from turboq.files import make_folder


def save_caches(folder: str | Path, caches: Any) -> None:
    """Writes the arrays of `caches` to a new folder.

    Raises:
      TurboqError: the folder exists or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise TurboqError(f"{folder} exists: name another folder for these caches, or remove it")
    make_folder(folder.parent)
    kept = {name: leaf for name, leaf in _named(caches) if leaf.size}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, {"form": _form(caches), "arrays": kept})
            checkpointer.wait_until_finished()
    except (OSError, ValueError) as error:
        raise TurboqError(f"cannot write caches to {folder}: {shortened(error)}") from error


def load_caches(folder: str | Path, like: Any) -> Any:
    """The saved caches, in the structure of `like` and on its devices.

    Raises:
      TurboqError: no checkpoint, a damaged one, or one of caches of another form.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise TurboqError(f"{folder} holds no caches: save them with save_caches")
    leaves, form = _named(like), _form(like)
    wanted = {name: _abstract(leaf) for name, leaf in leaves if leaf.size}
    target = {"form": _abstract(form), "arrays": wanted}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Asked before: a restore that fails leaves its threads behind.
            held = checkpointer.metadata(folder).item_metadata
            if held is None or _shapes(held.tree) != _shapes(target):
                raise TurboqError(
                    f"{folder} holds no caches of the shapes of `like`: make it of the plan, batch "
                    "and capacity that they were saved with"
                )
            found = checkpointer.restore(folder, target)
    except (OSError, ValueError, KeyError) as error:
        raise TurboqError(f"{folder} is damaged: {shortened(error)}") from error
    if not np.array_equal(found["form"], form):
        raise TurboqError(
            f"{folder} holds caches of other codecs, capacity or structure (a list is no tuple), or"
            " was written by another version of JAX: make `like` as what was saved"
        )
    arrays = [found["arrays"][n] if leaf.size else jnp.zeros_like(leaf) for n, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _named(caches: Any) -> list[tuple[str, Any]]:
    """(path, array) of every leaf."""
    return [(jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(caches)]


def _form(caches: Any) -> np.ndarray:
    """SHA-256 of everything about `caches` but the values: 32 numbers."""
    shapes = [(name, leaf.shape, str(leaf.dtype)) for name, leaf in _named(caches)]
    text = f"{jax.tree.structure(caches)} {shapes}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def _shapes(tree: Any) -> dict[str, tuple]:
    return {
        jax.tree_util.keystr(path): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
