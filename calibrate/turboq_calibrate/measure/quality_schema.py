"""The shape of `quality.json` and `run.json`, as types that a reader checks every field against.

The values stay JSON (dicts and lists); these classes say which fields there are and of what type.
`turboq.plan.json_file` compares the two: a missing, unknown or mistyped field is one line with its
path. Own fields begin with `x-`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from turboq.plan import json_file
from turboq.plan.errors import PlanError, shown

SCHEMA = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Positions [start, end) of the window; `positions` of them were scored, over all windows."""

    start: int
    end: int
    kl_mean: float | None
    positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """Positions [start, end), by length of context (`metrics.TokenMetrics.by_position`)."""

    start: int
    end: int
    positions: int
    kl_mean: float
    kl_mean_ci: tuple[float, float] | None
    kl_p99: float
    kl_p99_ci: tuple[float, float] | None
    kl_p999: float
    kl_p999_ci: tuple[float, float] | None
    top1: float
    top1_ci: tuple[float, float] | None
    perplexity_ratio: float
    perplexity_ratio_ci: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The last positions of every window, in one pass and token by token through the packed cache.

    difference_ci: interval over windows of `kl_steps` - `kl_one_pass` (None with one window).
    largest: difference of the two at any one position.
    """

    positions: int
    kl_one_pass: float
    kl_steps: float
    difference_ci: tuple[float, float] | None
    largest: float
    top1_one_pass: float
    top1_steps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    sinks: int
    recent: int
    exact_dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One plan on one text. Definitions: `storage_columns`, `metrics.TokenMetrics.summary`.

    quantized_tokens: tokens of all windows that were read quantized.
    scored_positions: positions of all windows that could see one of them; every number on quality
      is over these.
    """

    name: str
    codec: str
    k_codec: str
    v_codec: str
    k_bits: float
    v_bits: float
    bits_per_channel: float
    bits_per_channel_at_context: float
    context: int
    policy: Policy
    bytes_per_token: float
    compression: float
    cache_bytes: dict[str, int]
    text: str
    quantized_tokens: int
    scored_positions: int
    kl_mean: float
    kl_median: float
    kl_ci: tuple[float, float] | None
    kl_p99: float
    kl_windows: tuple[float, ...]
    kl_by_position: tuple[Bucket, ...]
    top1: float
    perplexity: float
    perplexity_exact: float
    perplexity_ratio: float
    bits_per_channel_at_window: float | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    exact_tokens: tuple[int, int] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    kl_p999: float | None = dataclasses.field(default=None, metadata={"optional": True})
    by_position: tuple[Reach, ...] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    steps: Steps | None = dataclasses.field(default=None, metadata={"optional": True})

    def __post_init__(self):
        if not all(key.isdecimal() for key in self.cache_bytes):
            raise ValueError(f"{self.cache_bytes=} must be by number of tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What was measured on. tokens: predicted ones; perplexity: the exact model's, over them."""

    text: str
    windows: int
    window_tokens: int
    tokens: int
    windows_sha256: str
    perplexity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadErrors:
    """[layer] -> numbers of its KV heads, None for a layer without a cache."""

    k_logit_rms: tuple[tuple[float, ...] | None, ...]
    k_rel_mse: tuple[tuple[float, ...] | None, ...]
    v_rel_mse: tuple[tuple[float, ...] | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBits:
    """[layer] -> stored bits per channel of its KV heads, and bytes of one more token of them all.

    None for a layer without a cache.
    """

    k: tuple[tuple[float, ...] | None, ...]
    v: tuple[tuple[float, ...] | None, ...]
    bytes_per_token: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """[layer] -> predicted loss of what is stored of it, nats per token; None without a cache."""

    k: tuple[float | None, ...]
    v: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bootstrap:
    level: float
    samples: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """`quality.json`. head_errors: text -> plan -> errors; head_bits: plan -> bits.

    layer_loss: plan -> what the allocator predicted, of plans within a budget; joint: plans that
    store heads together.
    """

    schema: int
    model: str
    model_fingerprint: str
    attention: str
    bootstrap: Bootstrap
    texts: tuple[Text, ...]
    rows: tuple[Row, ...]
    head_errors: dict[str, dict[str, HeadErrors]] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    head_bits: dict[str, HeadBits] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    layer_loss: dict[str, LayerLoss] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    joint: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"optional": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """`run.json`. command: the one that wrote it, if one did; plans: row -> its folder."""

    seconds: float
    seconds_per_plan_and_window: float | None
    windows_measured: int
    windows_reused: int
    peak_memory_bytes: int
    versions: dict[str, str]
    platform: str
    cpus: int | None
    devices: tuple[str, ...]
    command: str | None = dataclasses.field(default=None, metadata={"optional": True})
    plans: dict[str, str] | None = dataclasses.field(default=None, metadata={"optional": True})


def read_json(path: Path, kind: type, *, otherwise: str) -> dict[str, Any]:
    """`turboq.plan.json_file.read_json`, a table's schema before all else.

    Raises:
      TurboqError: as there, and a table of another schema.
    """

    def schema(value: Any) -> None:
        if kind is Table and isinstance(value, dict) and value.get("schema") != SCHEMA:
            raise PlanError("schema", f"{shown(value.get('schema'))}, this version reads {SCHEMA}")

    return json_file.read_json(path, kind, otherwise=otherwise, first=schema)
