"""What `turboq memory` found, as text and as CSV. Sizes are GiB (2^30 bytes) throughout."""

from __future__ import annotations

import csv
import io
from typing import Any

GIB = 2**30
COLUMNS = (
    "model", "codec", "view", "context", "sessions_asked", "bytes_per_token", "kv_bytes",
    "weights_bytes", "working_bytes", "memory_gib", "weights_fit", "max_context", "max_sessions",
)  # fmt: skip


def size(nbytes: int | float) -> str:
    """4294967296 -> `4.000 GiB`; below 1 MiB in bytes."""
    if nbytes >= GIB / 10:
        return f"{nbytes / GIB:.3f} GiB"
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 2**20 else f"{nbytes:,} bytes"


def tokens(count: int | None) -> str:
    return "no limit" if count is None else f"{count:,}"


def text(a: dict[str, Any]) -> str:
    """The answer on a screen: the cache, what it rests on, and the tables that were asked for."""
    lines = [*_head(a), "", *_cache(a), "", *_layers(a), "", *_budget(a)]
    if a["choice"] is not None:
        lines += ["", *_choice(a)]
    lines += ["", *_cards(a)]
    if a["estimate"] is not None:
        lines += ["", *_estimate(a)]
    return "\n".join(lines)


def _head(a: dict[str, Any]) -> list[str]:
    g = a["geometry"]
    lines = [f"{a['model']} ({g['family']}), cache as {a['codec']}"]
    if g["source"]:
        lines.append(f"geometry from {g['source']}")
    if g["note"]:
        lines.append(f"note: {g['note']}")
    if g["above_its_context"]:
        lines.append(
            f"note: a context of {a['context']:,} is above the {g['context']:,} tokens that the "
            "model is made for"
        )
    return lines


def _cache(a: dict[str, Any]) -> list[str]:
    beyond = ""
    if a["bytes_per_token_beyond_windows"] != a["bytes_per_token"]:
        beyond = f", {a['bytes_per_token_beyond_windows']:,} once the windows are full"
    views = a["views"]
    rows = [
        ("bytes per token", f"{a['bytes_per_token']:,}{beyond}"),
        (
            "bits per channel",
            f"{a['bits_per_channel']:.3f} ({a['bits_per_channel_at_context']:.3f} at "
            f"{a['context']:,} tokens, all counted)",
        ),
        (
            f"cache of {a['batch']} x {a['context']:,} tokens",
            " = ".join(dict.fromkeys((size(a["kv_bytes"]), f"{a['kv_bytes']:,} bytes"))),
        ),
        (
            "the same in 16 bits",
            f"{size(a['bf16_bytes'])} ({a['bf16_bytes'] / a['total_bytes']:.2f}x)",
        ),
    ]
    if a["prefix"]:
        rows.append(("shared prefix", f"{a['prefix']:,} tokens, stored once for all sessions"))
    if a["view"] == "ours":
        rows.append(("counted", "what turboq's own cache holds"))
        rows.append(("  by the formula alone", size(views["engine"])))
        rows += [(f"  + {reason}", size(extra)) for reason, extra in views["difference"].items()]
        rows.append(("arrays and tables", size(a["total_bytes"] - a["kv_bytes"])))
    else:
        page = views["engine_page_tokens"]
        pages = "" if page == 1 else f", in whole pages of {page} tokens"
        rows.append(("counted", f"stored bits times tokens kept{pages} (any engine)"))
    unknown = a["layers_of_unknown_state"]
    if a["state_bytes"] or unknown:
        known = size(a["state_bytes"]) if a["state_bytes"] else ""
        of = f"of {unknown} layers is not known and not counted" if unknown else ""
        rows.append(("recurrent state", "; ".join(part for part in (known, of) if part)))
    return _pairs(rows)


def _layers(a: dict[str, Any]) -> list[str]:
    rows = [("layers", "kind", "KV heads", "dims", "bytes/token", "tokens kept", "one session")]
    for row in a["layers"]:
        dims = f"{row['k_dim']}+{row['v_dim']}" if row["k_dim"] else "-"
        dims += f" index {row['index_dim']}" if row["index_dim"] else ""
        kind = row["kind"] + (f" {row['window']}" if row["window"] else "")
        rows.append(
            (
                str(row["layers"]), kind, str(row["kv_heads"] or "-"), dims,
                f"{row['bytes_per_token']:,}", f"{row['tokens_kept']:,}", size(row["bytes"]),
            )
        )  # fmt: skip
    return _aligned(rows)


