"""Tests that compile for chips that are not here: skipped only where no compiler exists.

The compilers' packages exist for Linux on x86-64. There a missing one is a failure: a skip would
hide that nothing is checked.
"""

import platform
import sys

import pytest

HAVE_COMPILERS = sys.platform == "linux" and platform.machine() == "x86_64"
needs_compilers = pytest.mark.skipif(
    not HAVE_COMPILERS, reason="the compilers' packages exist for Linux on x86-64 only"
)
