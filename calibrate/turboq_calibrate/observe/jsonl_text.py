"""Text from JSON lines: one document or one conversation a line.

    {"text": "..."}                                         a document; a blank line follows it
    {"messages": [{"role": "user", "content": "..."}, ...]} a conversation, in the model's own words

Conversations are written by the model's chat template, one behind the other; `tools` of a line are
handed to it. Other fields (identifiers, sources) say nothing to a model and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from turboq.errors import TurboqError, quoted, shortened
from turboq_calibrate.models.chat import ChatTemplate


def text_of(lines: str, name: object, chat: ChatTemplate | None) -> str:
    """All documents and conversations of a file called `name`.

    Raises:
      TurboqError: as `rows`; no line at all; messages for a model without a chat template, or that
        its template refuses.
    """
    parts: list[str] = []
    for where, row in rows(lines, name):
        if "text" in row:
            parts.append(row["text"] + "\n\n")
            continue
        if chat is None:
            raise TurboqError(
                f"{where} holds messages, and the model has no chat template to write them: give "
                "lines with text, or a model that has one"
            )
        try:
            parts.append(chat.render(row["messages"], tools=row.get("tools")))
        except TurboqError as error:
            raise TurboqError(f"{where}: {error}") from error
    if not parts:
        raise TurboqError(f"text file {name} is empty")
    return "".join(parts)


def rows(lines: str, name: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line number, object) of every line that is not blank.

    Raises:
      TurboqError: a line that is no JSON object, or that has not just one of text and messages.
    """
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TurboqError(f"{where} is not valid JSON: {shortened(error)}") from error
        if not isinstance(row, dict):
            raise TurboqError(f"{where} must be a JSON object, not {type(row).__name__}")
        found = [field for field in ("text", "messages") if row.get(field) is not None]
        if len(found) != 1:
            has = "both text and messages: keep one"
            if not found:
                fields = ", ".join(map(quoted, row)) or "nothing"
                has = f"neither text nor messages, but {fields}: give one of them"
            raise TurboqError(f"{where} has {has}")
        if found == ["text"] and not (isinstance(row["text"], str) and row["text"].strip()):
            raise TurboqError(f"{where}: text={quoted(row['text'])} must be text")
        yield where, {field: row[field] for field in (*found, "tools") if field in row}
