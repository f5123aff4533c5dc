"""Everything `turboq memory` answers, as one JSON-ready dict; `memory_report` prints it.

question   what is stored, and everything that takes memory beside it
answer     one dict: bytes of the cache in both views, what fits, choice, cards, estimate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from turboq.errors import TurboqError
from turboq.what_fits.budget import CARDS, GIB, Budget, card_table
from turboq.what_fits.choice import Option, by_quality, choose
from turboq.what_fits.layers import CacheGeometry
from turboq.what_fits.roofline import decode_estimate
from turboq.what_fits.sizes import Formula, baseline, differences
from turboq.what_fits.storage import Storage, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One use of one model. `memory_gib` None: only the table of cards is answered."""

    geometry: CacheGeometry
    storage: Storage
    view: View
    context: int
    sessions: int = 1
    prefix: int = 0
    memory_gib: float | None = None
    weights: int = 0
    weights_from: str = "not counted"
    working: int = 0
    overhead: float = 0.0
    cards: tuple[int | float, ...] = CARDS
    options: tuple[Storage, ...] = ()
    quality_rows: Sequence[dict[str, Any]] = ()
    bandwidth: float | None = None  # bytes per second
    efficiency: float = 1.0

    def __post_init__(self):
        if self.prefix > self.context:
            raise TurboqError(
                f"--prefix={self.prefix} is above --context={self.context}: the shared prefix is "
                "part of the context"
            )

    def budget(self, storage: Storage) -> Budget:
        return Budget(
            cache=storage.cache(self.view),
            sessions=self.sessions,
            prefix=self.prefix,
            weights=self.weights,
            working=self.working,
            state=self.geometry.state_bytes,
            overhead=self.overhead,
        )


def answer(q: Question) -> dict[str, Any]:
    """The answer to every part of the question.

    Raises:
      TurboqError: weights alone do not fit, an option without quality, nothing to estimate from.
    """
    engine, budget = q.storage.engine, q.budget(q.storage)
    kv = budget.cache.kv_bytes(q.context, q.sessions, q.prefix)
    total = kv + budget.cache.fixed_bytes
    plain = baseline(q.geometry.layers, q.context) * q.sessions
    numbers = baseline(q.geometry.layers, 1) // 2  # of one token in all layers
    held = numbers * q.context * q.sessions if q.view == "ours" else plain // 2
    longest, limit = _longest(q, budget)
    return {
        "model": q.geometry.name,
        "codec": q.storage.name,
        "view": q.view,
        "context": q.context,
        "batch": q.sessions,
        "prefix": q.prefix,
        "bytes_per_token": _whole(engine.bits_per_token),
        "bytes_per_token_beyond_windows": _whole(engine.growing_bits),
        "bits_per_channel": engine.bits_per_token / numbers,
        "kv_bytes": kv,
        "total_bytes": total,
        "bf16_bytes": plain,
        "bits_per_channel_at_context": 8 * total / held,
        "views": _views(q),
        "layers": _kinds(engine, q.geometry, q.context),
        "state_bytes": q.geometry.state_bytes * q.sessions,
        "layers_of_unknown_state": q.geometry.unknown_states,
        "weights_bytes": q.weights,
        "working_bytes": q.working,
        "overhead": q.overhead,
        "needed_bytes": budget.needed(q.context),
        "memory_gib": q.memory_gib,
        "max_context": longest,
        "max_context_limited_by": limit,
        "max_sessions": _sessions(q, budget),
        "stored": {s.name: _stored(q, s) for s in q.options or (q.storage,)},
        "cards": _cards(q),
        "choice": _choice(q),
        "estimate": _estimate(q, kv_read=engine_read(engine, q.context)),
        "geometry": {
            "family": q.geometry.family,
            "context": q.geometry.context,
            "above_its_context": q.geometry.context is not None and q.context > q.geometry.context,
            "weights_from": q.weights_from,
            "source": q.geometry.source,
            "note": q.geometry.note,
        },
    }


def engine_read(engine: Formula, context: int) -> int:
    """Bytes that one token's attention reads of one session: the formula, no slack, no pages."""
    return dataclasses.replace(engine, page_tokens=1, window_slack=0).kv_bytes(context)


