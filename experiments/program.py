"""What the programs here share: the main of a script, its lists, its windows and statistics."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from turboq.errors import TurboqError
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.models import Model
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import calibration_windows, mixed_windows


def main(run: Callable[[Path], None], out: flags.FlagHolder[str]) -> None:
    """Runs `run(Path(out))` with flags parsed; bad input is one line, without a traceback."""
    name = Path(run.__code__.co_filename).stem

    def body(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        logging.set_verbosity(logging.WARNING)  # Orbax speaks of every checkpoint
        try:
            run(Path(out.value))
        except (TurboqError, OSError) as error:
            sys.exit(f"{name}: error: {error}")
        except KeyboardInterrupt:
            print(f"{name}: interrupted: run the same command again", file=sys.stderr)
            sys.exit(130)

    app.run(body)


def items(flag: flags.FlagHolder[list[str]]) -> list[str]:
    """The items of a list: commas between (names of rows have spaces), the flag repeated or not.

    Raises:
      TurboqError: an empty item.
    """
    found = [item.strip() for entry in flag.value if entry for item in entry.split(",")]
    if "" in found:
        raise TurboqError(f"--{flag.name}: {','.join(flag.value)!r} has an empty item")
    return found


def named(flag: flags.FlagHolder[list[str]], known: Collection[str]) -> list[str]:
    """The items of a list of names.

    Raises:
      TurboqError: one that is not known.
    """
    for name in (found := items(flag)):
        if name not in known:
            raise TurboqError(f"--{flag.name}: {name!r} is none of {', '.join(known)}")
    return found


def windows_of(
    model: Model, sources: Iterable[str], length: int, count: int
) -> dict[str, np.ndarray]:
    """Windows of every text, by its name."""
    found = (mixed_windows([s], model.tokenizer, length=length, count=count) for s in sources)
    return {windows.source: windows.tokens for windows in found}


def windows_at(
    model: Model, sources: Iterable[str], lengths: Iterable[int], count: int
) -> dict[str, np.ndarray]:
    """Windows of every text at every length, by "TEXT at LENGTH"."""
    return {
        f"{text} at {length}": tokens
        for source in sources
        for length in lengths
        for text, tokens in windows_of(model, [source], length, count).items()
    }


def statistics_of(model: Model, folder: str, out: Path) -> Statistics:
    """Of a folder of `turboq calibrate`; without one of its defaults, observed into `out`."""
    if folder:
        return load_statistics(folder)
    return observe(model, calibration_windows(model, folder=out), out)


def kl_ratio(logs: np.ndarray) -> dict[str, Any]:
    """exp(mean) of log ratios over paired windows, and its 95 % interval (None: one window)."""
    ci = bootstrap_ci(logs)
    return {
        "kl_ratio": float(np.exp(logs.mean())),
        "ratio_ci": None if ci is None else np.exp(ci).tolist(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages."""
    return {name: importlib.metadata.version(name) for name in packages}


def pyplot() -> Any:
    """Of pictures whose bytes depend on what they show alone."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "turboq"
    import matplotlib.pyplot as plt

    return plt
