"""The quality table as data and as text: `quality.json`, `quality.csv`, `run.json`, console.

`quality.json` holds only what follows from model, plans and texts, so two runs write the same
bytes; seconds, memory and versions are in `run.json`.
"""

# pyright: strict

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError
from turboq.files import make_folder, settle, write_together
from turboq_calibrate.measure.quality_schema import Run, Table, read_json

QUALITY, TABLE, RUN = "quality.json", "quality.csv", "run.json"
LONG = 1024  # windows above this show their KL by position
FEW = 5  # windows below this make an interval that needs a word
# Buckets of position by their first one, and what the CSV says of each.
BUCKETS = {0: "0_1k", 1024: "1k_4k", 4096: "4k_16k", 16384: "16k_up"}
OF_BUCKETS = ("kl_mean", "kl_p99", "kl_p999", "top1", "perplexity_ratio")
# The columns of the CSV, in order; nested values are flattened or left to the JSON.
COLUMNS: tuple[str, ...] = (
    "name", "codec", "k_codec", "v_codec", "k_bits", "v_bits", "bits_per_channel",
    "bits_per_channel_at_context", "context", "bits_per_channel_at_window", "sinks", "recent",
    "text", "quantized_tokens", "scored_positions", "kl_mean", "kl_median", "kl_ci_lo", "kl_ci_hi",
    "kl_p99", "kl_p999", "top1", "perplexity", "perplexity_exact", "perplexity_ratio",
    "bytes_per_token", "compression",
    *(f"{name}_{bucket}" for bucket in BUCKETS.values() for name in OF_BUCKETS),
)  # fmt: skip
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """`table`: what `quality.json` holds. `run`: how this run went. Fields: `quality_schema`."""

    table: dict[str, Any]
    run: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """One dict per plan and text: text by text, plans in the order given."""
        return self.table["rows"]

    def rows_of(self, text: str) -> list[Row]:
        """One dict per plan, on one text."""
        return [row for row in self.rows if row["text"] == text]

    @property
    def texts(self) -> list[str]:
        """Names of the texts, in the order given."""
        return [text["text"] for text in self.table["texts"]]


def write_quality(quality: Quality, folder: str | Path) -> Path:
    """Writes the three files into `folder` (made if absent), together; the path of `quality.json`.

    Raises:
      TurboqError: the folder cannot be made or written.
    """
    folder = make_folder(folder)
    table, run = json_text(quality.table), json_text(quality.run)
    write_together(folder, {TABLE: csv_text(quality.rows), RUN: run, QUALITY: table})
    return folder / QUALITY


def read_quality(folder: str | Path) -> Quality:
    """Reads what `write_quality` wrote; `run.json` may be absent.

    Raises:
      TurboqError: a file is not what `quality_schema` says, or its rows do not fit its texts.
    """
    settle(Path(folder))
    path, run = Path(folder) / QUALITY, Path(folder) / RUN
    again = "run `turboq evaluate` again"
    table = read_json(path, Table, otherwise=again)
    texts = {text["text"] for text in table["texts"]}
    cells = [(row["name"], row["text"]) for row in table["rows"]]
    for name, text in cells:
        if text not in texts or cells.count((name, text)) > 1:
            raise TurboqError(f"{path}: not one row of {name!r} on a text {text!r}: {again}")
    return Quality(table=table, run=read_json(run, Run, otherwise=again) if run.exists() else {})


def over_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per plan: the mean of its KL over texts, and as `kl_ci` its range over them."""
    plans: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        plans.setdefault(row["name"], []).append(row)
    found: list[dict[str, Any]] = []
    for same in plans.values():
        kl = [row["kl_mean"] for row in same]
        found.append(same[0] | {"kl_mean": sum(kl) / len(kl), "kl_ci": [min(kl), max(kl)]})
    return found


def json_text(value: Any) -> str:
    """As all files of a run are written."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def flat(row: Row) -> Row:
    """A row's values by `COLUMNS`; a missing interval is empty, as are buckets beyond a window."""
    lo, hi = row["kl_ci"] or ("", "")
    optional = [
        "bits_per_channel_at_window",
        "kl_p999",
        *COLUMNS[-len(BUCKETS) * len(OF_BUCKETS) :],
    ]
    extra = dict.fromkeys(optional, "") | {"kl_ci_lo": lo, "kl_ci_hi": hi} | row["policy"]
    for bucket in row.get("by_position", ()):
        extra |= {f"{name}_{BUCKETS[bucket['start']]}": bucket[name] for name in OF_BUCKETS}
    extra |= {name: row[name] for name in COLUMNS if name in row}
    return {name: extra[name] for name in COLUMNS}


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV (RFC 4180 quoting, newline line ends)."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(row) for row in rows)
    return buffer.getvalue()


