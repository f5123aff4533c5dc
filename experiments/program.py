"""What the programs here share: the main of a script, its lists, its windows and statistics, and
what its results say of how they were made.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq.version import __version__
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.measure import quality_table
from turboq_calibrate.measure.quality_table import Quality
from turboq_calibrate.models import Model
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import calibration_windows, mixed_windows

ROOT = Path(__file__).resolve().parents[1]
MADE = "x-made"  # of a result: `provenance`; readers of strict files keep what begins with x-


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


def provenance() -> dict[str, Any]:
    """What made a result: the command line, when, on what and with what."""
    return {
        "command": command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "turboq": __version__}
        | versions("jax", "jaxlib"),
    }


def command(argv: Sequence[str]) -> str:
    """A command line as it is typed at the root of the repository; of paths outside the name."""
    argv = [str(Path(argv[0]).absolute()), *argv[1:]]
    parts = (re.sub(r"[^,=:]+", lambda piece: _inside(piece[0]), part) for part in argv)
    return shlex.join(["python", *parts])


def _inside(piece: str) -> str:
    """A path as the repository has it, or its last name; anything else as it is."""
    path = Path(piece).expanduser()
    if not path.is_absolute() and ".." not in path.parts:
        return piece
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def cpu(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; where the system does not say it, its architecture."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result with its `provenance`."""
    make_folder(path.parent)
    text = json.dumps(result | {MADE: provenance()}, indent=1, allow_nan=False)
    atomic_write(path, text + "\n")


def write_quality(quality: Quality, folder: Path) -> Path:
    """`quality_table.write_quality` with the `provenance` in its table."""
    quality.table[MADE] = provenance()
    return quality_table.write_quality(quality, folder)


def pyplot() -> Any:
    """Of pictures whose bytes depend on what they show alone."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "turboq"
    import matplotlib.pyplot as plt

    return plt
