"""Flags that several subcommands share, and what they mean to the library.

Every function here takes the subcommand's own `FlagValues`, so a flag exists only where it is asked
for. Nothing heavy is imported before a subcommand runs.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from absl import flags

from turboq.errors import TurboqError

if TYPE_CHECKING:
    import numpy as np

    from turboq.cache.layer import TokenPolicy
    from turboq.codecs import Codec
    from turboq.plan import ModelGeometry, Plan
    from turboq.plan.build import Template
    from turboq.words import Side
    from turboq_calibrate.models import Model, Tokenizer
    from turboq_calibrate.models.spec import ModelSpec
    from turboq_calibrate.observe.captured import Source
    from turboq_calibrate.observe.recipe import ObserveRecipe
    from turboq_calibrate.observe.texts import Windows

DTYPES = ("float32", "bfloat16", "float16")
# Codec fields that have a flag of their own; None leaves the codec's default.
CODEC_FIELDS = ("rotation", "scale_rule", "scale", "scale_dtype", "codebook", "sketch", "dtype")


def model(values: flags.FlagValues, default: str | None = "embedded", *, runs: bool = True) -> None:
    flags.DEFINE_string(
        "model", default, "Model: a Hugging Face folder, its name on the hub (Qwen/Qwen3-0.6B: "
        "downloaded where a network is), a .gguf file, 'embedded' (SmolLM2-135M-Instruct), or "
        "'gemma3-270m' (Gemma 3 270M of the extra gemma3, under the Gemma Terms of Use).",
        flag_values=values,
    )  # fmt: skip
    if not runs:
        return
    flags.DEFINE_bool(
        "long_context", False, "Of a model with longrope (Phi-3, Phi-4-mini): rotate as in "
        "sequences longer than its original context, at all lengths.", flag_values=values,
    )  # fmt: skip


def model_dtype(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "model_dtype", "float32", DTYPES, "How weights are kept; arithmetic is float32.",
        flag_values=values,
    )  # fmt: skip


def text(
    values: flags.FlagValues,
    default: str | None,
    *,
    windows: int,
    length: int,
    note: str,
    of: str = "all texts together",
) -> None:
    weights = "; chat.jsonl@3 counts three times a text without" * (of == "all texts together")
    flags.DEFINE_multi_string(
        "text", default, "Texts, comma-separated or the flag repeated: topics:calibration, "
        "topics:heldout, source:calibration, source:heldout, self:SEED (written by the model), "
        f"UTF-8 files, folders of them, patterns such as books/*.txt; .jsonl: a text or messages a "
        f"line, in the model's chat template{weights}. {note}", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "windows", windows, f"Windows of {of}, evenly spaced over it; 0 takes all.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "window_length", length, "Tokens per window.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum(
        "bos", "auto", ("auto", "yes", "no"), "Begin every window with the BOS token; auto does "
        "what the model's tokenizer does.", flag_values=values,
    )  # fmt: skip


def out(values: flags.FlagValues, what: str) -> None:
    flags.DEFINE_string("out", None, what, flag_values=values)


def codec(values: flags.FlagValues, default: str | None) -> None:
    flags.DEFINE_string(
        "codec", default, "Codec of K and V, or K/V: turboquant_mse:3, q8_0/q4_0, kivi:2.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("k_codec", None, "Codec of K, if not --codec.", flag_values=values)
    flags.DEFINE_string("v_codec", None, "Codec of V, if not --codec.", flag_values=values)
    for name, side in (("bits", "K and V"), ("k_bits", "K"), ("v_bits", "V")):
        flags.DEFINE_integer(
            name, None, f"Bits per coordinate of {side}.", lower_bound=1, upper_bound=8,
            flag_values=values,
        )  # fmt: skip
    helps = {
        "rotation": "Rotation: hadamard (signed), walsh (unsigned), haar or identity.",
        "scale_rule": "Scale rule: raw, matched, unbiased or least_squares.",
        "scale": "per_head: scale per 'vector' (stored) or per 'head' (fitted, not stored).",
        "scale_dtype": "Type of stored scales: float16, bfloat16 or float32.",
        "codebook": "Source of data-free codebooks: sphere or gaussian.",
        "sketch": "turboquant_prod: gaussian or orthogonal.",
        "dtype": "exact: bfloat16, float16 or float32.",
    }
    for name in CODEC_FIELDS:
        flags.DEFINE_string(name, None, helps[name], flag_values=values)
    flags.DEFINE_multi_string(
        "field", [], "Any other field of a codec as NAME=VALUE: type=q4_0, states=8, group=32.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "seed", None, "Seed of the rotation (and sketch).", lower_bound=0, flag_values=values
    )


def policy(values: flags.FlagValues, *, sinks: int = 4, of: str = "") -> None:
    flags.DEFINE_integer(
        "sinks", sinks, f"First tokens of a sequence kept exact{of}.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "recent", 0, f"Last tokens kept exact, the query's own included{of}.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "exact_dtype", "bfloat16", DTYPES, f"Type of the exact tokens{of}.", flag_values=values
    )


def check_model(plan: Plan, geometry: ModelGeometry) -> None:
    """Raises TurboqError where a plan is of another model than --model."""
    from turboq import plan as plans

    try:
        plans.check_model(plan, geometry)
    except TurboqError as error:
        raise TurboqError(f"{error} (--model=... names the plan's own)") from error


def command(name: str, values: flags.FlagValues) -> str:
    """The command line that gives these flags, as a shell takes it."""
    given = [values[flag].serialize() for flag in values if values[flag].present]
    return shlex.join(["turboq", name, *(line for flag in given for line in flag.splitlines())])


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Values that came from flags: a ValueError about them is the user's to fix."""
    try:
        yield
    except TurboqError:
        raise
    except ValueError as error:
        raise TurboqError(str(error).replace("self.", "")) from error


