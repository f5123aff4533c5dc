"""A run's folder as one HTML page: table and pictures, nothing fetched, nothing executed.

The page is built from `quality.json` (and `run.json` if present) alone, follows the reader's light
or dark setting, and is the same bytes for the same inputs.
"""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import Any

from turboq.export import ENGINES
from turboq.files import atomic_write
from turboq_calibrate.measure import pictures, plan_pictures
from turboq_calibrate.measure.quality_table import (
    LONG,
    QUALITY,
    Quality,
    by_position,
    by_step,
    by_text,
    cautions,
    display,
    nats,
    over_texts,
    read_quality,
    scopes,
    unequal,
)
from turboq_calibrate.tasks.results import (
    DETAILS,
    RESULTS,
    SIZES,
    cells,
    details,
    notes_of,
    read_results,
    sizes,
)

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59636e; --grid: #dfe3e8;
  --page: #ffffff; --row: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #9aa4af; --grid: #353c45;
  --page: #14181d; --row: #1b2027; } }
body { background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif;
  max-width: 62rem; margin: 2.2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: var(--row); }
figure { margin: .8rem 0 0; overflow-x: auto; } figcaption { font-size: 13.5px; max-width: 46rem; }
pre { background: var(--row); padding: .5rem .7rem; font-size: 12.5px; line-height: 1.45; }
svg { display: block; width: 100%; height: auto; max-width: 36rem; color: var(--ink); }
svg text { fill: var(--ink); } @media (max-width: 30rem) { body { padding: 0 .5rem; }
  table { font-size: 12px; } th, td { padding: .3rem .35rem; }
  th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
  tbody tr:nth-child(even) td:first-child { background: var(--row); } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0;
  font-size: 13.5px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_report(folder: str | Path, *, heat_map_plans: list[str] | None = None) -> Path:
    """Writes `report.html` next to the folder's `quality.json`; returns its path.

    Args:
      heat_map_plans: rows to show in the heat maps; by default all that quantize.

    What `turboq evaluate` and `turboq tasks` wrote there is one page; either may be missing.

    Raises:
      TurboqError: neither `quality.json` nor `tasks.json`, or an unreadable one, or the folder
        cannot be written.
    """
    folder = Path(folder)
    tasks = read_results(folder) if (folder / RESULTS).exists() else None
    path = folder / REPORT
    if tasks is not None and not (folder / QUALITY).exists():
        title = f"KV-cache quantization of {tasks['model']}"
        page = _page(title, [f"<h1>{_text(title)}</h1>", *_tasks(tasks)])
    else:
        page = render(read_quality(folder), heat_map_plans, tasks)
    atomic_write(path, page)
    return path


def render(
    quality: Quality,
    heat_map_plans: list[str] | None = None,
    tasks: dict[str, Any] | None = None,
) -> str:
    """The page as text.

    Raises:
      ValueError: `heat_map_plans` names a row that is not there.
    """
    table, rows, texts = quality.table, quality.rows, quality.texts
    errors = (table.get("head_errors") or {}).get(texts[0], {}) if texts else {}
    first = quality.rows_of(texts[0]) if texts else []
    lossy = [row["name"] for row in first if row["codec"] != "exact"]
    chosen = lossy if heat_map_plans is None else heat_map_plans
    missing = [name for name in chosen if name not in errors]
    if heat_map_plans is not None and missing:
        raise ValueError(f"{missing=} in the heat maps; the table has {list(errors)}")
    chosen = [name for name in chosen if name in errors]
    title = f"KV-cache quantization of {table['model']}"
    several, panels = len(texts) > 1, by_length(quality)
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(_summary(quality))}</p>',
        *_headline(rows),
        "<h2>Quality</h2>",
        *_quality(quality),
        f'<p class="soft">{_text(_definitions(table))}</p>',
        *_figure(
            "Quality against size",
            pictures.kl_against_bits(panels),
            "Lower and further left is better; every byte at that context counts. "
            + (
                "Points are means over texts, bars reach from the best text to the worst; "
                if len(texts) > len(panels)
                else "Bars are bootstrap intervals over windows; "
            )
            + "the scale is logarithmic.",
        ),
        *_figure(
            "Quality by position in the window",
            pictures.kl_against_position(rows, texts),
            "Mean KL of the positions in each bucket, drawn at its middle; ticks are where buckets "
            "end. Both scales are logarithmic.",
        ),
        *_figure(
            "Where the error is",
            pictures.error_heat_maps(errors, chosen),
            "Keys: root mean square error of the attention logits, shifts common to all tokens "
            "left out because the softmax ignores them. Values: squared error over squared norm. "
            "Exact sinks are left out. Colours are logarithmic and shared by the plans of a side; "
            "a scale that ends in a point has plans beyond it."
            + (f" On {texts[0]}." if several else ""),
        ),
        *_bits(table.get("head_bits") or {}),
        *_figure(
            "What each layer costs",
            plan_pictures.layer_losses(table.get("layer_loss") or {}),
            "Loss that storing a layer's keys and values was predicted to add, from gradients at "
            "calibration: nats per token, of which the allocator minimised the sum. Of plans "
            "within a budget; the table says what was measured.",
        ),
        *_figure(
            "Memory",
            pictures.memory_against_context(over_texts(rows)),
            "Everything resident for one sequence: whole pages, scales, exact sinks and recent "
            "window, fitted arrays and static tables. Plans within 2 % share a line.",
        ),
        *([] if tasks is None else _tasks(tasks)),
        *_use(quality),
        "<h2>How this was measured</h2>",
        _facts(quality),
    ]
    return _page(title, body)


