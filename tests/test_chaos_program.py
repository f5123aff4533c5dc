"""A few rounds of `chaos.py` on commands that start quickly, and that it notices half results."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent


def test_results_are_old_or_new_whatever_happens():
    command = [sys.executable, str(HERE / "chaos.py"), "--rounds=6", "--seed=22"]
    command += ["--command=plan,export", "--kind=kill,moment,full,two"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = re.findall(r"^ +\d+ (\w+) +(\w+) ", done.stdout, re.MULTILINE)
    assert len(rounds) == 6
    assert {kind for _, kind in rounds} >= {"kill", "moment", "full", "two"}


HALVES = """
    import os, sys
    import chaos
    from turboq import files

    def in_place(path, data):
        raw = data.encode() if isinstance(data, str) else data
        with open(path, "wb") as f:
            f.write(raw[: len(raw) // 2])
        os.mkdir(f"{path}.between")
        os.rmdir(f"{path}.between")
        with open(path, "wb") as f:
            f.write(raw)

    import turboq.plan.io
    turboq.plan.io.atomic_write = in_place
    sys.exit(chaos.main(["--rounds=4", "--command=plan", "--kind=kill"]))
"""


def test_half_a_file_is_noticed():
    code = textwrap.dedent(HALVES)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED found" in done.stdout
