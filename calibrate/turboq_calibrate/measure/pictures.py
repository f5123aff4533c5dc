"""Pictures of the report: deterministic SVG that follows the page's light or dark theme.

Text, axes and grid are drawn in two marker colours that `svg` turns into CSS variables, so one
picture is readable on both backgrounds. All are `WIDTH` wide, so that text is about 10 pixels high
where the page has 400, 15 where it has more. Nothing depends on the clock or on installed fonts.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

Row = dict[str, Any]

WIDTH = 5.4  # inches
BEYOND = 4.0  # of the median plan's largest and least error: where colours end
EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max"}
EXTEND[True, True] = "both"

SMALL = 9.5  # points: labels inside a picture
INK, _GRID = "#010203", "#040506"  # markers, replaced by var(--ink) and var(--grid)
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: selectable, and measured by the page's font
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# Mid-tones with contrast of at least 3:1 on white and on the page's dark background, and a marker
# each, so that no family is told by colour alone.
_FAMILIES = {
    "exact": ("#7d858f", "s"),
    "turboquant_mse": ("#2f7fd1", "o"),
    "turboquant_prod": ("#d4660a", "^"),
    "per_head": ("#0e9268", "D"),
}
_OTHERS = [("#9a63d6", "v"), ("#c2487f", "P"), ("#8a7a12", "X"), ("#3f8f9b", "*")]


def family_styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker per codec; unknown codecs take the spare ones in order."""
    unknown = sorted({r["codec"] for r in rows} - set(_FAMILIES))
    spare = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}
    return _FAMILIES | spare


def svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an SVG element with ids of its own, theme colours and a text alternative."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"turboq-{name}", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(_GRID, "var(--grid)")
    # Several pictures share one page, so their ids must not meet.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    # The page decides the width; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def kl_against_bits(panels: Mapping[str, list[Row]]) -> str | None:
    """Mean KL (log scale) against bits per channel, bars: `kl_ci`, a panel for every title. None
    without data.

    All that is resident at the rows' context is counted: plans at one place cost the same.
    Exact rows far to the right would flatten the rest: they become a dashed level instead.
    """
    drawn = {title: rows for title, rows in panels.items() if _lossy(rows)}
    if not drawn:
        return None
    styles = family_styles([row for rows in drawn.values() for row in rows])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 3.8 * len(drawn)), layout="constrained")
        every = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
        labels: dict[str, Any] = {}
        for axes, (title, rows) in zip(every, drawn.items(), strict=True):
            _bits_panel(axes, rows, styles)
            axes.set_title(title)
            handles, names = axes.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
        contexts = sorted({row["context"] for rows in drawn.values() for row in rows})
        at = " or ".join(f"{context:,}" for context in contexts)
        every[-1].set_xlabel(f"bits per channel at {at} tokens, everything counted")
        figure.legend(
            labels.values(), labels.keys(), frameon=False, loc="outside upper left", ncols=2,
            handlelength=2.2,
        )  # fmt: skip
        alt = "".join(
            f"Mean KL divergence against bits per channel at {at} tokens for {len(points)} plans"
            f"{f' ({title})' if title else ''}. Lowest: {best['name']}, {best['kl_mean']:.3g} nats "
            f"per token at {_all_bits(best):.2f} bits per channel. "
            for title, points in ((title, _lossy(rows)) for title, rows in drawn.items())
            for best in [min(points, key=lambda r: r["kl_mean"])]
        )
        return svg(figure, "kl", f"{alt}The numbers are in the table.")


def _lossy(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["codec"] != "exact" and r["kl_mean"] > 0]


