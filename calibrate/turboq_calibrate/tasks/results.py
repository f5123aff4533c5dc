"""`tasks.json` and the files of single scores: their shape, their reader, their printed table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turboq.cache.accounting import readable
from turboq.files import make_folder, settle, write_together
from turboq.plan import json_file
from turboq.plan.errors import PlanError, shown
from turboq_calibrate.measure.quality_table import aligned, json_text, unequal, with_interval
from turboq_calibrate.tasks.score import Score

SCHEMA = 1
RESULTS = "tasks.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredScore:
    """`Score` as a file keeps it."""

    logp: tuple[float, ...]
    rank: int
    agrees: bool
    greedy: tuple[int, ...]

    def __post_init__(self):
        if len(self.logp) < 2 or self.rank < 1:
            raise ValueError(f"{self.logp=} must be two or more, {self.rank=} 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtDepth:
    depth: float
    logp_change: float
    agrees: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One plan on one task at one length (at chance: the exact cache): `statistics.summary`."""

    plan: str
    bits_per_channel: float
    cache_bytes: int
    exact_tokens: tuple[int, int]
    task: str
    length: int
    examples: int
    at_chance: bool
    logp: float
    logp_exact: float
    logp_change: float
    logp_change_ci: tuple[float, float] | None
    rank: float
    rank_exact: float
    agrees: float
    chosen: float
    chosen_exact: float
    chosen_p: float
    matches: float
    matches_exact: float
    matches_p: float
    by_depth: tuple[AtDepth, ...]
    examples_needed: int | None = dataclasses.field(default=None, metadata={"optional": True})
    logp_examples: tuple[float, ...] | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    bits_per_channel_at_length: float | None = dataclasses.field(
        default=None, metadata={"optional": True}
    )
    rank_median: float | None = dataclasses.field(default=None, metadata={"optional": True})
    rank_median_exact: float | None = dataclasses.field(default=None, metadata={"optional": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    schema: int
    model: str
    model_fingerprint: str
    seed: int
    depths: tuple[float, ...]
    rows: tuple[TaskRow, ...]


def write_results(table: dict[str, Any], folder: str | Path) -> Path:
    """Writes `tasks.json` into `folder` (made if absent); its path."""
    folder = make_folder(folder)
    write_together(folder, {RESULTS: json_text(table)})
    return folder / RESULTS


def read_results(folder: str | Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
      TurboqError: the file is missing or not what `Results` says.
    """

    def schema(value: Any) -> None:
        if isinstance(value, dict) and value.get("schema") != SCHEMA:
            raise PlanError("schema", f"{shown(value.get('schema'))}, this version reads {SCHEMA}")

    settle(Path(folder))
    again = "run `turboq tasks` again"
    return json_file.read_json(Path(folder) / RESULTS, Results, otherwise=again, first=schema)


def read_score(path: Path) -> Score:
    """Raises TurboqError where the file is no score."""
    found = json_file.read_json(path, StoredScore, otherwise="remove it to measure it again")
    return Score(
        logp=tuple(found["logp"]),
        rank=found["rank"],
        agrees=found["agrees"],
        greedy=tuple(found["greedy"]),
    )


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One dict per task and length: what the exact cache can do, and what each plan changes."""
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["task"], row["length"]), {})
        chance = ""
        if row["at_chance"]:
            chance = " (too few examples)" if too_few(row) else " (chance)"
        line |= {
            "task": row["task"],
            "length": str(row["length"]),
            "exact": f"{100 * row['chosen_exact']:.0f} %{chance}",
            "written": f"{100 * row['matches_exact']:.0f} %",
        }
        if not row["at_chance"]:
            line[row["plan"]] = f"{row['logp_change']:+.2f} {100 * row['agrees']:.0f} %"
    order = {task: i for i, (task, _) in enumerate(lines)}
    return [lines[key] for key in sorted(lines, key=lambda x: (x[1], order[x[0]]))]


def sizes(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One dict per plan: bits per channel of one token, and all that is resident by length."""
    lines: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        line = lines.setdefault(
            row["plan"], {"plan": row["plan"], "bits/ch": f"{row['bits_per_channel']:.2f}"}
        )
        at, bits = row["length"], row.get("bits_per_channel_at_length")
        line[f"all at {at}"] = "-" if bits is None else f"{bits:.2f}"
        line[f"bytes at {at}"] = readable(row["cache_bytes"])
    return [lines[name] for name in dict.fromkeys(row["plan"] for row in rows)]


SIZES = (
    "bits/ch: every stored bit of one quantized token over its K and V channels; all, bytes at N: "
    "everything resident for N tokens (pages, exact tokens, fitted arrays, tables)"
)


def too_few(row: dict[str, Any]) -> bool:
    """Even if all examples were right, chance could not be ruled out."""
    return row["examples"] < (row.get("examples_needed") or 0)


def details(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One dict per plan, length and task that counts: the change with its interval, the rank, what
    is written, and the change at every depth."""

    def both(row: dict[str, Any], name: str, shown: Callable[[float], str]) -> str:
        mine, theirs = row.get(name), row.get(f"{name}_exact")
        return "-" if mine is None or theirs is None else f"{shown(mine)} / {shown(theirs)}"

    def one(row: dict[str, Any]) -> dict[str, str]:
        return {
            "task": row["task"],
            "length": str(row["length"]),
            "plan": row["plan"],
            "change (95 %)": with_interval(
                lambda x: f"{x:+.2f}", row["logp_change"], row["logp_change_ci"]
            ),
            "median rank / exact": both(row, "rank_median", lambda x: f"{x:g}"),
            "written / exact": both(row, "matches", lambda x: f"{100 * x:.0f} %"),
            "McNemar p": f"{row['matches_p']:.2g}",
        } | {f"at {x['depth']:g}": f"{x['logp_change']:+.2f}" for x in row["by_depth"]}

    rows = [row for row in rows if not row["at_chance"]]
    order = {task: i for i, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    return [one(row) for row in sorted(rows, key=lambda x: (x["length"], order[x["task"]]))]


DETAILS = (
    "change of the log-probability with its interval over examples (and by depth), median rank of "
    "the right answer, how often greedy decoding writes it, and whether that differs"
)


def notes_of(table: dict[str, Any]) -> list[str]:
    """What the printed table says in words: its heading, and what must not be overlooked."""
    rows = table["rows"]
    lines = [
        f"{table['model']}: exact: the right answer is the likeliest of those offered; written: "
        "greedy decoding writes it. Plans: change of its log-probability in nats, and how often "
        "greedy decoding writes what it writes with the exact cache"
    ]
    lines += unequal([row for row in rows if not row["at_chance"]])
    few = {r["task"]: f"{r['task']} ({r['examples_needed']} needed)" for r in rows if too_few(r)}
    if few:
        said = ", ".join(few.values())
        lines.append(f"too few examples to tell from chance, so counted for nothing: {said}")
    chance = list(
        dict.fromkeys(row["task"] for row in rows if row["at_chance"] and not too_few(row))
    )
    if chance:
        lines.append(f"at chance with the exact cache, so counted for nothing: {', '.join(chance)}")
    return lines


def format_results(table: dict[str, Any]) -> str:
    """The printed tables: a line per task and length with a column per plan, `sizes`, `details`."""
    heading, *notes = notes_of(table)
    rows = table["rows"]
    lines = [heading, *aligned(cells(rows)), *notes, SIZES, *aligned(sizes(rows))]
    more = details(rows)
    return "\n".join([*lines, DETAILS, *aligned(more)] if more else lines)
