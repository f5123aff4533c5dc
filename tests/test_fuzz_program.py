"""A short run of `fuzz.py` over all targets, and that it notices what it is there to notice."""

import re
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_targets

PROGRAM = Path(fuzz.__file__)
SEED, BUG = 18, 3  # of "planted": its first six cases are the six faults, the fourth is the bug


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_target_is_known_to_both_files():
    assert set(fuzz.TARGETS) == set(fuzz_targets.TARGETS)


def test_damage_is_a_value_or_one_line():
    # Damaged plans have a longer test of their own, which also says what they load as.
    targets = ",".join(name for name in fuzz.TARGETS if name != "plan")
    done = run(f"--target={targets}", "--cases=150")
    assert done.returncode == 0, done.stdout + done.stderr
    for target in targets.split(","):
        (line,) = re.findall(rf"^{target} +(\d+) +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
        cases, refused, failed = map(int, line)
        assert (cases, failed) == (150, 0)
        assert 25 < refused < 150, target  # some damage is read: else only the first check is seen


def test_every_kind_of_fault_is_noticed():
    done = run("--target=planted", "--cases=6", f"--seed={SEED}", "--limit=0.25")
    assert done.returncode == 1
    said = [line.partition(": ")[2] for line in done.stdout.splitlines() if "FAILED" in line]
    wanted = (
        "KeyError: 'a bug' at .*fuzz_targets.py",
        "the error has 5000 characters",
        "the error is not printable",
        r"\d\.\d s of processor time",
        r"the process ended \(exit code 1: a hang",
        r"the process ended \(exit code -6: signal 6",
    )
    assert len(said) == 6
    for pattern in wanted:
        assert sum(re.match(pattern, line) is not None for line in said) == 1, (pattern, said)
    again = run("--target=planted", "--cases=1", f"--first={BUG}", f"--seed={SEED}")
    assert "Traceback" in again.stderr
    assert again.returncode == 1
