"""How many exact sinks, and how many exact recent tokens, and what do they cost?

    python experiments/ablations/sinks_and_window.py

`per_head` at 3 bits with sinks 0, 1, 4, 16 and recent windows 0, 32, 128. Their bytes are counted
in `bits_per_channel_at_context` (at the model's context). Expected: the first sink and the recent
window matter most; beyond 4 sinks nothing.
"""

from study import Arm, Bench, run

from turboq.cache.layer import TokenPolicy
from turboq.codecs import PerHead


def arms(bench: Bench) -> list[Arm]:
    codec = PerHead(dim=bench.dim, bits=3, seed=bench.seed)

    def arm(sinks: int, recent: int, baseline: str | None) -> Arm:
        return bench.arm(
            f"sinks {sinks} recent {recent}", codec, group=f"recent {recent}", baseline=baseline,
            policy=TokenPolicy(sinks=sinks, recent=recent),
        )  # fmt: skip

    base = "sinks 4 recent 0"
    out = [arm(4, 0, None)]
    out += [arm(sinks, 0, base) for sinks in (0, 1, 16)]
    out += [arm(4, recent, base) for recent in (32, 128)]
    return [*out, arm(0, 32, "sinks 4 recent 32")]


if __name__ == "__main__":
    run(__file__, __doc__, arms)
