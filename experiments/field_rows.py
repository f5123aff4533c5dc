"""The rows that long_context.py and tasks.py compare, by name: ours and the field's; and how.

First 4 tokens exact everywhere; KIVI stores blocks of tokens and keeps up to 31 more exact (15.5 on
average). `learned 2.25 (31 recent exact)` and `turboquant_mse 2b (31 recent exact)` always keep as
many as it does at most; they are made where --rows names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from nova import nova_like

from turboq import codecs as c
from turboq import words
from turboq.cache.layer import TokenPolicy
from turboq.codecs.oscar import CLIP_PERCENT
from turboq.errors import TurboqError
from turboq.plan import ModelGeometry, load
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure.evaluate import NamedPlan
from turboq_calibrate.observe.statistics_files import Statistics

POLICY = TokenPolicy(sinks=4)
RECENT = TokenPolicy(sinks=4, recent=31)
LIKE_KIVI = " (31 recent exact)"
LEARNED = (2.25, 3.25, 1.75)  # bits per channel
TARGET = ("learned 2.25", "turboquant_mse 4b")  # ours loses no more than theirs
Make = Callable[[], NamedPlan]


def makers(
    geometry: ModelGeometry, statistics: Statistics, written: Sequence[str] = ()
) -> dict[str, Make]:
    """Every row by its name; `written`: NAME=FOLDER of learned ones that need not be made again.

    Raises:
      TurboqError: an entry of another form, or whose name is no learned row; a written plan of
        another policy, when its row is made.
    """
    dim = geometry.cache_layers[0].k_dim
    given: dict[str, str] = {}
    for entry in words.split(written):
        name, path = words.labelled(entry)
        known = [*(f"learned {bits:g}" for bits in LEARNED), f"learned 2.25{LIKE_KIVI}"]
        if name not in known:
            raise TurboqError(f"--plan={entry}: must be NAME=FOLDER, NAME of {', '.join(known)}")
        given[name] = path

    def learned(bits: float, policy: TokenPolicy = POLICY) -> NamedPlan:
        name = f"learned {bits:g}{LIKE_KIVI if policy == RECENT else ''}"
        if name in given:
            plan, arrays = load(given[name])
            if plan.tokens != policy:
                raise TurboqError(f"--plan={name}={given[name]}: {plan.tokens} must be {policy}")
            return name, plan, arrays
        wanted = Wanted(budget=Budget.parse(f"{bits}bpc"), policy=policy)
        found = plan_within(statistics, geometry, wanted, progress=False)
        return name, found.plan, found.arrays

    def fixed(name: str, k: c.Codec, v: c.Codec, policy: TokenPolicy = POLICY) -> NamedPlan:
        return name, *make_plan(geometry, k=k, v=v, policy=policy, statistics=statistics)

    def both(name: str, codec: Callable[..., c.Codec], **settings: Any) -> Make:
        def make() -> NamedPlan:
            own = codec(dim=dim, **settings)
            return fixed(name, own, own)

        return make

    def mse(bits: int) -> Make:
        return both(f"turboquant_mse {bits}b", c.TurboQuantMSE, bits=bits)

    def recent() -> NamedPlan:
        own = c.TurboQuantMSE(dim=dim, bits=2)
        return fixed(f"turboquant_mse 2b{LIKE_KIVI}", own, own, RECENT)

    def oscar() -> NamedPlan:
        k, v = (c.Oscar(dim=dim, bits=2, clip_percent=CLIP_PERCENT[side]) for side in "kv")
        return fixed("oscar-like int2", k, v)

    def nova() -> NamedPlan:
        return fixed("nova-like", *nova_like(dim))

    def kivi() -> NamedPlan:
        k, v = c.KiviKey(dim=dim, bits=2, group=32), c.KiviValue(dim=dim, bits=2, group=32)
        return fixed("kivi 2b (up to 31 recent tokens exact)", k, v)

    def blocks(kind: str) -> Make:
        return both(f"{kind} rotated", c.Ggml, type=kind, rotation="walsh")

    return {
        "learned 2.25": lambda: learned(2.25),
        "turboquant_mse 4b": mse(4),
        "learned 3.25": lambda: learned(3.25),
        "turboquant_mse 3b": mse(3),
        "learned 1.75": lambda: learned(1.75),
        "per_head 3b": both("per_head 3b", c.PerHead, bits=3),
        "q4_0 rotated": blocks("q4_0"),
        "kivi 2b": kivi,
        "q8_0 rotated": blocks("q8_0"),
        "oscar-like int2": oscar,
        "nova-like": nova,
        "turboquant_mse 2b": mse(2),
        f"learned 2.25{LIKE_KIVI}": lambda: learned(2.25, RECENT),
        f"turboquant_mse 2b{LIKE_KIVI}": recent,
    }


def usual(made: Iterable[str]) -> list[str]:
    """Rows that are measured unless others are named."""
    return [name for name in made if not name.endswith(LIKE_KIVI)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """The mean of ours minus theirs over the same windows or examples, and in words with its
    95 % bootstrap interval."""
    difference = np.subtract(ours, theirs)
    ci = bootstrap_ci(difference)
    interval = "one alone, no interval" if ci is None else f"{ci[0]:+.4f} .. {ci[1]:+.4f}"
    return difference.mean(), f"difference {difference.mean():+.4f} ({interval})"


def targets(
    found: Mapping[tuple[str, str], tuple[float, Sequence[float]]],
    form: str,
    more_is_better: bool = False,
) -> list[str]:
    """Where the target's two rows were measured: their figures, and whether it is met.

    Args:
      found: figure, and that of every window or example, by (text or task, row).
      form: how a figure is written.
    """
    lines = []
    for where in dict.fromkeys(where for where, _ in found):
        pair = {name: found[where, name] for name in TARGET if (where, name) in found}
        if len(pair) < len(TARGET):
            continue
        each = ", ".join(f"{name} {figure:{form}}" for name, (figure, _) in pair.items())
        more, said = paired(*(own for _, own in pair.values()))
        met = more >= 0 if more_is_better else more <= 0
        lines.append(f"{where}: {each}, {said}: {'met' if met else 'MISSED'}")
    return lines
