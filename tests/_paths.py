"""Import first in a program of this folder: `tests/turboq` would pass for the package `turboq`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "calibrate")]