def _tasks(tasks: dict[str, Any]) -> list[str]:
    """What `turboq tasks` found: as printed, and drawn."""
    (_, *notes) = notes_of(tasks)
    return [
        "<h2>Tasks</h2>",
        _table(cells(tasks["rows"])),
        '<p class="soft">exact: with an exact cache the right answer is the likeliest of those '
        "offered; written: greedy decoding writes it. Plans: change of its log-probability in "
        "nats, and how often greedy decoding writes what it writes with the exact cache.</p>",
        *(f'<p class="soft">{_text(note)}.</p>' for note in notes),
        "<h3>Sizes</h3>",
        _table(sizes(tasks["rows"])),
        f'<p class="soft">{_text(SIZES)}.</p>',
        "<h3>In detail</h3>",
        _table(details(tasks["rows"])),
        f'<p class="soft">{_text(DETAILS[0].upper() + DETAILS[1:])} (McNemar).</p>',
        *_figure(
            "Which tasks tolerate how many bits",
            pictures.loss_by_task(tasks["rows"]),
            "Loss of log-probability of the right answer, nats, of tasks that the exact cache can "
            "do, the most sensitive one on top. The scale is logarithmic; losses below its lower "
            "end, gains too, have its lowest colour.",
        ),
    ]


def _bits(bits: dict[str, Any]) -> list[str]:
    """Where bits go, in plans that choose per head, and what layers take."""
    alike = [name for name in bits if name not in plan_pictures.chosen_per_head(bits)]
    left_out = f" These store all heads alike: {', '.join(alike)}." if alike else ""
    return [
        *_figure(
            "Where bits go",
            plan_pictures.bits_map(bits),
            "Stored bits per channel of every layer and KV head, scales and gains included. One "
            "scale for K and V of all plans. Where a plan joins heads, rows of K and V are its "
            f"units, the largest first.{left_out}",
        ),
        *_figure(
            "What each layer takes",
            plan_pictures.layer_bytes(bits),
            "Bytes of one more token in each layer, K and V of all its heads.",
        ),
    ]


def _use(quality: Quality) -> list[str]:
    """What to type to use the plan with the least KL of those that lie in a folder."""
    rows = {row["name"]: row for row in over_texts(quality.rows)}
    plans = {name: path for name, path in (quality.run.get("plans") or {}).items() if name in rows}
    if not plans:
        return []
    best = min(plans, key=lambda name: (rows[name]["kl_mean"], name))
    path = shlex.quote(plans[best])
    joint = best in (quality.table.get("joint") or ())
    lines = [
        f"# {engine.title}{'' if engine.ran else ' (not run here)'}\n"
        f"turboq export --engine={name} --plan={path} --out=runs/for_{name}"
        for name, engine in sorted(ENGINES.items(), key=lambda item: not item[1].joint)
        if engine.joint or not joint
    ]
    others = [name for name, engine in ENGINES.items() if not engine.joint]
    if joint:
        lines.append(
            f"# this plan joins heads; for NAME of {', '.join(others)}\nturboq plan --engine=NAME "
            "--model=... --statistics=... --budget=... --out=runs/plan_for_NAME"
        )
    return [
        "<h2>Use a plan</h2>",
        f"<p>{_text(best)} has the least KL of the plans in a folder. In JAX:</p>",
        f'<pre class="scroll">import turboq\nfrom turboq.cache import model_cache\n\n'
        f"plan, arrays = turboq.load({_text(repr(plans[best]))})\n"
        "form = model_cache.forms(plan.kv_layers(arrays))  # None: turboq.contiguous</pre>",
        "<p>transformers runs it as it is; other engines store what is nearest, and the report of "
        "the export says what that keeps. <code>--measure</code> measures it.</p>",
        f'<pre class="scroll">{_text(chr(10).join(lines))}</pre>',
    ]