def _bits_panel(axes: Any, rows: list[Row], styles: dict[str, tuple[str, str]]) -> None:
    """KL against bits of these rows."""
    points, levels = _lossy(rows), [r for r in rows if r["codec"] == "exact" and r["kl_mean"] > 0]
    for codec in dict.fromkeys(r["codec"] for r in points):
        mine = sorted((r for r in points if r["codec"] == codec), key=_all_bits)
        colour, marker = styles[codec]
        y = np.array([r["kl_mean"] for r in mine])
        # A lower bound of zero cannot be drawn on a log axis: the bar ends at the axis.
        ci = [r["kl_ci"] or (r["kl_mean"], r["kl_mean"]) for r in mine]
        spread = np.array(
            [
                [k - lo for k, (lo, _) in zip(y, ci, strict=True)],
                [hi - k for k, (_, hi) in zip(y, ci, strict=True)],
            ]
        )
        axes.errorbar(
            [_all_bits(r) for r in mine], y, yerr=np.maximum(spread, 0.0), color=colour,
            marker=marker, markersize=6, linewidth=1.6, capsize=3, label=codec,
        )  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    below = []
    for r in levels:
        text = f"{r['name']} ({_all_bits(r):g} bits per channel)"
        if r["kl_mean"] < low / 30:
            below.append(f"{text}: {r['kl_mean']:.1e}, below this axis")
            continue
        axes.axhline(r["kl_mean"], color=styles["exact"][0], linestyle="--", linewidth=1.2)
        axes.annotate(
            text, (1.0, r["kl_mean"]), xycoords=("axes fraction", "data"),
            xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=SMALL,
        )  # fmt: skip
        low = min(low, r["kl_mean"] / 1.6)
    axes.annotate(
        "\n".join(below), (0.0, 0.0), xycoords="axes fraction", xytext=(6, 5),
        textcoords="offset points", fontsize=SMALL,
    )  # fmt: skip
    axes.set_ylim(low, high)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(_log_ticks(low, high))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("mean KL, nats per token")


def _all_bits(row: Row) -> float:
    return row["bits_per_channel_at_context"]


def heads_matrix(values: list[list[float] | None]) -> Float[np.ndarray, "K L"]:
    """Per-layer lists (None: no cache) as [heads, layers]; missing or zero cells are NaN."""
    heads = max((len(v) for v in values if v), default=0)
    out = np.full((heads, len(values)), np.nan)
    for layer, row in enumerate(values):
        if row:
            out[: len(row), layer] = row
    return np.where(out > 0, out, np.nan)


def draw_heads(axes: Any, grid: Float[np.ndarray, "K L"], norm: Normalize) -> Any:
    """One heat map of heads and layers, with ticks at whole numbers; the mesh, for a colour bar."""
    mesh = axes.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5,
        np.arange(grid.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(grid),
        norm=norm,
        cmap=mpl.colormaps["viridis"].resampled(48),
        linewidth=0.3,
        edgecolors="face",  # no background between the cells
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(6, len(grid)), integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(length=2)
    return mesh


def error_heat_maps(errors: dict[str, dict[str, list]], names: list[str]) -> str | None:
    """One row of panels per plan: K (rms logit error, nats) and V (relative MSE), layer × head.

    The colour scale is logarithmic and shared by all panels of a side, so plans compare; it ends
    `BEYOND` times above and below what is usual, so that one plan does not flatten the others.
    """
    sides = [("k_logit_rms", "K: rms logit error, nats"), ("v_rel_mse", "V: relative MSE")]
    grids = {(n, s): heads_matrix(errors[n][s]) for n in names for s, _ in sides}
    if not names or any(g.size == 0 or np.isnan(g).all() for g in grids.values()):
        return None
    heads = max(g.shape[0] for g in grids.values())
    row_height = min(0.62 + 0.16 * heads, 2.6)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + row_height * len(names)), layout="constrained")
        panels = figure.subplots(len(names), 2, squeeze=False, sharex=True)
        for column, (side, title) in enumerate(sides):
            least = np.array([np.nanmin(grids[n, side]) for n in names])
            most = np.array([np.nanmax(grids[n, side]) for n in names])
            low = max(float(least.min()), float(np.median(least)) / BEYOND)
            high = min(float(most.max()), float(np.median(most)) * BEYOND)
            high = high if high > low else low * 1.01
            beyond = (least.min() < low, most.max() > high)
            norm = LogNorm(low, high)
            meshes = []
            for row, name in enumerate(names):
                axes, grid = panels[row, column], grids[name, side]
                meshes.append(draw_heads(axes, grid, norm))
                axes.invert_yaxis()
                axes.set_title(name, fontsize=SMALL)
                if column == 0:
                    axes.set_ylabel("KV head")
                if row == len(names) - 1:
                    axes.set_xlabel("layer")
            bar = figure.colorbar(
                meshes[0], ax=list(panels[:, column]), location="top", aspect=25, pad=0.02,
                extend=EXTEND[beyond],
            )  # fmt: skip
            bar.set_label(title)
            bar.outline.set_visible(False)
            if bar.solids is not None:
                bar.solids.set_edgecolor("face")
            bar.ax.xaxis.set_major_locator(_log_ticks(low, high, decades=1.3))  # half a width
            bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            bar.ax.xaxis.set_minor_locator(NullLocator())
        worst = []
        for name in names:
            grid = np.nan_to_num(grids[name, "k_logit_rms"], nan=-1.0)
            head, layer = np.unravel_index(int(grid.argmax()), grid.shape)
            worst.append(f"{name}: layer {layer} head {head} at {grid.max():.3g} nats")
        alt = (
            "Heat maps of quantization error per layer and KV head, keys left and values right. "
            "Largest key logit error of " + "; ".join(worst) + "."
        )
        return svg(figure, "heads", alt)


