"""Runs that begin from another run's state with other options: what is taken, at which rates, and what is proved."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from engine_world import World, kwrap, train_arguments
from kwrap_0_1 import make_older

from kohaku_wrap.proving.likeness import METRICS, compare_networks
from kohaku_wrap.training.engines.branching import list_hyperparameters, take_moments
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.origin import read_taken

UNET, TEXT = 1e-3, 2e-4
COSINE = (
    f"unet_lr={UNET}",
    f"text_encoder_lr=[{TEXT}]",
    "optimizer_type=AdamW",
    "lr_scheduler=cosine",
    "lr_warmup_steps=0",
    "states.keep=9",
    "save_last_n_steps=9",
)


def cosine(rate: float, update: int, updates: int) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * update / updates))


def verify(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(kwrap("verify", str(run.folder), "--json").stdout)
    return document


def check_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in report["checks"] if check["name"] == name)


@pytest.fixture(scope="module")
def parent(world: World) -> Run:
    """A cosine of four optimizer steps, two in each epoch."""
    trained = kwrap(*train_arguments(world.site, "stem", *COSINE))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    return Run(world.folder / "runs" / "stem")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_branch_with_nothing_changed_is_the_resume(parent: Run) -> None:
    made = kwrap("branch", str(parent.folder), "--step", "2", "--run", "same")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "goes on at its epoch and position" in made.stderr
    run = Run(parent.folder.parent / "same")
    assert compare_networks(parent.networks[0], run.networks[0]) > 100
    lines = [{name: line[name] for name in METRICS} for line in read_metrics(parent)[2:]]
    assert lines == [{name: line[name] for name in METRICS} for line in read_metrics(run)]
    report = verify(run)
    assert report["proved"], report
    assert check_of(report, "line")["detail"] == "run stem, optimizer steps 1 to 2: proved"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_branch_trains_at_its_own_rates_and_is_whole_without_its_parent(parent: Run, tmp_path: Path) -> None:
    settings = (f"unet_lr={UNET / 2}", f"text_encoder_lr=[{TEXT / 2}]", "optimizer_args.weight_decay=0.3")
    chosen = [word for setting in (*settings, "max_train_epochs=3") for word in ("--set", setting)]
    made = kwrap("branch", str(parent.folder), "--step", "1", "--run", "half", *chosen)
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"unet_lr: {UNET} in stem, {UNET / 2} here" in made.stderr
    run = Run(parent.folder.parent / "half")
    lines = read_metrics(run)
    assert [line["optimizer_step"] for line in lines] == [2, 3, 4, 5, 6]
    for line in lines:
        update = line["optimizer_step"] - 1
        assert line["lr_unet"] == pytest.approx(cosine(UNET / 2, update, 6), rel=1e-12)
        assert line["lr_text_encoder"] == pytest.approx(cosine(TEXT / 2, update, 6), rel=1e-12)
        assert line["weight_decay_unet"] == line["weight_decay_text_encoder"] == 0.3
    state = torch.load(run.states / "optimizer-step-00000006" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.3}
    assert {group["initial_lr"] for group in state["param_groups"]} == {UNET / 2, TEXT / 2}
    assert {int(each["step"]) for each in state["state"].values()} == {6}, "the counters of the moments went on"
    taken = read_taken(list_attempts(run)[0].folder)
    assert taken is not None and len(taken.taken) == 3 and not taken.left

    refused = kwrap("remove", str(parent.folder), "--yes")
    assert refused.returncode == 1 and "half" in refused.stderr
    away = tmp_path / "half"
    (tmp_path / "hidden").mkdir()
    shutil.move(run.folder, away)
    again = kwrap("resume", str(away), "--step", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert check_of(verify(Run(away)), "line")["is_looked_at"], "the parent lies in the runs folder of its site"
    hidden = Path(shutil.move(parent.folder, tmp_path / "hidden" / "stem"))
    report = verify(Run(away))
    shutil.move(hidden, parent.folder)
    assert report["proved"], report
    assert check_of(report, "parent")["is_looked_at"] and not check_of(report, "line")["is_looked_at"]
    assert "states there are: 1, 2" in kwrap("resume", str(away), "--step", "0").stderr.lower()

    beginning = away / "ledger" / "parent.json"
    text = beginning.read_text()
    beginning.write_text(text.replace('"stem"', '"stern"'))
    assert not verify(Run(away))["proved"], "the ledger begins with another parent than the lock has"
    beginning.write_text(text)
    file = next((away / "parent").rglob("*.pt"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    Path(shutil.copy(file, tmp_path / "copy")).replace(file)
    file.write_bytes(data)
    assert not verify(Run(away))["proved"], "the state that it began from was changed"


OTHER = f"other-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
"""A branch that is refused or only tried: each worker's own, as the run that it begins from is there for all."""


