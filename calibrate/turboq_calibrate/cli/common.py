"""Flags that several subcommands share, and what they mean to the library.

Every function here takes the subcommand's own `FlagValues`, so a flag exists only where it is asked
for. Nothing heavy is imported before a subcommand runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from turboq.errors import TurboqError

if TYPE_CHECKING:
    from turboq.cache.layer import TokenPolicy
    from turboq.codecs import Codec
    from turboq_calibrate.models import Model, Tokenizer
    from turboq_calibrate.models.spec import ModelSpec
    from turboq_calibrate.observe.recipe import ObserveRecipe
    from turboq_calibrate.observe.texts import Windows

DTYPES = ("float32", "bfloat16", "float16")
# Codec fields that have a flag of their own; None leaves the codec's default.
CODEC_FIELDS = ("rotation", "scale_rule", "scale", "scale_dtype", "codebook", "sketch", "dtype")


def model(values: flags.FlagValues, default: str | None = "embedded") -> None:
    flags.DEFINE_string(
        "model", default, "Model: a Hugging Face folder, a .gguf file, or 'embedded' "
        "(SmolLM2-135M-Instruct).", flag_values=values,
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
    note: str = "",
) -> None:
    flags.DEFINE_multi_string(
        "text", default, "Texts, comma-separated or the flag repeated: topics:calibration, "
        "topics:heldout, source:calibration, source:heldout, self:SEED (written by the model), "
        f"UTF-8 files. Each gets an equal share of the windows.{note}", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "windows", windows, "Windows of all texts together, evenly spaced over each; 0 takes all.",
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
    flags.DEFINE_string("codec", default, "Codec of K and V.", flag_values=values)
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


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Values that came from flags: a ValueError about them is the user's to fix."""
    try:
        yield
    except TurboqError:
        raise
    except ValueError as error:
        raise TurboqError(str(error).replace("self.", "")) from error


def codec_of(values: flags.FlagValues, side: str, dim: int) -> Codec:
    """The codec that the flags describe for `side` ("k" or "v") and head dim `dim`.

    A flag may speak of one side only (bits of turboquant_mse keys beside exact values), so each
    side takes the flags that its codec knows, and a flag that neither knows is an error.

    Raises:
      TurboqError: no or unknown codec, a flag no codec has, a value out of range.
    """
    from turboq.codecs import from_config

    names = {s: values[f"{s}_codec"].value or values.codec for s in ("k", "v")}
    if names[side] is None:
        raise TurboqError(f"name a codec: --codec, or --{side}_codec")
    given = _given(values)
    known = {s: _fields(name) for s, name in names.items()}
    for field in given[side]:
        if field not in known["k"] | known["v"]:
            raise TurboqError(
                f"--{field} is not a field of codec {' or '.join(sorted(set(names.values())))}"
            )
    for s in ("k", "v"):
        if values[f"{s}_bits"].value is not None and "bits" not in known[s]:
            raise TurboqError(f"--{s}_bits: codec {names[s]} has no bits")
    chosen = {field: value for field, value in given[side].items() if field in known[side]}
    if "bits" in known[side] and "bits" not in chosen:
        raise TurboqError(f"codec {names[side]} needs --bits or --{side}_bits")
    return from_config({"codec": names[side], "dim": dim, **chosen})


def _given(values: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Per side: codec fields that were set on the command line."""
    shared = {f: values[f].value for f in (*CODEC_FIELDS, "seed", "bits")}
    for item in values.field:
        name, equals, text = item.partition("=")
        if not (name and equals and text):
            raise TurboqError(f"--field={item!r} must be NAME=VALUE, for example type=q4_0")
        shared[name] = int(text) if text.isdecimal() else text
    sides = {}
    for side in ("k", "v"):
        own = values[f"{side}_bits"].value
        fields = shared if own is None else shared | {"bits": own}
        sides[side] = {f: value for f, value in fields.items() if value is not None}
    return sides


def _fields(name: str) -> set[str]:
    import dataclasses

    from turboq.codecs import CODECS

    if name not in CODECS:
        raise TurboqError(f"unknown codec {name!r}: known codecs are {', '.join(sorted(CODECS))}")
    return {field.name for field in dataclasses.fields(CODECS[name])}


def policy_of(values: flags.FlagValues) -> TokenPolicy:
    """The token policy that the flags describe."""
    from turboq.cache.layer import TokenPolicy

    return TokenPolicy(sinks=values.sinks, recent=values.recent, exact_dtype=values.exact_dtype)


def sources_of(entries: list[str]) -> list[str]:
    """The texts that --text names; an entry that is a file is one, commas and all."""
    return [
        source
        for entry in entries
        for source in ([entry] if os.path.isfile(entry) else entry.split(","))
    ]


def lengths_of(values: flags.FlagValues, spec: ModelSpec) -> list[int]:
    """The tokens that --lengths lists, each once.

    Raises:
      TurboqError: one is no whole number, below 2, given twice, or beyond the model's context.
    """
    found: list[int] = []
    for entry in values.lengths:
        length = int(entry) if entry.strip().isdecimal() else 0
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


# Flags of `turboq calibrate` that decide what is observed; `turboq plan` has them too.
OBSERVATION = ("text", "windows", "window_length", "bos", "check_windows", "check_length")
OBSERVATION += ("chunk_windows", "skip", "reservoir", "observe_seed")


def observation(values: flags.FlagValues) -> None:
    text(
        values, None, windows=16, length=512,
        note=" Default: self:0,topics:calibration; of a model of more than 2e9 parameters, for "
        "which writing takes long, topics:calibration,source:calibration.",
    )  # fmt: skip
    flags.DEFINE_integer(
        "check_windows", 1, "Windows of each text left out, to check plans on.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "check_length", None, "Tokens of one longer window left out, to check plans at a length "
        "that was not calibrated on; 0 for none (default: four windows, or the model's context).",
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
        "reservoir", 4096, "Sampled tokens kept with their keys, values and gradients; 0 for none.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "observe_seed", 0, "Seed of the drawn labels and of the sample.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip


def observed_windows(values: flags.FlagValues, model: Model, *, written: bool = True) -> Windows:
    """The windows to calibrate on, and those held back.

    written: False takes as much text that need not be written instead, to say what a run takes.

    Raises:
      TurboqError: text of the model's own is asked for and must not be written; sizes that do not
        fit.
    """
    from turboq_calibrate.observe.texts import (
        CALIBRATION_OF_LARGE,
        calibration_sources,
        kind_of,
        long_check,
    )

    # Before any text is read, or written by the model for hours.
    model.spec.check_length(values.window_length, "windows (--window_length)")
    length = values.check_length
    if length is None:
        length = long_check(model.spec.context, values.window_length)
    elif length and not values.window_length < length <= model.spec.context:
        raise TurboqError(
            f"--check_length={length} must be more than --window_length={values.window_length} and "
            f"within the model's context of {model.spec.context}, or 0 for none"
        )
    sources = sources_of(values.text or [])
    if not sources:
        sources = list(calibration_sources(model.spec) if written else CALIBRATION_OF_LARGE)
    own = [source for source in sources if kind_of(source) == "self"]
    if own and not written:
        raise TurboqError(f"--dry_run writes nothing: name another text than {', '.join(own)}")
    return windows_of(
        values, model.tokenizer, sources, model=model, folder=values.out,
        check=values.check_windows, check_length=length,
    )  # fmt: skip


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
