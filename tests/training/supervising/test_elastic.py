"""A real run on two processes, then one, then two: the same inputs and rates, and the same weights to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "elastic.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_by_two_to_one_by_four_and_back(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--optimizer", "AdamW", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images, captions, time steps and rates equal" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("1 cases, 1 equal, builtin engine")
