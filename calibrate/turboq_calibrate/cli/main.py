"""The `turboq` command: finds the subcommand, parses its flags, turns errors into one line.

Every subcommand is a module of this package with a docstring (its help text) and

    REQUIRED: tuple[str, ...]            flags that have no default
    RESUME: str                          what to do after an interruption
    define(values: flags.FlagValues)     its flags
    main(values, arguments)              calls the library

A subcommand has its own absl FlagValues, so that flags of different subcommands cannot collide and
a flag that a subcommand does not know is an error. Those modules import the library inside `main`:
help must not wait for jax.

Exit codes: 0 done, 1 bad input (one line), 2 usage (one line), 130 interrupted.
"""

from __future__ import annotations

import datetime
import difflib
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from turboq.errors import TurboqError, TurboqWarning
from turboq.version import __version__
from turboq_calibrate.cli import help as help_text
from turboq_calibrate.run import shown

COMMANDS = {
    "calibrate": "run a model over text and keep statistics of its Q, K and V (resumable)",
    "merge": "join the statistics of shards observed by separate jobs",
    "plan": "fit codecs to statistics and write a plan",
    "evaluate": "measure plans on held-out text: KL, top-1, perplexity, bytes",
    "tasks": "measure plans on retrieval, copying, code, tool calls and other tasks at length",
    "generate": "continue prompts through packed caches, many at once, beside an exact cache",
    "report": "draw a run folder as one self-contained HTML page",
    "export": "write a plan as files and flags of an engine: vLLM, llama.cpp, ONNX Runtime, ...",
    "inspect": "say what a plan, a statistics folder or a checkpoint holds",
    "memory": "bytes per token, cache size and longest context of a plan or a codec",
}
OTHER_WORDS = {"chat": "generate --chat"}
LONG_S = 30.0  # a command that took longer says how long


class UsageError(Exception):
    """A command line that cannot be understood: one line, exit code 2."""


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TurboqWarning)
            warnings.showwarning = _warn
            _dispatch(argv)
        sys.stdout.flush()  # a reader that went away is noticed here, not at interpreter exit
        return 0
    except UsageError as error:
        return _fail(str(error), 2)
    except TurboqError as error:
        return _fail(str(error), 1, show_traceback)
    except KeyboardInterrupt:
        resume = _module(argv[0]).RESUME if argv and argv[0] in COMMANDS else "run it again"
        return _fail(f"interrupted: {resume}", 130, show_traceback)
    except BrokenPipeError:
        # The reader of our output went away (turboq … | head): not an error worth a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _fail(_memory_line(str(error)), 1, show_traceback)
    except OSError as error:
        return _fail(_os_line(error), 1, show_traceback)
    except RuntimeError as error:
        # jaxlib's own class, recognised without importing jax for it.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(_memory_line(str(error).splitlines()[0]), 1, show_traceback)


def _dispatch(argv: list[str]) -> None:
    """Prints a help page or runs a subcommand. Raises whatever goes wrong."""
    if not argv:
        raise UsageError(f"name a command: {', '.join(COMMANDS)} (or --help)")
    if argv[0] == "--version":
        print(f"turboq {__version__}")
    elif argv[0] in ("--help", "-h", "-help", "help"):
        print(help_text.overview(COMMANDS))
    elif argv[0] in ("--helpfull", "-helpfull"):
        print(help_text.overview(COMMANDS))
        for name in COMMANDS:
            module = _module(name)
            print("\n" + help_text.command(name, module, _define(module)))
    else:
        name, module = argv[0], _module(argv[0])
        values = _define(module)
        arguments = _parse(name, module, values, argv)
        if arguments is None:
            print(help_text.command(name, module, values))
            return
        # Orbax and Grain read absl's global flags and fail if nobody parsed them.
        flags.FLAGS.mark_as_parsed()
        if values.device is not None:
            _take(values.device)
        began = time.monotonic()
        level = _level(values)
        with shown.showing(level):
            module.main(values, arguments)
        seconds = time.monotonic() - began
        if seconds >= LONG_S and level > shown.QUIET:
            print(f"{name} took {datetime.timedelta(seconds=round(seconds))}", file=sys.stderr)