def template(side: Side, which: Literal["k", "v"], geometry: ModelGeometry) -> Template:
    """What `make_plan` takes for `side`: a format is made at every layer's own head dim.

    Raises:
      TurboqError: a value out of range, or a format without a codec.
    """
    from turboq.export.llama_cpp import rotates

    def at(dim: int) -> Codec:
        return side.codec(which, dim, rotates(geometry))

    first = geometry.cache_layers[0]
    codec = at(first.k_dim if which == "k" else first.v_dim)
    return codec if side.format is None else at


def sides_of_flags(values: flags.FlagValues) -> dict[str, Side]:
    """How the flags say to store K and V: the words of --codec, and flags that set their fields.

    A flag may speak of one side only (bits of turboquant_mse keys beside exact values), so each
    side takes the flags that its codec knows, and a flag that neither knows is an error.

    Raises:
      TurboqError: no or unknown codec, a flag no codec has, a field set twice.
    """
    from turboq import words

    both = None if values.codec is None else words.parse(values.codec)
    sides: dict[str, Side] = {}
    for s in ("k", "v"):
        own = values[f"{s}_codec"].value
        if own is None and both is None:
            raise TurboqError(f"name a codec: --codec, or --{s}_codec")
        sides[s] = getattr(both, s) if own is None else words.side(own)
    given = _given(values)
    known = {
        s: {} if x.format and not (given[s] and words.is_codec(x.name)) else words.fields_of(x.name)
        for s, x in sides.items()
    }
    named = " or ".join(
        dict.fromkeys(
            f"{x.name}, an engine's format" if x.format else f"codec {x.name}"
            for x in sides.values()
        )
    )
    for s in ("k", "v"):
        if values[f"{s}_bits"].value is not None and "bits" not in known[s]:
            raise TurboqError(f"--{s}_bits: codec {sides[s].name} has no bits")
        for field in given[s]:
            if field not in known["k"] | known["v"]:
                raise TurboqError(f"--{field} is not a field of {named}")
    return {s: sides[s].having(_of(given[s], known[s])) for s in ("k", "v")}


def _of(given: dict[str, str], known: Collection[str]) -> dict[str, str]:
    return {field: text for field, text in given.items() if field in known}


def _given(values: flags.FlagValues) -> dict[str, dict[str, str]]:
    """Per side: codec fields that were set on the command line."""
    shared = {f: values[f].value for f in (*CODEC_FIELDS, "seed", "bits")}
    for item in values.field:
        name, equals, text = item.partition("=")
        if not (name and equals and text):
            raise TurboqError(f"--field={item!r} must be NAME=VALUE, for example type=q4_0")
        shared[name] = text
    sides = {}
    for side in ("k", "v"):
        own = values[f"{side}_bits"].value
        fields = shared if own is None else shared | {"bits": own}
        sides[side] = {f: str(value) for f, value in fields.items() if value is not None}
    return sides


def listed(values: flags.FlagValues, flag: str, default: Sequence[str] = ()) -> list[str]:
    """The items of a flag that takes a list: comma-separated, repeated, or both.

    Raises:
      TurboqError: an empty item, or several that only spaces part.
    """
    from turboq import words

    given = values[flag].value or default
    if given and not "".join(given).strip():
        raise TurboqError(f"--{flag} is empty: give values, with commas between")
    try:
        return words.split(given)
    except TurboqError as error:
        raise TurboqError(f"--{flag}: {error}") from error


