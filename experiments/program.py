"""What the programs here share: the main of a script, and the statistics that it fits plans to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from turboq.errors import TurboqError
from turboq_calibrate.models import Model
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.observe.texts import calibration_windows


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


def statistics_of(model: Model, folder: str, out: Path) -> Statistics:
    """Of a folder of `turboq calibrate`; without one of its defaults, observed into `out`."""
    if folder:
        return load_statistics(folder)
    return observe(model, calibration_windows(model, folder=out), out)
