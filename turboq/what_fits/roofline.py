"""A roofline estimate of decode speed from memory bandwidth: an upper bound, never a measurement.

    tokens/s <= sessions * efficiency * bandwidth / (weights read + cache read)     per decode step

One step reads the weights that its tokens use, once, and every session's cache. Compute, launch
overheads, communication and what quantized reading costs in arithmetic are left out, so real
engines are slower; the ratio between two cache formats is what it is good for.
"""

from __future__ import annotations

import dataclasses
import math

from turboq.errors import TurboqError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The estimate and everything it rests on."""

    tokens_per_second: float
    step_bytes: int
    weights_read: int
    cache_read: int
    assumptions: tuple[str, ...]


def decode_estimate(
    *,
    bandwidth: float,
    weights: int,
    cache_read: int,
    sessions: int = 1,
    active_share: float = 1.0,
    efficiency: float = 1.0,
) -> Roofline:
    """Decode tokens per second over all sessions, at most.

    Args:
      bandwidth: of the memory, bytes per second.
      weights: bytes of all weights; `active_share` of them is read for one token.
      cache_read: bytes of one session's cache that one token attends to.
      efficiency: share of the bandwidth that is reached.

    Raises:
      TurboqError: a value out of range, or nothing to read.
    """
    if not 0 < bandwidth < math.inf:
        raise TurboqError(f"{bandwidth=} bytes per second must be positive")
    if not 0 < efficiency <= 1 or not 0 < active_share <= 1:
        raise TurboqError(f"{efficiency=} and {active_share=} must be above 0 and at most 1")
    share = min(1.0, sessions * active_share)
    read = math.ceil(weights * share)
    step = read + sessions * cache_read
    if step <= 0:
        raise TurboqError("nothing is read per step: give the weights or a context")
    experts = "a step reads all weights once"
    if active_share < 1:
        apart = ", no two sessions sharing an expert" if sessions > 1 else ""
        experts = (
            f"a step reads {share:.1%} of the weights: {active_share:.1%} per token (active "
            f"experts){apart}"
        )
    return Roofline(
        tokens_per_second=sessions * efficiency * bandwidth / step,
        step_bytes=step,
        weights_read=read,
        cache_read=sessions * cache_read,
        assumptions=(
            f"{bandwidth / 1e9:g} GB/s at {efficiency:.0%}, memory traffic alone",
            experts,
            f"{sessions} session{'s' if sessions > 1 else ''}, each reading its whole cache at "
            "this context once per token",
            "no compute, launch, communication or dequantization time: real engines are slower",
        ),
    )