def _whole(bits: int) -> int | float:
    return bits // 8 if bits % 8 == 0 else bits / 8


def _longest(q: Question, budget: Budget) -> tuple[int | None, str]:
    """The longest context of the memory, or of the model where no memory was given."""
    if q.memory_gib is None:
        return q.geometry.context, "the model"
    return budget.max_context(int(q.memory_gib * GIB)), "the memory"


def _sessions(q: Question, budget: Budget) -> int | None:
    return None if q.memory_gib is None else budget.max_sessions(int(q.memory_gib * GIB), q.context)


def _views(q: Question) -> dict[str, Any]:
    """The formula, the same in whole pages of 256 tokens, what ours holds and why."""
    engine = q.storage.engine
    out: dict[str, Any] = {
        "engine": engine.kv_bytes(q.context, q.sessions, q.prefix),
        "engine_page_tokens": engine.page_tokens,
        "ours": None,
        "difference": {},
    }
    if q.view == "ours":
        ours = q.storage.ours
        exact = dataclasses.replace(engine, page_tokens=1, window_slack=0)
        out["engine"] = exact.kv_bytes(q.context, q.sessions)
        out["engine_page_tokens"] = 1
        out["ours"] = ours.kv_bytes(q.context, q.sessions)
        out["difference"] = differences(engine, ours, context=q.context, batch=q.sessions)
    return out


def _kinds(engine: Formula, geometry: CacheGeometry, context: int) -> list[dict[str, Any]]:
    """Layers that keep the same, together: count, bytes per token, tokens kept, bytes."""
    rows: dict[tuple, dict[str, Any]] = {}
    for size, layer in zip(engine.layers, geometry.layers, strict=True):
        key = (layer.kind, layer.kv_heads, layer.k_dim, layer.v_dim, layer.window, size.bits)
        row = rows.setdefault(
            key,
            {
                "kind": layer.kind,
                "layers": 0,
                "kv_heads": layer.kv_heads,
                "k_dim": layer.k_dim,
                "v_dim": layer.v_dim,
                "index_dim": layer.index_dim,
                "window": layer.window,
                "bytes_per_token": 0,
                "tokens_kept": engine.kept(size, context) if layer.stores else 0,
                "bits": 0,
            },
        )
        row["layers"] += 1
        row["bits"] += size.bits
    for row in rows.values():
        bits = row.pop("bits")
        row["bytes_per_token"] = _whole(bits)
        row["bytes"] = bits * row["tokens_kept"] // 8
    return list(rows.values())


def _stored(q: Question, storage: Storage) -> dict[str, Any]:
    cache = storage.cache(q.view)
    return {
        "bytes_per_token": _whole(storage.engine.bits_per_token),
        "kv_bytes": cache.kv_bytes(q.context, q.sessions, q.prefix),
    }


def _cards(q: Question) -> list[dict[str, Any]]:
    stored = q.options or (q.storage,)
    return [
        {"codec": storage.name} | dataclasses.asdict(card)
        for storage in stored
        for card in card_table(q.budget(storage), q.context, q.cards)
    ]


def _choice(q: Question) -> dict[str, Any] | None:
    if not q.options or q.memory_gib is None:
        return None
    options = [Option(name=s.name, budget=q.budget(s)) for s in q.options]
    if q.quality_rows:
        options = by_quality(options, q.quality_rows)
    chosen, verdicts = choose(options, context=q.context, memory=int(q.memory_gib * GIB))
    return {
        "chosen": None if chosen < 0 else verdicts[chosen].name,
        "order": "measured mean KL" if q.quality_rows else "as listed, best first",
        "options": [dataclasses.asdict(v) for v in verdicts],
    }


def _estimate(q: Question, *, kv_read: int) -> dict[str, Any] | None:
    if q.bandwidth is None:
        return None
    active, every = q.geometry.active, q.geometry.parameters
    return dataclasses.asdict(
        decode_estimate(
            bandwidth=q.bandwidth,
            weights=q.weights,
            cache_read=kv_read + q.geometry.state_bytes,
            sessions=q.sessions,
            active_share=active / every if active and every else 1.0,
            efficiency=q.efficiency,
        )
    )
