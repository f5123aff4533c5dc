"""The context wall: memory needed against context for each way of storing the cache, and the cards.

A curve that crosses a card's line has hit the wall: the mark there says at how many tokens.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from turboq.errors import TurboqError
from turboq.files import atomic_write
from turboq.what_fits.budget import GIB, Budget
from turboq_calibrate.measure.pictures import STYLE

FORMATS = (".svg", ".png")
_INK, _SOFT, _PAPER = "#1d2329", "#8b95a1", "#ffffff"
# Mid-tones of the report, a marker each, so that no curve is told by colour alone.
_LOOKS = (
    ("#2f7fd1", "o"), ("#d4660a", "^"), ("#0e9268", "D"), ("#9a63d6", "v"), ("#c2487f", "P"),
    ("#8a7a12", "X"), ("#3f8f9b", "*"), ("#7d858f", "s"),
)  # fmt: skip


def context_wall(
    path: str | Path,
    budgets: Sequence[tuple[str, Budget]],
    *,
    title: str,
    cards: Sequence[int | float],
    context: int,
    limit: int | None = None,
) -> None:
    """Draws the wall to an .svg or .png file; the same bytes for the same inputs.

    Args:
      budgets: (name, budget) per curve.
      cards: memory sizes in GiB, drawn where they are in the picture's range.
      context: tokens that the picture must reach.
      limit: the model's own context, drawn as a vertical line.

    Raises:
      TurboqError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise TurboqError(f"--picture={path} must end in {' or '.join(FORMATS)}")
    right = max(4096, 2 * context, limit or 0)
    last = math.ceil(math.log2(right))
    marks = [2**i for i in range(10, last + 1)]
    xs = sorted({*marks, *(round(2 ** (i / 8)) for i in range(80, 8 * last + 1))})
    style = {k: _INK if str(v).startswith("#") else v for k, v in STYLE.items()}
    style |= {"grid.color": "#dfe3e8", "figure.facecolor": _PAPER, "savefig.facecolor": _PAPER}
    style |= {"svg.hashsalt": "turboq-wall"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        curves = [[budget.needed(x) / GIB for x in xs] for _, budget in budgets]
        low, high = min(c[0] for c in curves), max(c[-1] for c in curves)
        for i, ((name, _), ys) in enumerate(zip(budgets, curves, strict=True)):
            colour, marker = _LOOKS[i % len(_LOOKS)]
            axes.plot(
                xs, ys, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=name,
                markevery=[xs.index(x) for x in marks],
            )  # fmt: skip
        shown = [gib for gib in cards if low < gib < 1.2 * high]
        for gib in shown:
            axes.axhline(gib, color=_SOFT, linewidth=0.8, linestyle="--")
            axes.annotate(
                f"{gib:g} GB card", (xs[0], gib), xytext=(2, 3), textcoords="offset points",
                fontsize=8, color=_INK, bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            for i, (_, budget) in enumerate(budgets):
                wall = budget.max_context(int(gib * GIB))
                if wall is not None and xs[0] <= wall <= xs[-1]:
                    axes.plot([wall], [gib], marker="|", markersize=11, color=_LOOKS[i % 8][0])
        if limit is not None:
            axes.axvline(limit, color=_SOFT, linewidth=0.8, linestyle=":")
            axes.annotate(
                "model's context", (limit, low), xytext=(-3, 3), textcoords="offset points",
                fontsize=8, ha="right", color=_INK,
            )  # fmt: skip
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k"))
        axes.yaxis.set_major_locator(FixedLocator(_ticks(*axes.get_ylim())))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("context, tokens (k = 1024; both axes logarithmic)")
        axes.set_ylabel("memory needed, GiB")
        axes.set_title(title)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        buffer = io.BytesIO()
        kind = path.suffix[1:].lower()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    atomic_write(path, buffer.getvalue())


def _ticks(low: float, high: float) -> list[float]:
    """Powers of two inside [low, high], with quarters or halves between them while they are few."""
    found: list[float] = []
    for steps in ((1.0, 1.25, 1.5, 1.75), (1.0, 1.5), (1.0,)):
        exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        found = [s * 2.0**e for e in exponents for s in steps if low <= s * 2.0**e <= high]
        if len(found) <= 9:
            break
    return found
