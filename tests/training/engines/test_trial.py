"""`kwrap train --try`: two steps, a resume, the numbers of the whole run, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from engine_world import World, kwrap, train_arguments


@pytest.mark.slow
def test_a_trial_resumes_exactly_and_leaves_nothing(world: World) -> None:
    runs = world.folder / "runs"
    before = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
    tried = kwrap(*train_arguments(world.site, "trial"), "--try", "--json")
    assert tried.returncode == 0, tried.stderr
    document = json.loads(tried.stdout)
    assert document["trial"]["resume_is_identical"] and document["trial"]["difference"] is None
    assert document["optimizer_steps"] == 4
    assert document["eta_seconds"] == 4 * document["trial"]["seconds_per_step"]
    assert document["trial"]["network_bytes"] > 0 and document["disk_bytes"] > document["trial"]["state_bytes"]
    assert sorted(path.name for path in runs.iterdir()) == before


def test_a_trial_has_no_lock_to_keep_to(world: World) -> None:
    refused = kwrap(*train_arguments(world.site, "trial"), "--try", "--dry-run")
    assert refused.returncode == 2 and "trains two steps of its own" in refused.stderr


def test_a_stopped_trial_advises_to_try_again(world: World) -> None:
    command = [sys.executable, "-m", "kohaku_wrap", *train_arguments(world.site, "stopped"), "--try"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    while "start: attempt 1" not in said:
        said += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said + rest
    assert "Try again with: kwrap train demo --site" in rest and " --try" in rest and "kwrap resume" not in rest
