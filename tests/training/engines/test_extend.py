"""Runs made longer through `kwrap extend`: the rates of each rule at every step, and what is refused."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
from engine_world import World, kwrap, train_arguments

from kohaku_wrap.config.reading import LENGTHS
from kohaku_wrap.config.site import load_site
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.starting.extend import plan_extension
from kohaku_wrap.training.starting.length import with_length

RATE = 1e-3
COSINE = (
    f"unet_lr={RATE}",
    f"text_encoder_lr=[{RATE / 2}]",
    "lr_scheduler=cosine",
    "lr_warmup_steps=0",
    "max_train_epochs=0",
    "max_train_steps=3",
)


def cosine(update: int, updates: int) -> float:
    return RATE * 0.5 * (1 + math.cos(math.pi * update / updates))


def verify(run: Run) -> dict[str, object]:
    document: dict[str, object] = json.loads(kwrap("verify", str(run.folder), "--json").stdout)
    return document


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_each_rule_gives_its_rates_and_is_proved(world: World) -> None:
    """A cosine of three steps, stretched to five at its end, then a new cycle of four."""
    assert kwrap(*train_arguments(world.site, "cosine", *COSINE)).returncode == 0
    run = Run(world.folder / "runs" / "cosine")
    asked = kwrap("extend", str(run.folder), "--steps", "2", "--site", str(world.site))
    assert asked.returncode == 1
    assert f"--steps 2 --site {world.site} --schedule again" in asked.stderr, asked.stderr
    assert 'lr_scheduler = "cosine" depends on the length' in asked.stderr
    rate = f"{cosine(3, 5):.4g} at update 4"
    assert rate in asked.stderr.split("--schedule stretch")[1].split("--schedule again")[0], asked.stderr
    assert f"{RATE:.4g} at update 4" in asked.stderr.split("--schedule again")[1]
    before = run.lock_file.read_bytes()
    dry = kwrap("extend", str(run.folder), "--steps", "2", "--schedule", "stretch", "--dry-run", "--json")
    shown = json.loads(dry.stdout)
    assert shown["total_optimizer_steps"] == 5 and shown["from_optimizer_step"] == 3
    assert run.lock_file.read_bytes() == before, "nothing was changed"

    stretched = kwrap("extend", str(run.folder), "--steps", "2", "--schedule", "stretch")
    assert stretched.returncode == 0, stretched.stderr
    run.forget_lock()
    # The lock alone is written, as if the machine had failed just then; the resume goes on by it.
    plan_extension(run, None, 4, "again").write()
    assert json.loads(kwrap("status", str(run.folder), "--json").stdout)["condition"] != "finished"
    resumed = kwrap("resume", str(run.folder))
    assert resumed.returncode == 0, resumed.stderr

    rates = [line["lr_unet"] for line in read_metrics(run)]
    wanted = [cosine(update, 3) for update in range(3)]
    wanted += [cosine(update, 5) for update in (3, 4)]
    wanted += [cosine(update, 4) for update in range(4)]
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert shown["rates_of_updates"]["4"][1] == pytest.approx(wanted[3])
    report = verify(run)
    assert report["proved"], report
    told = kwrap("status", str(run.folder)).stdout
    assert "5 optimizer steps, decided at step 3, --schedule stretch" in told, told
    networks = sorted(path.name for path in run.checkpoints.glob("*.safetensors"))
    assert networks[-1] == "cosine.safetensors" and {"cosine-step00000008.safetensors"} <= set(networks)
    assert "lies before step 5" in kwrap("resume", str(run.folder), "--step", "0").stderr


@pytest.mark.slow
def test_a_rule_that_would_do_nothing_is_refused(world: World) -> None:
    assert kwrap(*train_arguments(world.site, "short", "max_train_epochs=0", "max_train_steps=1")).returncode == 0
    folder = str(world.folder / "runs" / "short")
    for arguments, words in (
        (("--steps", "1", "--schedule", "again"), "depends on its length"),
        (("--steps", "1", "--repeat-warmup"), "only a new cycle has a warm-up again"),
        ((), "--epochs N or --steps N, one of them"),
        (("--steps", "1", "--epochs", "1"), "--epochs N or --steps N, one of them"),
    ):
        refused = kwrap("extend", folder, *arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
    told = kwrap("resume", folder)
    assert told.returncode == 1 and "kwrap extend" in told.stderr


@pytest.mark.slow
def test_a_finished_run_whose_images_were_moved_is_extended_from_where_they_lie_now(world: World) -> None:
    assert kwrap(*train_arguments(world.site, "moved", "max_train_epochs=0", "max_train_steps=1")).returncode == 0
    longer = ("extend", str(world.folder / "runs" / "moved"), "--steps", "1", "--dry-run")
    images = load_site(world.site).paths.images
    now, site = world.folder / "images-now", world.folder / "moved.toml"
    site.write_text(re.sub(r"(?m)^images = .*$", f'images = "{now}"', world.site.read_text()))
    images.rename(now)
    try:
        refused = kwrap(*longer)
        assert refused.returncode == 1 and "`kwrap extend` and `kwrap verify` take the same --site" in refused.stderr
        found = kwrap(*longer, "--site", str(site))
        assert found.returncode == 0, found.stderr
    finally:
        now.rename(images)


def test_only_the_length_of_the_trainers_file_changes(tmp_path: Path) -> None:
    text = "[training]\nmax_train_epochs = 2\nseed = 5\n\n[network]\nnetwork_dim = 4\n"
    assert with_length(text, {"max_train_epochs": 2}) == text
    longer = tomllib.loads(with_length(text, {"max_train_steps": 40}))
    assert longer == {"training": {"seed": 5, "max_train_steps": 40}, "network": {"network_dim": 4}}
    assert set(LENGTHS) == {"max_train_epochs", "max_train_steps"}
