"""Tokens among the sinks and the recent ones of a pool, by a TPU kernel that appends them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILE = 16  # tokens of a ring that are read and written together: whole tiles of any exact type


@dataclasses.dataclass(frozen=True)
class Token:
    """Where the token of sequence `s` of a grid step goes; `fits` says whether it does."""

    row: Any
    start: Any
    fits: Any
    page: Any  # entry of the table
    slot: Any


def span(ring: int) -> int:
    """Tokens of a ring that are read and written together."""
    return _TILE if ring % _TILE == 0 else ring


def transfer(there, here, scratch, s, out: bool):
    """A copy between the pool and what sequence `s` has of it in `scratch`."""
    if out:
        return pltpu.make_async_copy(here, there, scratch["out"])
    return pltpu.make_async_copy(there, here, scratch["in"].at[s])


def finish(copies: Iterable[Any]) -> None:
    for copy in copies:
        copy.wait()


def put_exact(kept, scratch, each) -> None:
    """The tokens of all heads, as they came, among the first and the last ones."""

    def places(s, at: Token):
        """(buffer in the pool, its copy, slot in that copy, whether it is written)"""
        for name, exact in kept.items():
            for kind, ref in exact.items():
                here = scratch[name]["exact"][kind].at[s]
                if kind == "sinks":
                    yield ref.at[at.row], here, at.start, at.fits & (at.start < ref.shape[2])
                    continue
                count = here.shape[1]
                slot = at.start % ref.shape[2]
                first = pl.multiple_of(slot // count * count, count)
                yield ref.at[at.row, :, pl.ds(first, count), :], here, slot - first, at.fits

    def move(out: bool, wait: bool):
        def one(s, at: Token):
            for there, here, _, written in places(s, at):

                @pl.when(written)
                def _(there=there, here=here):
                    copy = transfer(there, here, scratch, s, out)
                    copy.wait() if wait else copy.start()

        each(one)

    def replace(s, at: Token):
        tokens = (scratch[name]["tokens"].at[s] for name, exact in kept.items() for _ in exact)
        for token, (_, here, slot, _) in zip(tokens, places(s, at), strict=True):
            index = jax.lax.broadcasted_iota(jnp.int32, here.shape, 1)
            old = here[...].astype(jnp.float32)
            here[...] = jnp.where(index == slot, token[...][:, None, :], old).astype(here.dtype)

    move(False, False)
    move(False, True)
    each(replace)
    move(True, False)
    move(True, True)
