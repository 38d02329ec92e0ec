"""What `make test-fast` runs can be run in its own light environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

HEAVY = ("accelerate", "bitsandbytes", "diffusers", "lycoris", "numba", "torch", "transformers")

COLLECT = f"""
import sys
sys.modules |= dict.fromkeys({HEAVY})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
"""A name that has None as its module cannot be imported, as if its package were not installed."""


def test_all_are_found_without_heavy_packages() -> None:
    root = Path(__file__).parents[1]
    # Of the make that may run these tests, neither its variables nor its words.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"PYTEST_ARGS": ""}
    plan = ["make", "-n", "test-fast"]
    planned = subprocess.run(plan, cwd=root, capture_output=True, text=True, check=True, env=alone)
    words = shlex.split(planned.stdout.splitlines()[-1])
    chosen = words[words.index("pytest") + 1 :]
    command = [sys.executable, "-c", COLLECT, *chosen, "-n", "0", "-q", "--collect-only", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]