def _budget(a: dict[str, Any]) -> list[str]:
    percent = f"{100 * a['overhead']:g} % allocator overhead on the cache"
    rows = [
        ("weights", f"{size(a['weights_bytes'])} ({a['geometry']['weights_from']})"),
        ("working memory", size(a["working_bytes"])),
        ("memory needed", f"{size(a['needed_bytes'])}, {percent}"),
    ]
    if a["memory_gib"] is not None:
        rows.append(
            (f"longest context in {a['memory_gib']:g} GiB", f"{tokens(a['max_context'])} tokens")
        )
        rows.append((f"sessions of {a['context']:,} tokens", tokens(a["max_sessions"])))
    elif a["max_context"] is not None:
        rows.append(("longest context of the model", f"{a['max_context']:,} tokens"))
    return _pairs(rows)


def _choice(a: dict[str, Any]) -> list[str]:
    choice = a["choice"]
    what = choice["chosen"] or "nothing: every option is too large"
    lines = [
        f"best quality that fits {a['memory_gib']:g} GiB at {a['context']:,} tokens: {what}",
        f"(order: {choice['order']})",
    ]
    rows = [("cache", "KL", "memory needed", "fits", "longest context", "the choice at")]
    for o in choice["options"]:
        if o["first"] is None:
            span = "-"
        elif o["last"] is None:
            span = f"from {o['first']:,}"
        else:
            span = f"{o['first']:,} to {o['last']:,}"
        kl = "-" if o["kl"] is None else f"{o['kl']:.4g}"
        fits = "yes" if o["fits"] else "no"
        rows.append((o["name"], kl, size(o["needed"]), fits, tokens(o["max_context"]), span))
    if all(o["kl"] is None for o in choice["options"]):  # nothing was measured: no column of dashes
        rows = [(row[0], *row[2:]) for row in rows]
    return lines + _aligned(rows)


def _cards(a: dict[str, Any]) -> list[str]:
    """Longest context per card, one line per way of storing the cache."""
    sizes = list(dict.fromkeys(card["gib"] for card in a["cards"]))
    names = list(dict.fromkeys(card["codec"] for card in a["cards"]))
    cell = {(c["codec"], c["gib"]): c for c in a["cards"]}

    def shown(name: str, gib: float, key: str) -> str:
        card = cell[name, gib]
        return tokens(card[key]) if card["fits"] else "weights too large"

    lines = []
    for key, title in (
        ("max_context", f"longest context of {a['batch']} session(s), tokens"),
        ("sessions", f"sessions of {a['context']:,} tokens"),
    ):
        rows = [("", *(f"{gib:g} GB" for gib in sizes))]
        rows += [(name, *(shown(name, gib, key) for gib in sizes)) for name in names]
        lines += [title, *_aligned(rows), ""]
    lines.append(
        f"an n GB card is counted as n GiB, of which weights take {size(a['weights_bytes'])} "
        f"({a['geometry']['weights_from']}) and working memory {size(a['working_bytes'])}"
    )
    if a["geometry"]["context"] is not None:
        lines.append(f"the model itself is made for {a['geometry']['context']:,} tokens")
    return lines


def _estimate(a: dict[str, Any]) -> list[str]:
    e = a["estimate"]
    return [
        f"decode speed, ESTIMATE from bandwidth, not measured: at most "
        f"{e['tokens_per_second']:,.1f} tokens/s in all",
        f"  {size(e['weights_read'])} of weights and {size(e['cache_read'])} of cache per step",
        *(f"  assumes {line}" for line in e["assumptions"]),
    ]


def csv_text(a: dict[str, Any]) -> str:
    """One row per way of storing the cache and card (RFC 4180 quoting, newline line ends)."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    asked = {
        "model": a["model"], "view": a["view"], "context": a["context"],
        "sessions_asked": a["batch"], "weights_bytes": a["weights_bytes"],
        "working_bytes": a["working_bytes"],
    }  # fmt: skip
    for card in a["cards"]:
        stored = a["stored"][card["codec"]]
        writer.writerow(
            asked
            | stored
            | {
                "codec": card["codec"],
                "memory_gib": card["gib"],
                "weights_fit": card["fits"],
                "max_context": "" if card["max_context"] is None else card["max_context"],
                "max_sessions": "" if card["sessions"] is None else card["sessions"],
            }
        )
    return buffer.getvalue()


def _pairs(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(key) for key, _ in rows)
    return [f"{key:<{width}}  {value}" for key, value in rows]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for row in rows:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        out.append("  ".join([first, *rest]).rstrip())
    return out
