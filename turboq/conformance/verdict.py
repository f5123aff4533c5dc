"""One verdict per check, and the table of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

PASS, FAIL, NOT_CLAIMED = "pass", "FAIL", "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """`why` is one line: what was measured against what, and on failure what is wrong."""

    check: str
    status: str
    why: str

    @property
    def failed(self) -> bool:
        return self.status == FAIL


def judge(check: str, ok: bool, why: str, hint: str = "") -> Verdict:
    """Pass or FAIL; the hint is added to a failure."""
    ok = bool(ok)
    text = why if ok or not hint else f"{why}: {hint}"
    return Verdict(check=check, status=PASS if ok else FAIL, why=text)


def not_claimed(check: str, why: str) -> Verdict:
    return Verdict(check=check, status=NOT_CLAIMED, why=why)


def table(results: Mapping[str, Sequence[Verdict]], *, explain: bool = False) -> str:
    """A row per adapter and a column per check; below it one line per failure (or per check)."""
    checks = list(dict.fromkeys(v.check for verdicts in results.values() for v in verdicts))
    wide = max((len(name) for name in results), default=0)
    lines = [" ".join([" " * wide, *checks, "verdict"])]
    for name, verdicts in results.items():
        status = {v.check: v.status for v in verdicts}
        cells = [f"{status.get(check, ''):{len(check)}}" for check in checks]
        overall = FAIL if any(v.failed for v in verdicts) else PASS
        lines.append(" ".join([f"{name:{wide}}", *cells, overall]))
    told = [
        f"{name}: {v.check} {v.status}: {v.why}"
        for name, verdicts in results.items()
        for v in verdicts
        if explain or v.failed
    ]
    return "\n".join(lines + (["", *told] if told else []))