def dry_run(run: Run, *arguments: str) -> dict[str, Any]:
    shown = kwrap("branch", str(run.folder), "--run", OTHER, *arguments, "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    document: dict[str, Any] = json.loads(shown.stdout)
    return document


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=5", "the seed was 42, is 5"),
        ("effective_batch=2", "effective_batch was 4, is 2"),
        ("dataset_options.num_repeats=2", "repeats was 1, is 2"),
        ("dataset_options.max_bucket_reso=96", "the bucket options changed"),
    ],
)
def test_what_changes_the_order_begins_its_own_epoch(whole: Run, setting: str, words: str) -> None:
    shown = dry_run(whole, "--step", "3", "--set", setting)
    assert shown["start_optimizer_step"] == 0 and shown["begins_anew"][0].startswith(words), shown


def test_what_leaves_the_order_goes_on(whole: Run) -> None:
    settings = ("max_grad_norm=0.5", "lr_scheduler=constant", "lr_warmup_steps=0")
    shown = dry_run(whole, "--step", "3", *[word for setting in settings for word in ("--set", setting)])
    assert shown["start_optimizer_step"] == 3 and shown["total_optimizer_steps"] == 4
    changed = {each["option"]: each["new"] for each in shown["options"]}
    assert changed == {"max_grad_norm": 0.5, "lr_scheduler": "constant", "lr_warmup_steps": 0}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "would end after optimizer step 4 and begins after step 4"),
        (("--set", "unet_lr=1e-5"), 2, "--step 4 --run OTHER --set unet_lr=1e-5 --set max_train_epochs=3"),
        (("--step", "7"), 1, "States there are: 3, 4"),
        (("--step", "3", "--set", "network_args.factor=2"), 1, "does not fit these options"),
        (("--step", "3", "--set", "unet_lrr=1"), 1, "unet_lr"),
        (("--step", "3", "--template", "no-such"), 2, "no template is called no-such"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(whole: Run, arguments: tuple[str, ...], code: int, words: str) -> None:
    refused = kwrap("branch", str(whole.folder), "--run", OTHER, *arguments)
    assert refused.returncode == code and words.replace("OTHER", OTHER) in refused.stderr, refused.stderr
    assert not (whole.folder.parent / OTHER).exists()


@pytest.mark.slow
def test_a_branch_refused_at_its_start_is_taken_back(parent: Run, world: World) -> None:
    (world.folder / "nothing").mkdir()
    elsewhere = world.folder / "without_tokenizers.toml"
    elsewhere.write_text(world.site.read_text().replace("base/tokenizers", "nothing"))
    refused = kwrap("branch", str(parent.folder), "--run", "blank", "--step", "2", "--site", str(elsewhere))
    assert refused.returncode == 1 and "was refused before its first step" in refused.stderr, refused.stderr
    assert not (parent.folder.parent / "blank").exists()


def train_one(kind: type, **options: Any) -> tuple[Any, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([{"params": [parameter], "lr": 0.5}], **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameter


@pytest.mark.timeout(900)
def test_a_run_of_kwrap_0_1_is_no_beginning(whole: Run, tmp_path: Path) -> None:
    old = make_older(Run(shutil.copytree(whole.folder, tmp_path / "old")))
    refused = kwrap("branch", str(old.folder), "--run", "new")
    assert refused.returncode == 2
    assert "it cannot be the beginning of a branch" in refused.stderr
    assert f"--from {old.networks[0]} --run NEW" in refused.stderr


def test_moments_come_and_hyperparameters_stay() -> None:
    saved = train_one(torch.optim.AdamW, weight_decay=0.1, betas=(0.5, 0.6))[0].state_dict()
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    fresh = torch.optim.AdamW([{"params": [parameter], "lr": 0.25}], weight_decay=0.7, betas=(0.8, 0.9), eps=1e-3)
    before = {name: value for name, value in fresh.param_groups[0].items() if name != "params"}
    taken = take_moments(fresh, fresh, saved, {0: "lr_unet"}, is_same=False)
    assert taken.taken == ("lr_unet: moments of 1 of 1 parameters",) and not taken.left
    assert {name: value for name, value in fresh.param_groups[0].items() if name != "params"} == before
    assert torch.equal(fresh.state[parameter]["exp_avg"], saved["state"][0]["exp_avg"])
    assert not (parameter != 0).any(), "what was tried left no mark"


def test_moments_of_another_form_are_left() -> None:
    saved = train_one(torch.optim.AdamW)[0].state_dict()
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    more = torch.optim.AdamW([parameter], amsgrad=True)
    assert "max_exp_avg_sq 3×2" in take_moments(more, more, saved, {}, is_same=False).left[0]
    larger = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 2))])
    assert "exp_avg 4×2" in take_moments(larger, larger, saved, {}, is_same=False).left[0]
    two = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2)])
    assert "no group of 2 parameters" in take_moments(two, two, saved, {}, is_same=False).left[0]
    assert not more.state and not larger.state and not two.state


def test_counters_of_a_group_come_with_its_moments() -> None:
    old = train_one(schedulefree.AdamWScheduleFree, warmup_steps=3)[0]
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    fresh = schedulefree.AdamWScheduleFree([parameter], lr=0.25, warmup_steps=7)
    assert take_moments(fresh, fresh, old.state_dict(), {}, is_same=False).taken
    group = fresh.param_groups[0]
    assert (group["k"], group["warmup_steps"], group["lr"]) == (1, 7, 0.25)
    assert {"k", "weight_sum"} <= fresh.defaults.keys() - list_hyperparameters(type(fresh))