def _log_ticks(low: float, high: float, decades: float = 2.5) -> FixedLocator:
    """Ticks of 1, 2, 5 × powers of ten inside [low, high]; powers only over more `decades`."""
    steps = (1.0,) if math.log10(high / low) > decades else (1.0, 2.0, 5.0)
    ticks = [
        s * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for s in steps
        if low <= s * 10.0**e <= high
    ]
    return FixedLocator(ticks or [low, high])


def _end_labels(axes, ends: list[tuple[float, str]], right: float | int) -> None:
    """Labels of curves at their right end: wrapped, and pushed apart so that none overlap."""
    low, high = axes.get_ylim()
    line, left = (high / low) ** 0.065, axes.get_xlim()[0]
    top = low
    for y, whole in sorted(ends):
        label = textwrap.fill(whole, 22, break_long_words=False, break_on_hyphens=False)
        half = line ** ((label.count("\n") + 1) / 2)
        at = max(y, top * half)
        top = at * half
        axes.annotate(
            label, (right, y), xytext=((right / left) ** 0.08 * right, at), textcoords="data",
            va="center", fontsize=SMALL, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkB": 4,
                "relpos": (0.0, 0.5),
            },
        )  # fmt: skip


def kl_against_position(rows: list[Row], texts: list[str]) -> str | None:
    """Mean KL (log scale) in buckets of position, one panel per text, one line per quantizing plan.

    A bucket [start, end) stands at its middle. None where no text has two buckets.
    """
    lines: dict[str, list[tuple[Row, list[tuple[float, float]]]]] = {text: [] for text in texts}
    for row in rows:
        points = [
            ((b["start"] + b["end"]) / 2, b["kl_mean"])
            for b in row["kl_by_position"]
            if b["kl_mean"]
        ]
        if row["codec"] != "exact" and len(points) > 1:
            lines[row["text"]].append((row, points))
    drawn = {text: found for text, found in lines.items() if found}
    if not drawn:
        return None
    styles = family_styles(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 3.2 * len(drawn)), layout="constrained")
        panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (text, found) in zip(panels, drawn.items(), strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for row, points in found:
                colour, marker = styles[row["codec"]]
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6)
            edges = sorted({b["end"] for row, _ in found for b in row["kl_by_position"]})
            axes.xaxis.set_major_locator(FixedLocator([*edges[:-1], edges[-1]]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(_log_ticks(low, high))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.set_title(text)
            axes.set_ylabel("mean KL, nats per token")
            right = max(points[-1][0] for _, points in found)
            _end_labels(axes, [(points[-1][1], row["name"]) for row, points in found], right)
        panels[-1].set_xlabel("position in the window, tokens")
        alt = "Mean KL divergence against position in the window. From first to last bucket: " + (
            "; ".join(
                f"{row['name']} on {text} {points[0][1]:.3g} to {points[-1][1]:.3g}"
                for text, found in drawn.items()
                for row, points in found
            )
        )
        return svg(figure, "position", f"{alt} nats per token.")


def loss_by_task(rows: list[Row]) -> str | None:
    """Loss of log-probability (log colours) of tasks that count, plans by their bits.

    Rows of `tasks.json`; tasks at several lengths are rows of their own. None without a loss.
    """
    counted = [r for r in rows if not r["at_chance"]]
    by_bits = sorted(counted, key=lambda row: row["bits_per_channel"])
    plans = list(dict.fromkeys(row["plan"] for row in by_bits))
    loss = {(r["task"], r["length"], r["plan"]): -r["logp_change"] for r in counted}
    if not any(x > 0 for x in loss.values()):
        return None
    places = list(dict.fromkeys(key[:2] for key in loss))
    grid = np.array([[loss.get((*place, plan), np.nan) for plan in plans] for place in places])
    order = np.argsort(-np.nanmean(grid, axis=1), kind="stable")
    grid, places = grid[order], [places[i] for i in order]
    high = float(np.nanmax(grid))
    low = high / 1000
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.9 + 0.24 * len(places)), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(np.maximum(grid, low)), norm=LogNorm(low, high),
            cmap=mpl.colormaps["viridis"].resampled(48), linewidth=0.3, edgecolors="face",
        )  # fmt: skip
        axes.invert_yaxis()
        several = len({length for _, length in places}) > 1
        names = [f"{task} at {length}" if several else task for task, length in places]
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=SMALL)
        axes.set_xticks(
            np.arange(len(plans)) + 0.5,
            [textwrap.fill(plan, 20, break_long_words=False) for plan in plans],
            fontsize=SMALL, rotation=90,
        )  # fmt: skip
        axes.tick_params(length=0)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("loss, nats")
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_edgecolor("face")
        bar.ax.yaxis.set_major_locator(_log_ticks(low, high))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        worst = ", ".join(
            f"{plan} {names[int(np.nanargmax(column))]} {np.nanmax(column):.3g}"
            for plan, column in zip(plans, grid.T, strict=True)
        )
        return svg(figure, "tasks", f"Loss of log-probability by task. Largest: {worst} nats.")


