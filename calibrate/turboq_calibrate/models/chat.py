"""A model's own chat template: messages to the text that it was trained on.

Templates are Jinja programs that come with a checkpoint. They run in Jinja's immutable sandbox,
with the settings and functions that transformers gives them (`apply_chat_template`), but for the
date: a template that asks is told `TODAY`, so that the same messages are the same text tomorrow.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError, quoted, shortened
from turboq.json_object import read_object

TODAY = datetime.datetime(2024, 7, 26)  # what Llama 3's templates say where no date is known
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template and the special tokens that it may name, by name: {"bos_token": "<s>"}."""

    source: str
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Any, *, answer: bool = False, tools: Any = None) -> str:
        """The text of a conversation; with `answer`, up to where the model is to answer.

        Messages are {"role": ..., "content": ...}, checked by `check_messages`.

        Raises:
          TurboqError: messages of another form; the template refuses them, or is not usable.
        """
        import jinja2

        check_messages(messages)
        try:
            return self._compiled.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=answer,
                **self.special,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise TurboqError(f"the model's chat template: {shortened(error)}") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # Programs of others, run on messages of others: Jinja passes their errors on.
            raise TurboqError(
                f"the model's chat template fails on these messages: {shortened(error)}"
            ) from error

    @functools.cached_property
    def _compiled(self) -> Any:
        import jinja2.ext
        import jinja2.sandbox

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def to_json(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            # Jinja's own filter escapes what HTML needs escaped.
            return json.dumps(
                x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                sort_keys=sort_keys,
            )  # fmt: skip

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_generation(), jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = TODAY.strftime
        return environment.from_string(self.source)


def _generation() -> Any:
    """The tag {% generation %}, which marks what the model wrote: here it changes nothing."""
    import jinja2.ext
    import jinja2.nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    return Generation


def check_messages(messages: Any) -> None:
    """Raises TurboqError unless `messages` is a list of {"role": text, "content": text}.

    The content may be missing where `tool_calls` stand.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise TurboqError("messages must be a list of one message at least")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TurboqError(f"message {n} must be an object with a role, not {quoted(message)}")
        content = message.get("content")
        if not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
            raise TurboqError(
                f"message {n} of role {quoted(message['role'])} has content {quoted(content)}: "
                "give text"
            )


def from_folder(folder: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder: `chat_template.jinja`, `chat_template.json` or the
    field of `tokenizer_config.json`, the first that is there; of several, the default.

    Raises:
      TurboqError: a file that cannot be read, or fields of the wrong form.
    """
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if config.is_file() else {}
    own, other = folder / "chat_template.jinja", folder / "chat_template.json"
    if own.is_file():
        try:
            found: Any = own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TurboqError(f"cannot read {own}: {shortened(error)}") from error
        place = own
    else:
        place = other if other.is_file() else config
        found = (read_object(other) if place is other else settings).get("chat_template")
    if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise TurboqError(f"{place}: chat_template={quoted(found)} must be text")
    special = {}
    for name in SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
        elif token is not None:
            raise TurboqError(f"{config}: {name}={quoted(token)} must be text")
    return ChatTemplate(source=found, special=special)


def from_gguf(
    metadata: Mapping[str, Any], tokens: Sequence[str], path: Path
) -> ChatTemplate | None:
    """The template of GGUF metadata, whose special tokens are numbers in `tokens`.

    Raises:
      TurboqError: not text, or a special token that is no token.
    """
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise TurboqError(f"{path}: tokenizer.chat_template={quoted(source)} must be text")
    special = {}
    for name, field in zip(SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True):
        key = f"tokenizer.ggml.{field}_token_id"
        number = metadata.get(key)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise TurboqError(f"{path}: {key}={quoted(number)} is no token")
        special[name] = tokens[number]
    return ChatTemplate(source=source, special=special)