def storage_cells(row: Row, window: int | None = None) -> dict[str, str]:
    """A plan's name and size as text: heading -> cell; with all that is resident at `window` tokens
    and at the row's context."""
    sizes = {window: row.get("bits_per_channel_at_window")}
    sizes[row["context"]] = row["bits_per_channel_at_context"]
    return {
        "plan": row["name"],
        "bits/ch": f"{row['bits_per_channel']:.2f}",
        **{f"all at {n}": f"{x:.2f}" for n, x in sizes.items() if n is not None and x is not None},
        "bytes/token": f"{row['bytes_per_token']:g}",
        "vs bf16": f"{row['compression']:.2f}x",
    }


def display(row: Row, window: int | None = None) -> dict[str, str]:
    """The cells people read, as text: heading -> cell. One window has no interval.

    `window`: tokens of a window, at which all that is resident is counted too.
    """
    ci = row["kl_ci"]
    interval = {} if ci is None else {"95 % interval": f"{nats(ci[0])} .. {nats(ci[1])}"}
    return {
        **storage_cells(row, window),
        "KL mean": nats(row["kl_mean"]),
        **interval,
        "median": nats(row["kl_median"]),
        "p99": nats(row["kl_p99"]),
        "top-1": f"{100 * row['top1']:.1f} %",
        "perplexity": _perplexity(row["perplexity"]),
    }


def by_text(quality: Quality) -> list[dict[str, str]]:
    """One dict per plan: its size, and its mean KL on every text, the largest marked with *."""
    windows = {text["window_tokens"] for text in quality.table["texts"]}
    window = windows.pop() if len(windows) == 1 else None
    cells: dict[str, dict[str, Row]] = {}
    for row in quality.rows:
        cells.setdefault(row["name"], {})[row["text"]] = row
    found: list[dict[str, str]] = []
    for rows in cells.values():
        worst = max(row["kl_mean"] for row in rows.values())
        line = storage_cells(next(iter(rows.values())), window)
        for text in quality.texts:
            row = rows.get(text)
            mark = "*" if row and row["kl_mean"] == worst else " "
            line[text] = "-" if row is None else nats(row["kl_mean"]) + mark
        found.append(line)
    return found