def memory_against_context(rows: list[Row]) -> str | None:
    """Cache bytes of one sequence against its length; plans within 2 % share a line."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -r["bytes_per_token"]):
        if groups and row["bytes_per_token"] > 0.98 * groups[-1][0]["bytes_per_token"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    curves = [(g, sorted((int(c), b) for c, b in g[0]["cache_bytes"].items())) for g in groups]
    curves = [(g, c) for g, c in curves if len(c) > 1]
    if not curves:
        return None
    top = max(b for _, c in curves for _, b in c)
    unit, word = (2.0**30, "GiB") if top > 2**30 else (2.0**20, "MiB")
    styles = family_styles(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends = []
        for group, curve in curves:
            colour, marker = styles[group[0]["codec"]]
            x, y = [c for c, _ in curve], [b / unit for _, b in curve]
            axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6)
            ends.append((y[-1], ", ".join(r["name"] for r in group)))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(FixedLocator([c for c, _ in curves[0][1]]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(_log_ticks(low, high))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"cache of one sequence, {word}")
        right = max(c[-1][0] for _, c in curves)
        _end_labels(axes, ends, right)
        alt = (
            f"Bytes of the cache against context length. At {right} tokens: "
            + "; ".join(f"{label} {y:.3g} {word}" for y, label in ends)
            + "."
        )
        return svg(figure, "memory", alt)