def policy_of(values: flags.FlagValues) -> TokenPolicy:
    """The token policy that the flags describe."""
    from turboq.cache.layer import TokenPolicy

    return TokenPolicy(sinks=values.sinks, recent=values.recent, exact_dtype=values.exact_dtype)


def sources_of(entries: Sequence[str], flag: str = "--text") -> list[str]:
    """The texts that `flag` names: lists, folders (their files, by name) and patterns (*.txt).

    Raises:
      TurboqError: an empty item, several that only spaces part, a folder without files, a pattern
        that nothing matches.
    """
    return [
        source
        for entry in entries
        for item in ([entry] if os.path.exists(entry) else entry.split(","))
        for source in _weighed(item.strip(), flag)
    ]


def _weighed(item: str, flag: str) -> list[str]:
    """The files of an item, each with its weight."""
    from turboq_calibrate.observe.weights import weighted

    files, _ = weighted(item)
    return [file + item[len(files) :] for file in _files(files, flag)]


def _files(item: str, flag: str) -> list[str]:
    if os.path.isfile(item):
        return [item]
    if os.path.isdir(item):
        names = sorted(name for name in os.listdir(item) if not name.startswith("."))
        found = [path for name in names if os.path.isfile(path := os.path.join(item, name))]
        if not found:
            raise TurboqError(f"{flag}={item}: a folder without files")
        return found
    if any(c in item for c in "*?["):
        found = sorted(filter(os.path.isfile, glob.glob(item, recursive=True)))
        if not found:
            raise TurboqError(f"{flag}={item}: no file matches")
        return found
    if not item:
        raise TurboqError(f"{flag} has an empty item between its commas")
    from turboq import words

    return [words.parted(item)]


def lengths_of(values: flags.FlagValues, spec: ModelSpec) -> list[int]:
    """The tokens that --lengths lists, each once.

    Raises:
      TurboqError: none, or one is no whole number, below 2, given twice, or beyond the model's
        context.
    """
    found: list[int] = []
    for entry in listed(values, "lengths"):
        length = int(entry) if entry.isdecimal() else 0
        if length < 2 or length in found:
            raise TurboqError(
                f"--lengths: {entry!r} must be a number of tokens, 2 or more, and given once"
            )
        spec.check_length(length, "--lengths: windows")
        found.append(length)
    return found


def windows_of(
    values: flags.FlagValues,
    tokenizer: Tokenizer,
    sources: list[str] | None = None,
    *,
    length: int | None = None,
    model: Model | None = None,
    folder: str | os.PathLike[str] | None = None,
    check: int = 0,
    check_length: int = 0,
) -> Windows:
    """The windows of text that the flags describe (of `sources` alone, of `length`, if given).

    `model` writes the text of self:SEED, which is refused without it; `folder` keeps what it wrote.
    `check` and `check_length` hold windows back as `texts.mixed_windows` does.
    """
    from turboq_calibrate.observe.texts import mixed_windows

    return mixed_windows(
        sources_of(values.text) if sources is None else sources,
        tokenizer,
        length=values.window_length if length is None else length,
        count=values.windows or None,
        bos={"auto": None, "yes": True, "no": False}[values.bos],
        model=model,
        folder=folder,
        check=check,
        check_length=check_length,
    )


def texts_of(
    values: flags.FlagValues,
    model: Model,
    *,
    length: int | None = None,
    folder: str | None = None,
) -> dict[str, np.ndarray]:
    """Name -> windows of every text that --text names, each by itself; length: --window_length.

    Raises:
      TurboqError: a text is named twice.
    """
    from turboq_calibrate.observe.weights import weighted

    found: dict[str, np.ndarray] = {}
    for source in sources_of(values.text):
        if weighted(source)[0] != source:
            raise TurboqError(
                f"--text={source}: every text is measured by itself, so that no weight changes "
                "anything: leave it out"
            )
        windows = windows_of(
            values, model.tokenizer, [source], length=length, model=model, folder=folder
        )
        if windows.source in found:
            raise TurboqError(
                f"--text={source}: a text named {windows.source!r} is given twice: give every text "
                "once, files under different names"
            )
        found[windows.source] = windows.tokens
    return found


# Flags of `turboq calibrate` that decide what is observed; `turboq plan` has them too.
OBSERVATION = ("text", "windows", "window_length", "bos", "check_windows", "check_length")
OBSERVATION += ("chunk_windows", "skip", "reservoir", "observe_seed")