def _page(title: str, body: list[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def by_length(quality: Quality) -> dict[str, list[dict[str, Any]]]:
    """Rows by length of windows (over the texts of that length), under what a panel is called."""
    texts: dict[int, list[str]] = {}
    for text in quality.table["texts"]:
        texts.setdefault(text["window_tokens"], []).append(text["text"])
    found = {}
    for length, names in sorted(texts.items()):
        rows = [row for name in names for row in quality.rows_of(name)]
        title = f"windows of {length} tokens" if len(texts) > 1 else ""
        found[title] = over_texts(rows) if len(quality.texts) > len(texts) else rows
    return found


def _summary(quality: Quality) -> str:
    plans = len({row["name"] for row in quality.rows})
    texts = "; ".join(
        f"{t['text']} (windows of {t['window_tokens']} tokens, {t['windows']} of them; perplexity "
        f"{t['perplexity']:.3f})"
        for t in quality.table["texts"]
    )
    return f"{plans} plans against the model's own predictions with an exact cache, over {texts}."


def _headline(rows: list[dict[str, Any]]) -> list[str]:
    """The least KL, the fewest bits, and what both cost, in a line."""
    lossy = [row for row in over_texts(rows) if row["codec"] != "exact"]
    if not lossy:
        return []
    best = min(lossy, key=lambda row: row["kl_mean"])
    least = min(lossy, key=lambda row: (row["bits_per_channel"], row["kl_mean"]))
    said = [f"Least KL: {_short(best)}."]
    if least["name"] != best["name"]:
        said.append(f"Fewest bits: {_short(least)}.")
    return [f"<p>{_text(' '.join(said))}</p>"]


def _short(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}, {nats(row['kl_mean'])} nats per token at {row['bits_per_channel']:.2f} "
        f"bits per channel ({row['compression']:.2f} times below bfloat16)"
    )


def _quality(quality: Quality) -> list[str]:
    """Plans by texts where there are several, then every text's own tables."""
    several = len(quality.texts) > 1
    parts = []
    if several:
        parts += [
            "<h3>Mean KL by text</h3>",
            _table(by_text(quality)),
            '<p class="soft">* the text on which a plan loses most.</p>',
        ]
    for text in quality.table["texts"]:
        rows = quality.rows_of(text["text"])
        if several:
            parts.append(f"<h3>{_text(text['text'])}</h3>")
        parts.append(_table([display(row, text["window_tokens"]) for row in rows]))
        said = scopes(rows, text["tokens"]) + cautions(rows, text)
        parts += [f'<p class="soft">{_text(x)}.</p>' for x in said]
        if text["window_tokens"] > LONG and (buckets := by_position(rows)):
            parts += ["<h3>By position</h3>", _table(buckets)]
        if walked := by_step(rows):
            parts += ["<h3>Step by step through the packed cache</h3>", _table(walked)]
    return parts + [f'<p class="soft">{_text(x)}.</p>' for x in unequal(quality.rows)]


def _definitions(table: dict[str, Any]) -> str:
    level = round(100 * table["bootstrap"]["level"])
    return (
        "bits/ch: every stored bit of one quantized token over its K and V channels; all at N: "
        "every byte resident for N tokens (pages, exact tokens, fitted arrays, tables). KL: "
        "divergence from the exact model's next-token distribution, nats per token, with the "
        f"{level} % bootstrap interval of the mean over windows, the median and the 99 % quantile "
        "over positions. top-1: positions at which both prefer the same next token. Only positions "
        "that can see a quantized token count."
    )


def _table(cells: list[dict[str, str]]) -> str:
    if not cells:
        return "<p>No plans were measured.</p>"
    names = list(dict.fromkeys(name for line in cells for name in line))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    lines = [
        "<tr>" + "".join(f"<td>{_text(line.get(name, ''))}</td>" for name in names) + "</tr>"
        for line in cells
    ]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def _figure(title: str, svg: str | None, caption: str) -> list[str]:
    if svg is None:
        return []
    return [
        f"<h2>{_text(title)}</h2>",
        f"<figure>\n{svg}\n<figcaption>{_text(caption)}</figcaption>\n</figure>",
    ]


def _lines_of(command: str) -> str:
    """A command with one flag on a line, as a shell takes it."""
    program, name, *flags = shlex.split(command)
    return " \\\n  ".join([f"{program} {name}", *map(shlex.quote, flags)])


def _facts(quality: Quality) -> str:
    table, run = quality.table, quality.run
    policies = {
        (p["sinks"], p["recent"], p["exact_dtype"]) for p in (r["policy"] for r in table["rows"])
    }
    facts: list[tuple[str, object]] = [
        ("model fingerprint", table["model_fingerprint"]),
        *(
            ("text", f"{t['text']}, tokens SHA-256 {t['windows_sha256']}, {t['tokens']} predicted")
            for t in table["texts"]
        ),
        ("attention", table["attention"]),
        (
            "tokens kept exact",
            "; ".join(f"first {s} and last {r}, as {dtype}" for s, r, dtype in sorted(policies)),
        ),
        (
            "bootstrap",
            f"{table['bootstrap']['samples']} resamples, seed {table['bootstrap']['seed']}",
        ),
    ]
    if run:
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        facts += [
            ("time", f"{run['seconds']:.0f} s on {run['cpus']} CPUs ({', '.join(run['devices'])})"),
            ("peak memory", f"{run['peak_memory_bytes'] / 2**30:.2f} GiB"),
            ("versions", versions),
        ]
    listed = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts)
    command = run.get("command") if run else None
    if not command:
        return f"<dl>{listed}</dl>"
    return f'<dl>{listed}</dl>\n<pre class="scroll">{_text(_lines_of(command))}</pre>'
