"""How well cheap predictions order units the way true KL does, as numbers and as a table.

Always at one fixed candidate: over all candidates every score correlates, because more bits are
better whatever is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from turboq_calibrate.candidates.table import Table

PARTS = ("all", "k", "v")


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float | None:
    """Rank correlation (ties share their mean rank); None if fewer than 3 or one is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    ranks = [stats.rankdata(x) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def compare_scores(
    table: Table, predicted: Mapping[str, Float[np.ndarray, "U C"]], kl: Float[np.ndarray, "U C"]
) -> list[dict[str, Any]]:
    """One row per measured candidate and score: rank correlation with KL over units.

    Each row: `candidate`, `score`, `spearman` over all units, keys and values, and `ratio`, the sum
    of predictions over the sum of measured KL (1 where a score predicts nats).

    Args:
      kl: of single units, NaN where nothing was measured.
    """
    side = np.array([u.side for u in table.units])
    rows = []
    for c, label in enumerate(table.labels):
        known = np.isfinite(kl[:, c])
        if not known.any():
            continue
        for name, costs in predicted.items():
            of = {part: known & ((side == part) | (part == "all")) for part in PARTS}
            rows.append(
                {
                    "candidate": label,
                    "score": name,
                    "units": int(known.sum()),
                    "spearman": {p: spearman(costs[m, c], kl[m, c]) for p, m in of.items()},
                    "ratio": float(costs[known, c].sum() / kl[known, c].sum()),
                }
            )
    return rows


def format_scores(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""

    def cell(x: float | None) -> str:
        return "-" if x is None else f"{x:.2f}"

    head = ("candidate", "score", *(f"spearman {p}" for p in PARTS), "predicted / KL")
    body = [
        (r["candidate"], r["score"], *(cell(r["spearman"][p]) for p in PARTS), f"{r['ratio']:.3g}")
        for r in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(x.ljust(w) if i < 2 else x.rjust(w)
                  for i, (x, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (head, *body)
    )  # fmt: skip
