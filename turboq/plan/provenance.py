"""Where a plan comes from and how good it is: small records that travel with it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from turboq.plan.geometry import check_named

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_sha256(value: str) -> None:
    """Raises ValueError unless `value` is 64 lower-case hex digits."""
    if not _SHA256.fullmatch(value):
        raise ValueError(f"sha256={value[:80]!r} must be 64 lower-case hex digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """A calibration text by name and hash of its bytes."""

    name: str
    sha256: str

    def __post_init__(self):
        check_named("name", self.name)
        check_sha256(self.sha256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the plan was fitted on. No times and no machine: two equal runs write equal bytes.

    `tokens` counts calibration tokens, `max_position` the longest window (rotary keys were seen
    up to that position), `recipe` is the JSON of whatever was configured, `statistics` the
    fingerprint of the captured statistics.
    """

    texts: tuple[TextSource, ...] = ()
    tokens: int = 0
    max_position: int | None = None
    seed: int | None = None
    statistics: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("tokens", "max_position"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be zero or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Quality on one text against the model's own exact cache. KL in nats per token."""

    text: str
    kl_mean: float
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_ci: tuple[float, float] | None = None
    top1: float | None = None
    perplexity: float | None = None

    def __post_init__(self):
        check_named("text", self.text)
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise ValueError(f"top1={self.top1} must be a fraction 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """What the planner expected and what the evaluation found."""

    predicted: Measurement | None = None
    measured: tuple[Measurement, ...] = ()
