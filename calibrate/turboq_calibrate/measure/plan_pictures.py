"""Pictures of what plans store: bits of every (layer, KV head, K or V), what layers take and cost.

From `head_bits` and `layer_loss` of `quality.json`, dicts of lists by layer for every plan
(`quality_schema`).
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from turboq_calibrate.measure.pictures import SMALL, STYLE, WIDTH, draw_heads, heads_matrix, svg

HeadBits = dict[str, list[Any]]
_SIDES = {"k": "K: bits per channel", "v": "V: bits per channel"}
_LINES = ("#2f7fd1", "#d4660a", "#0e9268", "#9a63d6", "#c2487f", "#8a7a12")


def chosen_per_head(bits: dict[str, HeadBits]) -> list[str]:
    """Plans that do not store all K alike and all V alike: those worth a map."""
    return [
        name
        for name, found in bits.items()
        if any(len(set(np.concatenate([x for x in found[side] if x]))) > 1 for side in _SIDES)
    ]


def bits_map(bits: dict[str, HeadBits]) -> str | None:
    """One row of panels per plan that chooses per head: bits of K and of V, layer × head.

    The scale is shared by K and V of all plans, so that colours compare. None without such a plan.
    """
    names = chosen_per_head(bits)
    if not names:
        return None
    grids = {(n, side): heads_matrix(bits[n][side]) for n in names for side in _SIDES}
    low = min(float(np.nanmin(grid)) for grid in grids.values())
    high = max(float(np.nanmax(grid)) for grid in grids.values())
    heads = max(grid.shape[0] for grid in grids.values())
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH, 1.1 + min(0.62 + 0.16 * heads, 2.6) * len(names)), layout="constrained"
        )
        panels = figure.subplots(len(names), 2, squeeze=False, sharex=True, sharey=True)
        meshes = []
        for row, name in enumerate(names):
            for column, side in enumerate(_SIDES):
                axes = panels[row, column]
                meshes.append(draw_heads(axes, grids[name, side], Normalize(low, high)))
                axes.set_title(f"{name}, {side.upper()}", fontsize=SMALL)
                if row == len(names) - 1:
                    axes.set_xlabel("layer")
            panels[row, 0].set_ylabel("KV head")
        panels[0, 0].invert_yaxis()  # of all, they share it: head 0 on top
        bar = figure.colorbar(meshes[0], ax=panels, location="top", aspect=50, pad=0.02)
        bar.set_label("stored bits per channel")
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        said = "; ".join(
            f"{name}: K {np.nanmin(grids[name, 'k']):.2f} to {np.nanmax(grids[name, 'k']):.2f}, "
            f"V {np.nanmin(grids[name, 'v']):.2f} to {np.nanmax(grids[name, 'v']):.2f}"
            for name in names
        )
        return svg(figure, "bits", f"Maps of stored bits per channel by layer and head. {said}.")


def layer_bytes(bits: dict[str, HeadBits]) -> str | None:
    """Bytes of one more token by layer, one line per plan; None where no two layers differ."""
    lines = {
        name: [(i, x) for i, x in enumerate(found["bytes_per_token"]) if x is not None]
        for name, found in bits.items()
    }
    lines = {name: points for name, points in lines.items() if len({x for _, x in points}) > 1}
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            colour = _LINES[number % len(_LINES)]
            axes.step(x, y, where="mid", color=colour, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("bytes of one token, K and V")
        figure.legend(frameon=False, loc="outside upper left", ncols=2, handlelength=2.2)
        most = "; ".join(
            f"{name}: layer {max(p, key=lambda at: at[1])[0]} with {max(x for _, x in p):g}"
            for name, p in lines.items()
        )
        return svg(figure, "layers", f"Bytes of one token by layer. Most: {most} bytes.")


def layer_losses(losses: dict[str, dict[str, list[float | None]]]) -> str | None:
    """Predicted loss by layer, V on K, a panel per plan under one scale; None without a plan."""
    if not losses:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * len(losses)), layout="constrained")
        panels = figure.subplots(len(losses), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        said = []
        for axes, (name, found) in zip(panels, losses.items(), strict=True):
            k, v = (np.array([x or 0.0 for x in found[side]]) for side in _SIDES)
            at = np.arange(len(k))
            axes.bar(at, k, 0.8, color=_LINES[0], label="K")
            axes.bar(at, v, 0.8, bottom=k, color=_LINES[1], label="V")
            total, worst = float((k + v).sum()), int((k + v).argmax())
            axes.set_title(f"{name}: {total:.3g} in all", fontsize=SMALL)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            said.append(f"{name}: {total:.3g}, layer {worst} most with {(k + v)[worst]:.3g}")
        panels[-1].set_xlabel("layer")
        figure.supylabel("predicted loss, nats per token", fontsize=10.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=2)
        return svg(figure, "losses", f"Predicted loss by layer. {'; '.join(said)} nats per token.")
