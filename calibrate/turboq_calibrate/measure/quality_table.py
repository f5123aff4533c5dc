"""The quality table as data: `quality.json`, `quality.csv`, `run.json` and the printed table.

`quality.json` holds only what follows from model, plans and text, so two runs write the same bytes;
seconds, memory and versions are in `run.json`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder

SCHEMA = 1
QUALITY, TABLE, RUN = "quality.json", "quality.csv", "run.json"
# The columns of issue and CSV, in order; nested values are flattened or left to the JSON.
COLUMNS: tuple[str, ...] = (
    "name", "codec", "k_codec", "v_codec", "k_bits", "v_bits", "bits_per_channel",
    "bits_per_channel_at_context", "context", "sinks", "recent", "text", "kl_mean", "kl_median",
    "kl_ci_lo", "kl_ci_hi", "kl_p99", "top1", "perplexity", "perplexity_ratio", "bytes_per_token",
    "compression",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """`table`: what `quality.json` holds. `run`: how this run of it went."""

    table: dict[str, Any]
    run: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per plan, in the order given."""
        return self.table["rows"]


def write_quality(quality: Quality, folder: str | Path) -> Path:
    """Writes the three files into `folder` (made if absent); returns the path of `quality.json`.

    Raises:
      TurboqError: the folder cannot be made or written.
    """
    folder = make_folder(folder)
    atomic_write(folder / TABLE, csv_text(quality.rows))
    atomic_write(folder / RUN, _json(quality.run))
    atomic_write(folder / QUALITY, _json(quality.table))
    return folder / QUALITY


def read_quality(folder: str | Path) -> Quality:
    """Reads what `write_quality` wrote; `run.json` may be absent.

    Raises:
      TurboqError: `quality.json` is missing, not JSON, or of another schema.
    """
    path = Path(folder) / QUALITY
    table = _load(path)
    if table.get("schema") != SCHEMA or not isinstance(table.get("rows"), list):
        raise TurboqError(
            f"{path} has schema {table.get('schema')!r}, this version reads {SCHEMA}: "
            "run `turboq evaluate` again"
        )
    run = Path(folder) / RUN
    return Quality(table=table, run=_load(run) if run.exists() else {})


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TurboqError(f"{path} does not exist: run `turboq evaluate` first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TurboqError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise TurboqError(f"{path} does not hold a JSON object")
    return value


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row's values by `COLUMNS`; a missing interval is empty."""
    lo, hi = row["kl_ci"] or ("", "")
    extra = {"kl_ci_lo": lo, "kl_ci_hi": hi} | row["policy"]
    return {name: extra[name] if name in extra else row[name] for name in COLUMNS}


def csv_text(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV (RFC 4180 quoting, newline line ends)."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(row) for row in rows)
    return buffer.getvalue()


def display(row: dict[str, Any]) -> dict[str, str]:
    """The cells people read, as text: heading -> cell."""
    ci = row["kl_ci"]
    return {
        "plan": row["name"],
        "bits/ch": f"{row['bits_per_channel']:.2f}",
        "bytes/token": f"{row['bytes_per_token']:g}",
        "vs bf16": f"{row['compression']:.2f}x",
        "KL mean": _nats(row["kl_mean"]),
        "95 % interval": "-" if ci is None else f"{_nats(ci[0])} .. {_nats(ci[1])}",
        "median": _nats(row["kl_median"]),
        "p99": _nats(row["kl_p99"]),
        "top-1": f"{100 * row['top1']:.1f} %",
        "perplexity": _perplexity(row["perplexity"]),
    }


def _nats(x: float) -> str:
    return "0" if x == 0 else f"{x:.4f}" if x >= 1e-3 else f"{x:.1e}"


def _perplexity(x: float) -> str:
    return f"{x:.3f}" if x < 1000 else f"{x:.4g}"


def format_table(quality: Quality) -> str:
    """The printed table: what was measured on one line, then one aligned line per plan."""
    t = quality.table
    cells = [display(row) for row in t["rows"]]
    head = list(cells[0])
    widths = {h: max(len(h), *(len(c[h]) for c in cells)) for h in head}

    def line(values: dict[str, str]) -> str:
        first, *rest = head
        parts = [values[first].ljust(widths[first]), *(values[h].rjust(widths[h]) for h in rest)]
        return "  ".join(parts).rstrip()

    return "\n".join(
        [
            f"{t['model']} on {t['text']}: {t['windows']} windows of {t['window_tokens']} tokens, "
            f"KL in nats per token against exact KV (perplexity {t['exact']['perplexity']:.3f})",
            line({h: h for h in head}),
            "  ".join("-" * widths[h] for h in head),
            *map(line, cells),
        ]
    )
