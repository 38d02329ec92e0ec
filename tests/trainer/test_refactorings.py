"""What developers of the trainer may do to it is followed or refused by name; nothing goes wrong in silence."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.trainer.anchors import TRAINER
from kohaku_wrap.trainer.checkout import inspect_checkout
from kohaku_wrap.trainer.commits import IMPORTED_FOLDERS, TRAINING_SCRIPTS
from kohaku_wrap.trainer.corrections import AnchorsMissing, correct_loop, require_anchors

from .refactorings import (
    Edit,
    add_argument,
    add_lines,
    draw_once_more,
    fix_2425,
    in_order,
    move_block,
    move_function,
    rename,
)

pytestmark = pytest.mark.sd_scripts

TRAIN = f"{TRAINER}.train"
HOOK = f"{TRAINER}.on_step_start"

FOLLOWED: dict[str, Edit] = {
    "the fix of #2425": fix_2425,
    "a block moved to a method": move_block,
    "a function moved to a module": move_function("get_scheduler_fix"),
    "a class moved to a module": move_function("LossRecorder"),
    "an argument added to a hook": add_argument(HOOK, "None"),
    "an argument added to what is wrapped": add_argument("get_scheduler_fix", "False"),
    "lines added to the loop": add_lines(TRAIN, "seen = 0\nprint(seen)"),
    "a variable that kwrap does not use renamed": rename(TRAIN, "progress_bar", "bar"),
}
REFUSED: dict[str, tuple[Edit, str]] = {
    "steps renamed": (rename(TRAIN, "global_step", "optimizer_step"), "steps already done"),
    "first step renamed": (rename(TRAIN, "initial_step", "first_step"), "place in the epochs"),
    "first epoch renamed": (rename(TRAIN, "epoch_to_start", "first_epoch"), "epochs of the loop"),
    "loader renamed": (rename(TRAIN, "train_dataloader", "loader"), "number of the micro-batch"),
    "epoch renamed": (rename(TRAIN, "epoch", "epoch_number"), "epoch for the sampler"),
    "steps counted twice": (add_lines(TRAIN, "global_step = 0"), "steps already done"),
    "an argument that must be given": (add_argument("MinimalDataset.__init__", None), "dataset class"),
    "time steps returned elsewhere": (
        rename(f"{TRAINER}.get_noise_pred_and_target", "timesteps", "levels"),
        "time steps of a batch",
    ),
}


@pytest.fixture
def copy(trainer: Any, tmp_path: Path) -> Path:
    """A copy of the checkout's sources that a test may change, as another folder of it would be."""
    source, target = trainer.checkout.path, tmp_path / "copy"
    for folder in IMPORTED_FOLDERS:
        shutil.copytree(source / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in TRAINING_SCRIPTS:
        shutil.copy(source / name, target / name)
    return target


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_leaves_the_meaning_alone_is_followed(copy: Path, name: str) -> None:
    before = correct_loop(copy, "copy")
    FOLLOWED[name](copy)
    require_anchors(copy, "copy")
    after = correct_loop(copy, "copy")
    compile(after, "copy", "exec")
    calls = [
        sorted(ast.unparse(node) for node in ast.walk(tree) if ast.unparse(node).startswith("kwrap_loop."))
        for tree in (before, after)
    ]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_is_refused_by_name(copy: Path, name: str) -> None:
    edit, place = REFUSED[name]
    edit(copy)
    with pytest.raises(AnchorsMissing) as refused:
        require_anchors(copy, "copy")
        correct_loop(copy, "copy")
    assert f"{place}:" in refused.value.message or f"{place} " in refused.value.message


def test_a_correction_without_its_names_is_refused(copy: Path) -> None:
    """All places stand, but what one of them sets is read no more."""
    move_block(copy)
    rename(f"{TRAINER}.find_first_epoch", "epoch_to_start", "first")(copy)
    with pytest.raises(AnchorsMissing, match="place in the epochs"):
        correct_loop(copy, "copy")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_that_are_followed_train_the_same_networks(copy: Path, use_trainer: Any, tmp_path: Path) -> None:
    from kohaku_wrap.proving.prove_trainer import prove_checkout

    in_order(list(FOLLOWED.values()))(copy)
    proof = prove_checkout(inspect_checkout(copy, "test"), tmp_path / "proof", keep=False)
    assert not proof.difference
    assert "identical to" in proof.commit.support
    assert len(proof.steps) >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_other_noise_behind_known_places_is_caught_by_the_proof(copy: Path, use_trainer: Any, tmp_path: Path) -> None:
    from kohaku_wrap.proving.prove_trainer import NotProved, prove_checkout

    draw_once_more(copy)
    require_anchors(copy, "copy")
    with pytest.raises(NotProved, match=r"compared with .*epoch 0, position 0"):
        prove_checkout(inspect_checkout(copy, "test"), tmp_path / "proof", keep=False)
