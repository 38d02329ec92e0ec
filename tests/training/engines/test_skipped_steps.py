"""Steps that a GradScaler skips, on both engines: counted, carried through states, and an end when they do not stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toml
from engine_world import World

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import SKIPPED, ledger_file, read_ledger_file
from kohaku_wrap.training.records.manifest import read_manifest
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.states import list_states

SCALER = Path(__file__).parent / "emulated_scaler"
SETTINGS = (
    "effective_batch=4",
    "max_train_epochs=3",
    "save_every_n_steps=1",
    "states.keep=9",
    "lr_scheduler=cosine",
    "lr_warmup_steps=2",
    "max_token_length=150",
    "dataset_options.resolution=[64, 64]",
    "dataset_options.min_bucket_reso=32",
    "dataset_options.max_bucket_reso=128",
)
TRAINER_FAILED = 3


def kwrap(
    *arguments: object, nan_from: int = 0, nan_to: int = 0, nan_gradient: int = 0
) -> subprocess.CompletedProcess[str]:
    """With a GradScaler, or without one where a gradient is to be no number."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCALER), os.environ.get("PYTHONPATH", "")]),
        **({"NAN_GRADIENT": str(nan_gradient)} if nan_gradient else {"EMULATED_SCALE": "1024"}),
    }
    if nan_from:
        environment |= {"NAN_FROM": str(nan_from), "NAN_TO": str(nan_to or sys.maxsize)}
    command = [sys.executable, "-m", "kohaku_wrap", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def train(site: Path, name: str, *options: str, **spoiled: int) -> subprocess.CompletedProcess[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return kwrap("train", "demo", "--site", site, "--run", name, *settings, *options, **spoiled)


def ask(verb: str, run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(kwrap(verb, run.folder, "--json").stdout)
    return document


def skipped_in_ledger(run: Run, attempt: int) -> list[int]:
    steps = read_ledger_file(ledger_file(run.ledger, attempt, 0)).steps
    return [int(each["optimizer_step"]) for each in steps if each["flags"] & SKIPPED]


def last_end(run: Run, attempt: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run.attempts / str(attempt) / "end.json").read_text())
    return document


def prove_limit(site: Path, runs: Path, engine: str) -> None:
    """NaN from the second step on: an end at the limit, which neither a restart nor a resume begins anew."""
    options = ("--engine", engine, "--bad-steps", "3", "--restarts", "4", "--restart-pause", "0")
    failed = train(site, f"limit-{engine}", *options, nan_from=3)
    run = Run(runs / f"limit-{engine}")
    assert failed.returncode == TRAINER_FAILED, failed.stdout + failed.stderr
    assert last_end(run, 1)["kind"] == "non-finite-loss" and last_end(run, 1)["optimizer_step"] == 4
    assert "3 optimizer steps in a row, 2 to 4, were skipped" in failed.stderr
    assert f"kwrap resume {run.folder} --step 1" in failed.stderr
    assert not (run.attempts / "2").exists(), "the same steps would only be skipped again"
    assert skipped_in_ledger(run, 1) == [2, 3, 4]
    counts = {step: read_manifest(path).extra["bad_steps"]["in_a_row"] for step, path in list_states(run.states)}
    assert counts == {1: 0, 2: 1, 3: 2}

    again = kwrap("resume", run.folder, "--bad-steps", 3, "--restarts", 4, "--restart-pause", 0, nan_from=1)
    assert again.returncode == TRAINER_FAILED
    assert skipped_in_ledger(run, 2) == [4] and not (run.attempts / "3").exists()
    status = ask("status", run)
    assert (status["skipped_steps"], status["non_finite_steps"], status["bad_steps_in_a_row"]) == (3, 3, 3)

    report = ask("verify", run)
    assert report["proved"] and (report["optimizer_steps"], report["skipped_steps"]) == (4, 3)


def prove_few(site: Path, runs: Path, engine: str) -> None:
    """One step skipped: the schedule waits for it, the run is finished and proved."""
    done = train(site, f"few-{engine}", "--engine", engine, nan_from=3, nan_to=4)
    run = Run(runs / f"few-{engine}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = ask("verify", run)
    assert report["proved"] and (report["skipped_steps"], report["non_finite_steps"]) == (1, 1)
    checks = {check["name"]: check for check in report["checks"]}
    assert all(check["is_looked_at"] for check in checks.values()), checks
    total = run.lock.total_optimizer_steps
    assert checks["rates"]["detail"].startswith(f"{total} optimizer steps of 2 groups"), checks
    rates = [line["lr_unet"] for line in read_metrics(run)]
    assert rates[0] == 0 and rates[1] == rates[2] > 0 and rates[3] > rates[2]


def prove_half(site: Path, runs: Path, engine: str) -> None:
    """NaN for ever, and too few steps for the limit: not finished, not proved."""
    failed = train(site, f"half-{engine}", "--engine", engine, nan_from=3)
    run = Run(runs / f"half-{engine}")
    assert failed.returncode == TRAINER_FAILED, failed.stdout + failed.stderr
    assert last_end(run, 1)["kind"] == "mostly-skipped"
    total = run.lock.total_optimizer_steps
    status = ask("status", run)
    assert status["condition"] == "failed" and status["skipped_steps"] == total - 1
    report = ask("verify", run)
    assert not report["proved"] and not report["is_finished"] and report["skipped_steps"] == total - 1
    assert [fault["kind"] for fault in report["faults"]] == ["skipped"]


def prove_gradients(site: Path, runs: Path, engine: str) -> None:
    """A gradient that is no number where the loss is one ends the attempt, also where the weights stay numbers."""
    failed = train(site, f"gradients-{engine}", "--engine", engine, nan_gradient=4)
    run = Run(runs / f"gradients-{engine}")
    assert failed.returncode == TRAINER_FAILED, failed.stdout + failed.stderr
    assert "the gradients of optimizer step 2 are no numbers, its loss is one" in failed.stderr
    assert [step for step, _ in list_states(run.states)] == [1]
    allowed = kwrap("resume", run.folder, "--allow", "non-finite-loss", nan_gradient=2)
    assert allowed.returncode == 0, allowed.stdout + allowed.stderr


def prove_weights(site: Path, runs: Path, engine: str) -> None:
    """Gradients that nobody looks at, as none is clipped: what came of them is not saved, and the way back works."""
    options = ("--engine", engine, "--set", "optimizer_type=AdamW", "--set", "max_grad_norm=0")
    failed = train(site, f"weights-{engine}", *options, nan_gradient=4)
    run = Run(runs / f"weights-{engine}")
    assert failed.returncode == TRAINER_FAILED, failed.stdout + failed.stderr
    assert "weights of the network are no numbers after optimizer step 2; nothing was saved of it" in failed.stderr
    assert [step for step, _ in list_states(run.states)] == [1]
    assert last_end(run, 1)["kind"] == "non-finite-loss" and f"kwrap resume {run.folder} --step 1" in failed.stderr
    assert kwrap("resume", run.folder, "--step", 1, nan_gradient=sys.maxsize).returncode == 0
    assert ask("verify", run)["proved"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_builtin_engine_ends_where_steps_are_skipped_for_ever(world: World) -> None:
    prove_limit(world.site, world.folder / "runs", "builtin")
    prove_few(world.site, world.folder / "runs", "builtin")
    prove_half(world.site, world.folder / "runs", "builtin")
    prove_gradients(world.site, world.folder / "runs", "builtin")
    prove_weights(world.site, world.folder / "runs", "builtin")


@pytest.mark.sd_scripts
@pytest.mark.slow
@pytest.mark.usefixtures("use_trainer")
@pytest.mark.timeout(1800)
def test_the_real_trainer_ends_where_steps_are_skipped_for_ever(world: World, sd_scripts: Any) -> None:
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    assert document["machine"]["gpus"] == 0
    prove_limit(world.site, world.folder / "runs", "sd-scripts")
    prove_few(world.site, world.folder / "runs", "sd-scripts")
    prove_half(world.site, world.folder / "runs", "sd-scripts")
    prove_gradients(world.site, world.folder / "runs", "sd-scripts")
    prove_weights(world.site, world.folder / "runs", "sd-scripts")