def observation(values: flags.FlagValues) -> None:
    text(
        values, None, windows=16, length=512,
        note="Each gets an equal share of the windows. Default: self:0,topics:calibration; of a "
        "model of more than 2e9 parameters, for which writing takes long, "
        "topics:calibration,source:calibration.",
    )  # fmt: skip
    flags.DEFINE_integer(
        "check_windows", 1, "Windows of each text left out, to check plans on.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "check_length", None, "Tokens of one longer window left out, to check plans at a length "
        "that was not calibrated on; 0 for none (default: four windows, or the model's context; "
        "`plan` with a budget at a context: that context, at most 4,096 tokens or four windows).",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "chunk_windows", 4, "Windows that pass through a layer at once: memory against speed.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "skip", 4, "First tokens of each window left out of the statistics (attention sinks).",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "reservoir", 8192, "Sampled tokens kept with their keys, values and gradients; 0 for none.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "observe_seed", 0, "Seed of the drawn labels and of the sample.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip


def calibration_texts(values: flags.FlagValues, model: Model) -> list[str]:
    """The texts that --text names, or those that are calibrated on by default."""
    from turboq_calibrate.observe.texts import calibration_sources

    return sources_of(values.text or []) or list(calibration_sources(model.spec))


def observing(values: flags.FlagValues, model: Model) -> list[str]:
    """Labels of the steps of `turboq calibrate` (`run.progress.phases`)."""
    own = any(source.startswith("self:") for source in calibration_texts(values, model))
    return ["self:", "observe"] if own else ["observe"]


def own_texts(values: flags.FlagValues) -> list[str]:
    """A step's label for every text that the model writes itself."""
    return ["self:" for source in sources_of(values.text) if source.startswith("self:")]


def observed_windows(
    values: flags.FlagValues, model: Model, *, written: bool = True, context: int | None = None
) -> Windows:
    """The windows to calibrate on, and those held back.

    written: False takes as much text that need not be written instead, to say what a run takes.
    context: what plans are for, if that is known.

    Raises:
      TurboqError: text of the model's own is asked for and must not be written; sizes that do not
        fit.
    """
    from turboq_calibrate.observe.texts import (
        CALIBRATION_OF_LARGE,
        kind_of,
        long_check,
    )

    # Before any text is read, or written by the model for hours.
    model.spec.check_length(values.window_length, "windows (--window_length)")
    length = values.check_length
    if length is None:
        length = long_check(model.spec.context, values.window_length, context)
    elif length and not values.window_length < length <= model.spec.context:
        raise TurboqError(
            f"--check_length={length} must be more than --window_length={values.window_length} and "
            f"within the model's context of {model.spec.context}, or 0 for none"
        )
    given = values.text or written
    sources = calibration_texts(values, model) if given else [str(x) for x in CALIBRATION_OF_LARGE]
    own = [source for source in sources if kind_of(source) == "self"]
    if own and not written:
        raise TurboqError(f"--dry_run writes nothing: name another text than {', '.join(own)}")
    return windows_of(
        values, model.tokenizer, sources, model=model, folder=values.out,
        check=values.check_windows, check_length=length,
    )  # fmt: skip


def captured_windows(values: flags.FlagValues, source: Source) -> Windows:
    """The same of a model that turboq itself does not run, and which writes no text.

    Raises:
      TurboqError: text of the model's own is asked for, or sizes that do not fit.
    """
    from turboq_calibrate.observe.texts import CALIBRATION_OF_LARGE, kind_of, long_check

    length, context = values.window_length, source.context
    check = long_check(context, length) if values.check_length is None else values.check_length
    for name, tokens in (("window_length", length), ("check_length", check)):
        if tokens > context:
            raise TurboqError(f"--{name}={tokens} exceeds the model's context of {context}")
    sources = sources_of(values.text or []) or list(CALIBRATION_OF_LARGE)
    own = [name for name in sources if kind_of(name) == "self"]
    if own:
        raise TurboqError(f"--captured: the model writes no text: another than {', '.join(own)}")
    windows = windows_of(
        values, source.tokenizer, sources, check=values.check_windows, check_length=check
    )
    if int(windows.tokens.max()) >= source.vocab:
        raise TurboqError(
            f"token {int(windows.tokens.max())} is outside the model's vocabulary of {source.vocab}"
        )
    return windows


def recipe_of(values: flags.FlagValues) -> ObserveRecipe:
    """How the flags say to observe."""
    from turboq_calibrate.observe.recipe import ObserveRecipe

    with as_user_error():
        return ObserveRecipe(
            seed=values.observe_seed,
            skip=values.skip,
            windows_per_chunk=values.chunk_windows,
            reservoir=values.reservoir,
        )
