"""Continues prompts through packed caches, greedily or sampled, many at once.

Prompts are --prompt (repeated for several) and --prompts: files, each one prompt, or .jsonl with a
text or messages a line. --chat puts prompts of plain text into the model's chat template as what a
user says; messages are always put there. Prints the answers and tokens per second; --compare the
same through an exact cache, and how many answers are equal. Speeds leave out the first call of each
kind, which compiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common, named_plans

if TYPE_CHECKING:
    from turboq_calibrate.measure.evaluate import NamedPlan
    from turboq_calibrate.measure.generate_many import Answers, Clock
    from turboq_calibrate.models import Model, Tokenizer

REQUIRED = ()
RESUME = "run the same command again"


def define(values: flags.FlagValues) -> None:
    common.model(values)
    common.model_dtype(values)
    named_plans.define(values)
    flags.DEFINE_multi_string("prompt", [], "A prompt; repeat the flag.", flag_values=values)
    flags.DEFINE_multi_string(
        "prompts", [], "Files of prompts, comma-separated: one a file, or .jsonl with a text or "
        "messages a line.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "chat", False, "Ask in the model's chat template, as a user.", flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", 128, "Most tokens of an answer.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "temperature", 0.0, "0 takes the likeliest token; above, tokens are drawn.",
        lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "top_p", 1.0, "Draw from the fewest tokens that have this probability in all.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Seed of what is drawn.", lower_bound=0, flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "A text that ends an answer and is left out of it; repeat the flag.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("eos", True, "Stop at the model's end tokens.", flag_values=values)
    flags.DEFINE_integer("batch", 8, "Prompts at once.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean(
        "compare", False, "Also through an exact cache, in the same run.", flag_values=values
    )
    common.out(values, "File to write the answers to, as JSON lines.")


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    import json

    from turboq.files import atomic_write
    from turboq_calibrate.measure.generate_many import Sampling, cut, generate, stops_at
    from turboq_calibrate.models import load_model
    from turboq_calibrate.run.progress import phases

    with common.as_user_error():
        sampling = Sampling(temperature=values.temperature, top_p=values.top_p, seed=values.seed)
    if "" in values.stop:
        raise TurboqError("--stop: an empty text would end every answer")
    model = load_model(values.model, dtype=values.model_dtype, long_context=values.long_context)
    rows = _rows(values, model)
    tokenizer = model.tokenizer
    texts = _prompts(values, tokenizer)
    prompts = [_tokens(tokenizer, text, chat) for text, chat in texts]
    found: dict[str, Answers] = {}
    with phases(*["generate"] * len(rows)):
        for name, plan, arrays in rows:
            found[name] = generate(
                model, prompts, values.max_new_tokens, layers=plan.kv_layers(arrays),
                sampling=sampling, stop_ids=tokenizer.eos_ids if values.eos else (),
                stop=stops_at(tokenizer, values.stop), batch=values.batch,
            )  # fmt: skip
    lines = []
    for name, answers in found.items():
        for i, (tokens, stopped) in enumerate(zip(answers.tokens, answers.stopped, strict=True)):
            text = cut(tokenizer.decode(tokens, skip_special=True), values.stop)
            lines.append(
                {
                    "cache": name,
                    "prompt": i,
                    "text": text,
                    "tokens": len(tokens),
                    "stopped": stopped,
                }
            )
            print(f"--- {name}, prompt {i}\n{text}")
    if values.out:
        atomic_write(Path(values.out), "".join(json.dumps(line) + "\n" for line in lines))
    print("---\n" + _table(found, len(prompts)))


def _rows(values: flags.FlagValues, model: Model) -> list[NamedPlan]:
    """The caches: those named, an exact one beside them or alone."""
    from turboq.codecs import Exact
    from turboq.plan import uniform_plan
    from turboq_calibrate.models.geometry import model_geometry

    rows = named_plans.load_all(values, model) if values.plan or values.baselines else []
    names = [name for name, _, _ in rows]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TurboqError(f"two caches are named {twice[0]!r}: name one of them (NAME=PATH)")
    if (not rows or values.compare) and "exact" not in names:
        geometry = model_geometry(model)
        codec = Exact(dim=geometry.cache_layers[0].k_dim)
        rows = [("exact", uniform_plan(geometry, k=codec, v=codec), {}), *rows]
    return rows


def _prompts(values: flags.FlagValues, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether the chat template wrote it) of every prompt.

    Raises:
      TurboqError: none, an empty one, an unreadable file, messages without a chat template.
    """
    from turboq_calibrate.observe.jsonl_text import rows
    from turboq_calibrate.observe.texts import read_file

    def asked(where: str, row: dict) -> tuple[str, bool]:
        if "text" in row and not values.chat:
            return row["text"], False
        if tokenizer.chat is None:
            raise TurboqError(f"{where}: the model has no chat template: give plain text")
        messages = row.get("messages", [{"role": "user", "content": row.get("text")}])
        try:
            return tokenizer.chat.render(messages, answer=True, tools=row.get("tools")), True
        except TurboqError as error:
            raise TurboqError(f"{where}: {error}") from error

    found = [asked(f"--prompt={text!r}", {"text": text}) for text in values.prompt]
    for source in common.sources_of(values.prompts, "--prompts"):
        text = read_file(Path(source))
        if source.lower().endswith(".jsonl"):
            found += [asked(where, row) for where, row in rows(text, source)]
        else:
            found.append(asked(source, {"text": text}))
    if not found:
        raise TurboqError("no prompt: give --prompt=TEXT or --prompts=FILE")
    return found


def _tokens(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Token ids; BOS in front where the tokenizer puts it and no chat template wrote the text."""
    ids = tokenizer.encode(text)
    if chat or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return ids
    return [tokenizer.bos_id, *ids]


def _table(found: dict[str, Answers], prompts: int) -> str:
    """Caches x (bytes, tokens, speeds, equal answers)."""
    from turboq.cache import accounting

    exact = found.get("exact")
    lines = [["cache", "bytes of a batch", "tokens", "prompt tokens/s", "tokens/s", "as exact"]]
    for name, x in found.items():
        same = ""
        if exact is not None and x is not exact:
            pairs = zip(x.tokens, exact.tokens, strict=True)
            same = f"{sum(a.tolist() == b.tolist() for a, b in pairs)} of {prompts}"
        lines.append([
            name, accounting.readable(x.cache_bytes), str(sum(map(len, x.tokens))),
            _rate(x.read), _rate(x.wrote), same,
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _rate(clock: Clock) -> str:
    return "-" if clock.rate is None else f"{clock.rate:.3g}"
