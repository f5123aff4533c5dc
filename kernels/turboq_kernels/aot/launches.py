"""How many kernels a compiled program starts, by its scheduled HLO.

What stands in the entry computation and takes time of its own is counted: fusions, products,
copies, kernels; a loop's body as often as it runs. Views, constants and the second halves of
asynchronous operations are nothing, and on TPU copies into fast memory that run beside others
(`copy-start`, `slice-start`) are counted apart.
"""

from __future__ import annotations

import collections
import dataclasses
import re

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "optimization-barrier", "partition-id", "replica-id", "copy-done", "slice-done",
    "dynamic-slice-done", "async-done", "async-update",
}  # fmt: skip
_AHEAD = {"copy-start", "slice-start", "dynamic-slice-start"}
_VIEWS = ("ConcatBitcast",)  # custom calls that do nothing
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w-]*)\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Launches:
    """Names of what is started, without their numbers, and how often; the largest plain copy."""

    names: dict[str, int]
    ahead: int
    copied_bytes: int

    @property
    def count(self) -> int:
        return sum(self.names.values())


def read(hlo: str, turns: int | None = None) -> Launches:
    """Of the text of a compiled program; loops that run an unknown number of times run `turns`.

    Raises:
      ValueError: no entry computation, or such a loop and no `turns`.
    """
    computations = _computations(hlo)
    entry = next((name for name in computations if name.startswith("ENTRY ")), None)
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(hlo)} characters of HLO")
    names: collections.Counter[str] = collections.Counter()
    ahead, copied = _count(computations, entry, names, 1, turns)
    return Launches(dict(sorted(names.items())), ahead, copied)


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines of every computation by its name; that of the entry begins with "ENTRY "."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = found[(head[1] or "") + head[2]] = []
        elif " = " in line:
            lines.append(line)
    return found


def _count(computations, name: str, names, times: int, turns: int | None = None) -> tuple[int, int]:
    """Adds a computation that runs so often to `names`; what starts ahead, the largest copy."""
    ahead, copied = 0, 0
    for line in computations[name]:
        parsed = _OPERATION.match(line)
        opcode = parsed and _OPCODE.search(parsed[2])
        if not parsed or not opcode:
            continue
        own, kind = parsed[1], opcode[1]
        inside: list[tuple[str, int]] = []
        if kind == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            often = int(trips[1]) if trips else turns
            if often is None:
                raise ValueError(f"loop {own} runs an unknown number of times")
            inside = [(_named(line, part), often) for part in ("condition", "body")]
        elif kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            both = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
            options = re.findall(r"%?([\w.-]+)", branches[1]) if branches else both
            inside = [(_dearest(computations, options, turns), 1)]
        elif kind == "call":
            inside = [(_named(line, "to_apply"), 1)]
        elif kind in _AHEAD:
            ahead += times
        elif kind not in _FREE and not any(f'"{view}"' in line for view in _VIEWS):
            names[_plain(own, line)] += times
        if kind in ("copy", "copy-start"):
            copied = max(copied, _size(parsed[2][: opcode.start()].split(")")[0]))
        for computation, more in inside:
            both_of = _count(computations, computation, names, times * more, turns)
            ahead, copied = ahead + both_of[0], max(copied, both_of[1])
    return ahead, copied


def _named(line: str, part: str) -> str:
    found = re.search(rf"{part}=%?([\w.-]+)", line)
    if found is None:
        raise ValueError(f"no {part} in {line.strip()[:200]}")
    return found[1]


def _dearest(computations, options: list[str], turns: int | None) -> str:
    """The branch that starts most."""

    def launches(option: str) -> int:
        names: collections.Counter[str] = collections.Counter()
        _count(computations, option, names, 1, turns)
        return sum(names.values())

    return max(options, key=launches)


def _plain(name: str, line: str) -> str:
    """A kernel's own name, else the operation's without its number."""
    kernel = re.search(r"(turboq_\w+)/pallas_call", line) if " custom-call(" in line else None
    return kernel[1] if kernel else re.sub(r"\.\d+|\.clone|\.refs_\d+_", "", name)


def _size(shape: str) -> int:
    """Bytes of the first array in the text of a shape."""
    found = re.search(r"(\w+)\[([\d,]*)\]", shape)
    if found is None:
        return 0
    size = _BYTES.get(found[1], 4)
    for dim in filter(None, found[2].split(",")):
        size *= int(dim)
    return size