def by_position(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One dict per plan and bucket of positions, with the interval of every number."""
    return [
        {
            "plan": row["name"],
            "positions": f"{b['start']}..{b['end'] - 1}",
            "KL mean": with_interval(nats, b["kl_mean"], b["kl_mean_ci"]),
            "p99": with_interval(nats, b["kl_p99"], b["kl_p99_ci"]),
            "p99.9": with_interval(nats, b["kl_p999"], b["kl_p999_ci"]),
            "top-1, %": with_interval(lambda x: f"{100 * x:.1f}", b["top1"], b["top1_ci"]),
            "perplexity ratio": with_interval(
                lambda x: f"{x:.4f}", b["perplexity_ratio"], b["perplexity_ratio_ci"]
            ),
        }
        for row in rows
        for b in row.get("by_position", ())
    ]


def by_step(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One dict per plan that was also fed token by token: both ways, and their difference."""
    return [
        {
            "plan": row["name"],
            "positions": str(s["positions"]),
            "KL, one pass": nats(s["kl_one_pass"]),
            "KL, step by step": nats(s["kl_steps"]),
            "difference": with_interval(
                lambda x: f"{x:+.1e}", s["kl_steps"] - s["kl_one_pass"], s["difference_ci"]
            ),
            "largest": nats(s["largest"]),
            "top-1, one pass": f"{100 * s['top1_one_pass']:.1f} %",
            "top-1, step by step": f"{100 * s['top1_steps']:.1f} %",
        }
        for row in rows
        if (s := row.get("steps")) is not None
    ]


def with_interval(shown: Callable[[float], str], x: float, ci: Sequence[float] | None) -> str:
    """A number and its interval."""
    return shown(x) if ci is None else f"{shown(x)} ({shown(ci[0])} .. {shown(ci[1])})"


def scopes(rows: Sequence[Row], tokens: int) -> list[str]:
    """What was measured on one text, one line for plans that share it."""
    plans: dict[str, list[str]] = {}
    for row in rows:
        what = f"{row['quantized_tokens']} tokens" if row["quantized_tokens"] else "nothing"
        line = (
            f"{what} quantized, {row['scored_positions']} of {tokens} positions scored (exact "
            f"perplexity there {_perplexity(row['perplexity_exact'])})"
        )
        plans.setdefault(line, []).append(row["name"])
    return [f"{_together(names, len(rows))}: {line}" for line, names in plans.items()]


def cautions(rows: Sequence[Row], text: dict[str, Any]) -> list[str]:
    """What a reader of one text's rows should know: few quantized keys, few windows."""
    found: list[str] = []
    length = text["window_tokens"]
    few: dict[str, list[str]] = {}
    for row in rows:
        share = quantized_share(row, length)
        if row["quantized_tokens"] and share < 0.5:
            kept = f"first {row['policy']['sinks']}, last {row['policy']['recent']}"
            line = (
                f"at most {100 * share:.0f} % of the keys that scored positions read are quantized "
                f"({kept} exact): longer windows say more"
            )
            few.setdefault(line, []).append(row["name"])
    found += [f"{_together(names, len(rows))}: {line}" for line, names in few.items()]
    if 1 < text["windows"] < FEW and any(row["kl_ci"] for row in rows):
        found.append(
            f"intervals are over {text['windows']} windows of one text: they say how these differ, "
            "not how another text would"
        )
    return found


def unequal(rows: Sequence[Row]) -> list[str]:
    """A line where plans keep unequal numbers of tokens exact, from rows of either command."""
    plans: dict[tuple[int, int], dict[str, None]] = {}
    for row in rows:
        if row.get("quantized_tokens", 1):  # all of an exact plan is
            policy = row.get("policy", {})
            first, last = row.get("exact_tokens") or (policy["sinks"], policy["recent"])
            plans.setdefault((first, last), {})[row["plan" if "plan" in row else "name"]] = None
    if len(plans) < 2:
        return []
    said = "; ".join(f"first {a} and last {b} of {', '.join(x)}" for (a, b), x in plans.items())
    return [f"exact tokens differ, so plans do not compare: {said}"]


def quantized_share(row: Row, length: int) -> float:
    """Keys read quantized over keys read, at all positions that see a quantized one: at most so
    many in a window of `length` tokens, as blocks of tokens leave more of them exact."""
    sinks, recent = row["policy"]["sinks"], row["policy"]["recent"]
    seen = range(sinks + recent + 1, length)  # tokens a scored position sees, itself included
    return sum(n - sinks - recent for n in seen) / max(sum(seen), 1)


def _together(names: list[str], plans: int) -> str:
    if len(names) == plans:
        return "all plans" if plans > 1 else names[0]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def nats(x: float) -> str:
    """A KL in nats, as tables show it."""
    return "0" if x == 0 else f"{x:.4f}" if x >= 1e-3 else f"{x:.1e}"


def _perplexity(x: float) -> str:
    return f"{x:.3f}" if x < 1000 else f"{x:.4g}"


def format_table(quality: Quality) -> str:
    """The printed table: what was measured, one aligned line per plan, what was scored.

    Several texts are columns; a window above `LONG` tokens adds a table of quality by position,
    and plans that were also fed token by token one of both ways.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> heldout = tc.mixed_windows(["topics:heldout"], model.tokenizer, length=96, count=2)
      >>> codec = turboq.TurboQuantMSE(dim=model.spec.layers[0].head_dim, bits=3)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec)
      >>> quality = tc.evaluate(
      ...     model, [("3 bits", plan, {})], heldout.tokens, text="heldout", progress=False
      ... )
      >>> "3 bits" in tc.format_table(quality)
      True
    """
    t = quality.table
    several = len(t["texts"]) > 1
    lines = [f"{t['model']}: KL in nats per token against exact KV"]
    if several:
        lines[0] += "; * the text on which a plan loses most"
        lines += aligned(by_text(quality))
    for text in t["texts"]:
        rows = quality.rows_of(text["text"])
        window = text["window_tokens"]
        what = f"{text['text']}: windows of {window} tokens, {text['windows']} of them"
        if several:
            lines.append(what)
        else:
            table = aligned(display(row, window) for row in rows)
            lines += [f"{lines.pop()}, {what}", *table]
        lines += scopes(rows, text["tokens"]) + cautions(rows, text)
        if window > LONG and (buckets := by_position(rows)):
            lines += [f"{text['text']}: by position", *aligned(buckets)]
        if walked := by_step(rows):
            lines += [f"{text['text']}: through the packed cache", *aligned(walked)]
    return "\n".join(lines + unequal(quality.rows))


def aligned(cells: Iterable[Mapping[str, str]]) -> list[str]:
    """A heading, a rule and one line per dict; the first column is left-justified."""
    cells = list(cells)
    if not cells:
        return ["no plans were measured"]
    head = list(dict.fromkeys(h for c in cells for h in c))
    widths = {h: max(len(h), *(len(c.get(h, "")) for c in cells)) for h in head}
    first, *rest = head

    def line(values: Mapping[str, str]) -> str:
        parts = [values[first].ljust(widths[first])]
        return "  ".join(parts + [values.get(h, "").rjust(widths[h]) for h in rest]).rstrip()

    rule = "  ".join("-" * widths[h] for h in head)
    return [line({h: h for h in head}), rule, *map(line, cells)]
