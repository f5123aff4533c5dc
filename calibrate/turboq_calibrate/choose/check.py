"""The check of a plan before it is written: on windows held back, and at another length.

On windows held back from every calibration text all plans that were tried are measured, the best
uniform `per_head` plan of no more bytes always among them. The best is then measured on longer
windows than were calibrated on, beside `turboquant_mse` of no more bytes: a plan that loses there
has learned its text or its positions, and the next best is taken. For a context beyond the short
windows it is the longer ones that plans are compared on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turboq.codecs import Codec, PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import Measurement, ModelGeometry, Plan
from turboq.plan.geometry import RopeForm
from turboq_calibrate.candidates.table import Arrays
from turboq_calibrate.choose.within import NoPlan
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure.evaluate import evaluate_texts
from turboq_calibrate.measure.scored import plan_scored
from turboq_calibrate.models import Model
from turboq_calibrate.observe.statistics_files import Statistics

Plans = Mapping[str, tuple[Plan, Arrays]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rivals:
    """Uniform plans of no more bytes: more candidates, and what no plan may lose to."""

    candidates: Plans
    baseline: Plans


def uniform_bits(limit: int, channels_k: int, channels_v: int, vectors: int, scale: int = 16):
    """Bits (K, V) of the largest uniform plan of codes and one `scale`-bit number per vector.

    Keys get the bit that is left over: their errors cost more. None: nothing fits.
    """
    best = None
    for k in range(1, 9):
        for v in range(max(1, k - 1), min(8, k + 1) + 1):
            size = k * channels_k + v * channels_v + vectors * scale
            if size <= limit and (best is None or (size, k) > best[0]):
                best = ((size, k), (k, v))
    return None if best is None else best[1]


def rivals(
    statistics: Statistics, geometry: ModelGeometry, plan: Plan, *, k_rope: RopeForm
) -> Rivals:
    """The largest `per_head` and `turboquant_mse` plans within the bytes of `plan`."""
    layers = geometry.cache_layers
    bits = uniform_bits(
        plan.bytes.bits_per_token,
        sum(x.kv_heads * x.k_dim for x in layers),
        sum(x.kv_heads * x.v_dim for x in layers),
        2 * sum(x.kv_heads for x in layers),
    )
    if bits is None:
        return Rivals(candidates={}, baseline={})
    first = layers[0]

    def pair(kind: type[PerHead] | type[TurboQuantMSE]) -> tuple[Codec, Codec]:
        return kind(dim=first.k_dim, bits=bits[0]), kind(dim=first.v_dim, bits=bits[1])

    k, v = pair(PerHead)
    own = make_plan(geometry, k=k, v=v, policy=plan.tokens, statistics=statistics, k_rope=k_rope)
    k, v = pair(TurboQuantMSE)
    free = make_plan(geometry, k=k, v=v, policy=plan.tokens)
    label = f"{bits[0]}b" if bits[0] == bits[1] else f"{bits[0]}b+{bits[1]}b"
    return Rivals(candidates={f"per_head {label}": own}, baseline={f"turboquant_mse {label}": free})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What the check found: mean KL in nats per token by plan, text and window length.

    `length` is that of the windows by which plans are compared, `shares` of their positions those
    at which a plan shows a quantized token, `objective` how texts are joined, `weights` what each
    counts for in their mean.
    `refused` are plans that would have been kept and lost at a length: (plan, text, tokens).
    """

    kept: str
    kl: dict[str, dict[str, dict[int, float]]]
    length: int
    shares: Mapping[str, float]
    objective: str
    weights: Mapping[str, float]
    refused: tuple[tuple[str, str, int], ...] = ()

    def loss(self, name: str) -> float:
        """Of one plan, over all positions of a window: mean over the texts, or the worst of them.

        Where nothing quantized is seen nothing is lost: so plans with more exact tokens compare.
        """
        share = self.shares[name]
        each = {
            text: share * at[self.length] for text, at in self.kl[name].items() if self.length in at
        }
        if self.objective == "worst":
            return max(each.values())
        total = sum(self.weights[text] for text in each)
        return sum(self.weights[text] * kl for text, kl in each.items()) / total

    def report(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kept": self.kept,
            "judged_tokens": self.length,
            "kl": {
                name: {text: {str(n): v for n, v in at.items()} for text, at in texts.items()}
                for name, texts in self.kl.items()
            },
            "refused": [list(row) for row in self.refused],
        }

    def measurements(self, name: str) -> tuple[Measurement, ...]:
        """Of one plan, as a plan carries them."""
        return tuple(
            Measurement(text=f"{text} (held back, {n} tokens)", kl_mean=kl)
            for text, at in self.kl[name].items()
            for n, kl in at.items()
        )

    def table(self) -> str:
        """Plans x (text, length), for people."""
        columns = list(dict.fromkeys(
            (text, n) for texts in self.kl.values() for text, at in texts.items() for n in at
        ))  # fmt: skip
        head = ["held back, KL", *(f"{text} {n}" for text, n in columns)]
        lines = [head]
        for name, texts in self.kl.items():
            cells = [texts.get(text, {}).get(n) for text, n in columns]
            mark = " (kept)" if name == self.kept else ""
            lines.append([name + mark, *("" if x is None else f"{x:.4g}" for x in cells)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def judged(plan: Plan, length: int) -> float:
    """Share of a window's positions at which a plan shows a quantized token.

    Raises:
      TurboqError: of no position.
    """
    return 1 - plan_scored(plan, length).first / (length - 1)


def check_plans(
    model: Model,
    statistics: Statistics,
    plans: Plans,
    baselines: Plans,
    beside: Mapping[str, str],
    *,
    context: int | None = None,
    objective: str = "mean",
    folder: Path | None = None,
    force: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> Checked:
    """The plan that is kept.

    Args:
      baselines, beside: uniform plans, and by a plan's name that of the one it may not lose to.
      context: tokens that the plan is for: beyond the short windows the long ones decide.

    Raises:
      TurboqError: statistics hold no check windows.
      NoPlan: every plan loses to the baseline at a length and `force` is not given.
    """
    names, held = statistics.texts, statistics.held_back
    short = {names[text]: windows for text, windows in held.short.items()}
    long = {names[text]: windows for text, windows in held.long.items()}
    if not short:
        raise TurboqError(
            f"statistics in {statistics.folder} hold no windows to check on: run `turboq "
            "calibrate` with --check_windows=1 or more, or `turboq plan` with --nocheck"
        )
    every = {**plans, **baselines}
    kl: dict[str, dict[str, dict[int, float]]] = {name: {} for name in every}

    def measured(which: Plans, texts: Mapping[str, Any]) -> None:
        rows = [(name, plan, arrays) for name, (plan, arrays) in which.items()]
        found = evaluate_texts(model, rows, texts, folder=folder, progress=progress)
        for row in found.rows:
            at = kl[row["name"]].setdefault(row["text"], {})
            at[texts[row["text"]].shape[1]] = row["kl_mean"]
            if not math.isfinite(row["kl_mean"]):
                raise TurboqError(
                    f"the check measured a KL that is not finite: {row['name']} on {row['text']}"
                )

    measured(every, short)
    length = next(iter(short.values())).shape[1]
    at_length = bool(long) and context is not None and context > length
    if at_length:
        measured(every, long)
        length = next(iter(long.values())).shape[1]
    found = Checked(
        kept="",
        kl=kl,
        length=length,
        shares={name: judged(plan, length) for name, (plan, _) in every.items()},
        objective=objective,
        weights=dict(zip(names, statistics.weights.tolist(), strict=True)),
    )
    order = sorted(plans, key=found.loss)
    refused: list[tuple[str, str, int]] = []
    for name in order:
        other = beside.get(name)
        if not long or other is None:
            return dataclasses.replace(found, kept=name, refused=tuple(refused))
        if not at_length:
            measured({name: plans[name], other: baselines[other]}, long)
        lost = [
            (name, text, windows.shape[1])
            for text, windows in long.items()
            if kl[name][text][windows.shape[1]] > kl[other][text][windows.shape[1]]
        ]
        if not lost:
            return dataclasses.replace(found, kept=name, refused=tuple(refused))
        refused += lost
        for plan, text, tokens in lost:
            log(f"{plan} loses to {other} at {tokens} tokens of {text}: not kept")
    if force:
        log(f"--force: {order[0]} is kept although it loses")
        return dataclasses.replace(found, kept=order[0], refused=tuple(refused))
    at = ", ".join(sorted({f"{tokens} tokens of {text}" for _, text, tokens in refused}))
    raise NoPlan(
        f"every plan within the budget loses to {', '.join(baselines)} of the same bytes at {at}: "
        "calibrate on more kinds of text or longer windows, or keep the best with --force"
    )
