"""Each task solved from its prompt alone, by other means than those that wrote it."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter


def _last(pattern: str, text: str) -> str:
    return re.findall(pattern, text)[-1]


def passkey(prompt):
    return f" {_last(r'Remember it: ([0-9]+)', prompt)}."


def _numbers(prompt, key):
    text, _, _ = prompt.rpartition("\n\n")
    return re.findall(rf"special number of the {re.escape(key)} is ([0-9]+)", text)


def needle_single(prompt):
    (value,) = _numbers(prompt, _last(r"number of the ([a-z ]+) is$", prompt))
    return f" {value}."


needle_multi_key = needle_single


def needle_multi_value(prompt):
    return f" {', '.join(_numbers(prompt, _last(r'of the ([a-z ]+), in order', prompt)))}."


def key_value(prompt):
    data = prompt[prompt.index("{") : prompt.index("}") + 1]
    return json.loads(data)[_last('"([0-9a-f-]+)": "$', prompt)] + '"'


def number_strings(prompt):
    key = prompt.rpartition("\n")[2].rstrip(":")
    return f" {dict(re.findall('([a-z ]+): ([0-9]+)', prompt))[key]}\n"


def copying(prompt):
    lines = dict(re.findall(r"Line ([0-9]+): (.*)\.", prompt))
    return f" {lines[_last(r'Line ([0-9]+):$', prompt)]}."


def variable_tracking(prompt):
    held, order = {}, []
    for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z0-9]+)\.", prompt):
        held[name] = held.get(value, value)
        order.append(name)
    asked = _last(r"hold ([0-9]+) are", prompt)
    return f" {', '.join(name for name in order if held[name] == asked)}."


def common_words(prompt):
    ((word, most), (_, next_most)) = Counter(re.findall(r"[0-9]+\. ([a-z]+)", prompt)).most_common(
        2
    )
    assert most > next_most
    return f" {word}."


def frequent_words(prompt):
    counts = Counter(prompt.split("\n")[1].split()).most_common(4)
    assert len({n for _, n in counts}) == 4
    return f" {', '.join(word for word, _ in counts[:3])}."


def tool_calls(prompt):
    schemas = [json.loads(line) for line in prompt.split("\n") if line.startswith('{"name')]
    name = json.loads(prompt.rpartition("Call: ")[2] + "}")["name"]
    purpose = _last(r"Request: (.*)", prompt)
    (one,) = (x for x in schemas if x["name"] == name and x["description"] == purpose)
    ((argument, allowed),) = one["parameters"].items()
    call = json.dumps({"name": name, "arguments": {argument: allowed["enum"][0]}})
    return call.removeprefix(prompt.rpartition("Call: ")[2])


def distant_code(prompt):
    code, _, asked = prompt.rpartition("\n")
    functions = {x.name: x for x in ast.parse(code).body if isinstance(x, ast.FunctionDef)}
    arguments = functions[asked.rstrip("(")].args.args
    return ", ".join(f"{x.arg}={i}" for i, x in enumerate(arguments, 1)) + ")"


def arithmetic(prompt):
    steps, _, given = prompt.partition("\nTotals:\n")
    total, totals = int(_last(r"Start with ([0-9]+)", steps)), []
    for n, word, by in re.findall(r"([0-9]+)\. (Add|Take away) ([0-9]+)", steps):
        assert int(n) == len(totals) + 1
        total += int(by) if word == "Add" else -int(by)
        totals.append(total)
    every = "".join(f"{n}. {x}\n" for n, x in enumerate(totals, 1))
    assert every.startswith(given)
    return every.removeprefix(given)