def _module(name: str) -> ModuleType:
    """The subcommand's module. Raises UsageError for an unknown name, with the nearest one."""
    if name not in COMMANDS:
        near = [OTHER_WORDS[name]] if name in OTHER_WORDS else []
        near = near or difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        kind = "a flag comes after the command:" if name.startswith("-") else "unknown command"
        raise UsageError(f"{kind} {name!r} ({hint})")
    return importlib.import_module(f"turboq_calibrate.cli.{name}")


def _define(module: ModuleType) -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    module.define(values)
    flags.DEFINE_boolean("traceback", False, "Show the traceback of an error.", flag_values=values)
    flags.DEFINE_boolean("quiet", False, "As --verbosity=-1.", flag_values=values)
    flags.DEFINE_integer(
        "verbosity", shown.USUAL, "-1: results and errors only; 0: also progress; 1: also a line "
        "when a step begins or ends, and what it finds done, and one of every file written.",
        lower_bound=shown.QUIET, upper_bound=shown.ALL, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "device", None, ("cpu", "cuda", "tpu"), "What JAX runs on; by default what it finds.",
        flag_values=values,
    )  # fmt: skip
    return values


def _level(values: flags.FlagValues) -> int:
    if values.quiet and values.verbosity > shown.USUAL:
        raise UsageError(f"--quiet and --verbosity={values.verbosity}: give one of them")
    return shown.QUIET if values.quiet else values.verbosity


def _take(device: str) -> None:
    """Makes JAX use this platform, before anything else does.

    Raises:
      TurboqError: this JAX finds none.
    """
    import jax

    jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of jaxlib; without any plugin it asserts
        extra = {"cuda": "cuda13"}.get(device, device)
        why = "".join(f": {line}" for line in str(error).splitlines()[:1])
        raise TurboqError(
            f"--device={device}: JAX finds none (its driver is in turboq-jax[{extra}]){why}"
        ) from None


def _parse(
    name: str, module: ModuleType, values: flags.FlagValues, argv: Sequence[str]
) -> list[str] | None:
    """Fills `values`; returns the positional arguments, or None if help was asked for."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    if any(word in ("-h", "--help", "-help", "--helpfull", "-helpfull") for word in words):
        return None
    try:
        arguments = values(list(argv))[1:]
    except flags.Error as error:
        message = " ".join(str(error).split())
        raise UsageError(f"{message} (see turboq {name} --help)") from None
    missing = [flag for flag in module.REQUIRED if values[flag].value in (None, "", [])]
    if missing:
        listed = ", ".join(f"--{flag}" for flag in missing)
        raise UsageError(f"{name} needs {listed} (see turboq {name} --help)")
    if arguments and not getattr(module, "ARGUMENTS", ""):
        raise UsageError(
            f"{name} takes flags only, got {arguments[0]!r} (a list is one word: --FLAG=A,B)"
        )
    return arguments


def _fail(message: str, code: int, show_traceback: bool = False) -> int:
    if show_traceback:
        traceback.print_exc()
    sys.stdout.flush()
    print("turboq: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Our own warnings as one line; others name the line of code too, as Python does."""
    own = issubclass(category, TurboqWarning)
    text = str(message) if own else warnings.formatwarning(message, category, *where[:2])
    print("turboq: warning: " + " ".join(text.split()), file=sys.stderr)


def _os_line(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


def _memory_line(detail: str) -> str:
    line = "out of memory: fewer windows per chunk, shorter windows or a larger machine"
    return f"{line} ({detail})" if detail else line


if __name__ == "__main__":
    sys.exit(run())
