"""A few cases of `tests/fuzz.py`; `python -m tests.fuzz --cases N` runs more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_random_configs_are_refused_in_one_line_or_train():
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz"]
    done = subprocess.run(
        [*command, "--cases", "40", "--seed", "7", "--share", "0.3"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("40 cases in ") and "trained: ok" in last and "refused" in last
