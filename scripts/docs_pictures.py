"""Draws docs/pictures: a key before and after RoPE, where bits go, a page, what learning saves.

    python scripts/docs_pictures.py --plan=runs/demo

keys.svg is of the embedded model on `topics:heldout`, bits.svg of the plan in --plan, kl.svg and
tasks.svg of experiments/results/demo.json and tasks.json. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import app, flags
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from turboq.numbers.packing import ROWS, WORD_BITS
from turboq.numbers.rope import unrotate
from turboq.plan import load
from turboq_calibrate.cli import common
from turboq_calibrate.measure import pictures, plan_pictures, quality_table
from turboq_calibrate.measure.pictures import INK, SMALL, STYLE, WIDTH, svg
from turboq_calibrate.measure.storage_columns import head_bits
from turboq_calibrate.models import (
    Model,
    default_positions,
    embed_tokens,
    exact_attend,
    load_model,
    run_layer,
)
from turboq_calibrate.observe.texts import mixed_windows

ROOT = Path(__file__).resolve().parents[1]
PLAN = flags.DEFINE_string("plan", "runs/demo", "A learned plan.")
flags.DEFINE_multi_string("only", ["kl", "tasks", "page", "bits", "keys"], "Which pictures.")
LAYER = flags.DEFINE_integer("layer", 8, "Layer of keys.svg.")
HEAD = flags.DEFINE_integer("head", 0, "KV head of keys.svg.")
TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of keys.svg.", lower_bound=2)

# A picture by itself brings the colours that the report's page has.
_THEME = (
    "<style>:root { --ink: #1d2329; --grid: #dfe3e8 } @media (prefers-color-scheme: dark) "
    "{ :root { --ink: #e3e7ec; --grid: #353c45 } } text { fill: var(--ink) }</style>"
)


def write(name: str, drawn: str | None) -> None:
    """One picture as a file of its own."""
    assert drawn is not None, name
    start = drawn.index(">", drawn.index("<svg")) + 1
    path = ROOT / "docs" / "pictures" / f"{name}.svg"
    path.write_text(drawn[:start] + _THEME + drawn[start:] + "\n")
    print(path.relative_to(ROOT))


def keys() -> str:
    """Keys of one head, tokens to the right, channels downwards, before and after RoPE."""
    model = load_model("embedded", resident=False)
    windows = mixed_windows(["topics:heldout"], model.tokenizer, length=TOKENS.value, count=1)
    before, after = keys_of(model, windows.tokens)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        high = float(np.quantile(np.abs(before), 0.995))
        for axes, (title, grid) in zip(
            panels, {"before RoPE": before, "after RoPE": after}.items(), strict=True
        ):
            mesh = axes.pcolormesh(grid.T, cmap="RdBu_r", vmin=-high, vmax=high, rasterized=True)
            axes.invert_yaxis()
            axes.set_title(title)
            axes.set_ylabel("channel")
        panels[-1].set_xlabel("token")
        bar = figure.colorbar(mesh, ax=panels, aspect=40, pad=0.02)
        bar.set_label("key")
        bar.outline.set_visible(False)
        share = [float(np.var(g.mean(axis=0)) / np.mean(g**2)) for g in (before, after)]
        name = f"layer {LAYER.value}, KV head {HEAD.value}"
        return svg(
            figure, "keys",
            f"Keys of {name} of {model.spec.name}. Before RoPE channels keep their value over "
            f"tokens: their mean holds {100 * share[0]:.0f} % of the power; after RoPE "
            f"{100 * share[1]:.0f} %.",
        )  # fmt: skip


def keys_of(model: Model, tokens: Int[np.ndarray, "1 T"]) -> list[Float[np.ndarray, "T D"]]:
    """Keys of the head before and after its rotary embedding; layers behind it are not run."""

    def keep(spec, q, k, v, positions, state, *sinks):
        return exact_attend(spec, q, k, v, positions, state, *sinks)[0], k

    x, k = embed_tokens(model, tokens), None
    positions = default_positions(jnp.asarray(tokens))
    for i in range(LAYER.value + 1):
        x, k = run_layer(model.spec.layers[i], model.layer(i), x, positions, keep, None)
    assert k is not None
    spec = model.spec.layers[LAYER.value]
    assert spec.rope is not None
    after = k[0, :, HEAD.value]
    return [np.asarray(x) for x in (unrotate(spec.rope, after, positions[0]), after)]


def page() -> str:
    """Bit planes, words and tokens of one page at 3 bits."""
    bits, channels, gap = 3, 8, 2
    small = {"fontsize": SMALL, "ha": "center", "va": "center"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots()
        for plane in range(bits):
            left = plane * (channels + gap)
            for row in range(ROWS):
                for channel in range(channels):
                    marked = plane == 0 and (row, channel) == (2, 3)
                    axes.add_patch(
                        Rectangle(
                            (left + channel, row), 1, 1, linewidth=0.6, edgecolor=INK,
                            facecolor="#2f7fd1" if marked else "none",
                        )
                    )  # fmt: skip
            axes.text(left + channels / 2, -0.7, f"plane {plane}", **small)
            axes.text(left + channels / 2, ROWS + 0.7, "D channels", **small)
        axes.text(-0.8, ROWS / 2, f"{ROWS} rows", rotation=90, **small)
        axes.annotate(
            f"One word of 32 bits: bit j is bit 0 of the code of token {ROWS} j + 2, channel 3."
            f"\n{bits} planes x {ROWS} rows x D words are {ROWS * WORD_BITS} tokens at exactly "
            f"{bits} bits per channel.",
            (3.5, 3.0), xytext=(-0.3, ROWS + 2.6), fontsize=SMALL, va="center",
            arrowprops={"arrowstyle": "<-", "color": INK, "linewidth": 0.8, "relpos": (0.13, 1.0)},
        )  # fmt: skip
        axes.set_xlim(-1.4, bits * (channels + gap) - gap + 0.2)
        axes.set_ylim(ROWS + 3.6, -1.3)
        axes.set_aspect("equal")
        axes.axis("off")
        return svg(
            figure, "page",
            f"A page: {bits} bit planes of {ROWS} rows and D channels of 32-bit words; bit j of a "
            f"word belongs to token {ROWS} j + row.",
        )  # fmt: skip


def kl() -> str | None:
    """The demo's table, means over its texts."""
    rows = json.loads((ROOT / "experiments" / "results" / "demo.json").read_text())["rows"]
    for row in rows:
        if row["codec"] in ("transform", "coordinates"):  # of heads apart, of heads joined
            row["codec"] = "learned"
    return pictures.kl_against_bits({"": quality_table.over_texts(rows)})


def tasks() -> str | None:
    """What every task loses under every plan."""
    found = json.loads((ROOT / "experiments" / "results" / "tasks.json").read_text())
    return pictures.loss_by_task(found["rows"])


def bits() -> str | None:
    """Bits of every head of a plan."""
    plan, _ = load(PLAN.value)
    return plan_pictures.bits_map({"learned": head_bits(plan.storage)})


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    (ROOT / "docs" / "pictures").mkdir(exist_ok=True)
    for name in common.listed(flags.FLAGS, "only"):
        write(name, DRAWN[name]())


DRAWN = {"kl": kl, "tasks": tasks, "page": page, "bits": bits, "keys": keys}

if __name__ == "__main__":
    app.run(main)
