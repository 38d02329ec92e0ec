"""Every place that kwrap relies on must stand once, or the commit is refused by name."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.trainer.anchors import ANCHORS, LOOP, LOOP_ANCHORS, Anchor
from kohaku_wrap.trainer.checkout import UnsupportedTrainer, inspect_checkout, require_supported
from kohaku_wrap.trainer.commits import IMPORTED_FOLDERS, SUPPORTED_TEXT
from kohaku_wrap.trainer.corrections import (
    AnchorsMissing,
    SourceUnreadable,
    correct_loop,
    find_nodes,
    match_anchors,
    require_anchors,
)

SMALL_TRAINER = """
class NetworkTrainer:
    def on_step_start(self, args, batch):
        pass

    def train(self, args):
        steps = 0  # a comment
        if steps > 0:
            assert args.limit > steps
        if steps > 0:
            for _ in range(3):
                pass
            total = steps
"""


def anchor(kind: Any, text: str, within: str = "NetworkTrainer.train", holds: str = "") -> Anchor:
    return Anchor("a", within, kind, text, holds)


@pytest.mark.parametrize(
    ("sought", "count"),
    [
        (anchor("statement", "steps = 0"), 1),
        (anchor("statement", "steps = 1"), 0),
        (anchor("branch", "steps > 0"), 2),
        (anchor("branch", "steps > 0", holds="args.limit > steps"), 1),
        (anchor("branch", "steps > 0", holds="total = steps"), 1),
        (anchor("expression", "range(3)"), 1),
        (anchor("calls", "range()"), 1),
        (anchor("definition", "on_step_start(self, args, batch)", "NetworkTrainer"), 1),
        (anchor("definition", "on_step_start(self, args, …)", "NetworkTrainer"), 1),
        (anchor("definition", "on_step_start(batch, self, args)", "NetworkTrainer"), 1),
        (anchor("definition", "on_step_start(self, batch)", "NetworkTrainer"), 0),
        (anchor("definition", "on_step_start(self, images, …)", "NetworkTrainer"), 0),
        (anchor("statement", "steps = 0", "NetworkTrainer.other"), 0),
    ],
)
def test_anchors_are_found_by_their_syntax(sought: Anchor, count: int) -> None:
    assert len(find_nodes(ast.parse(SMALL_TRAINER), sought)) == count


def test_a_file_that_is_no_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "train_network.py").write_text("def (")
    with pytest.raises(SourceUnreadable, match=r"train_network\.py"):
        match_anchors(tmp_path, LOOP_ANCHORS)


@pytest.fixture
def copy(trainer: Any, tmp_path: Path) -> Path:
    """A copy of the checkout's sources that a test may change."""
    source, target = trainer.checkout.path, tmp_path / "copy"
    for folder in IMPORTED_FOLDERS:
        shutil.copytree(source / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_network.py", "sdxl_train_network.py"):
        shutil.copy(source / name, target / name)
    return target


@pytest.mark.sd_scripts
def test_a_supported_checkout_is_known_without_git(copy: Path) -> None:
    checkout = require_supported(inspect_checkout(copy, "test"))
    assert checkout.is_supported
    assert len(match_anchors(copy)) == len(ANCHORS)


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("text", "other", "name"),
    [
        ("global_step = 0\n", "global_step = 1\n", "steps already done"),
        ("def on_step_start(", "def on_step_begin(", "step hook"),
        ("def get_scheduler_fix(args,", "def get_scheduler_fixed(args,", "scheduler"),
    ],
)
def test_a_changed_place_is_named_with_the_supported_commits(copy: Path, text: str, other: str, name: str) -> None:
    paths = [copy / "train_network.py", *copy.glob("library/*.py")]
    path = next(each for each in paths if text in each.read_text(encoding="utf-8"))
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1
    path.write_text(source.replace(text, other), encoding="utf-8")
    with pytest.raises(AnchorsMissing) as refused:
        require_supported(inspect_checkout(copy, "test"))
    assert f"{name} " in refused.value.message
    assert "found 0 times" in refused.value.message
    assert SUPPORTED_TEXT in refused.value.next_step


@pytest.mark.sd_scripts
def test_a_changed_file_with_all_places_is_refused_too(copy: Path) -> None:
    with (copy / "library" / "train_util.py").open("a", encoding="utf-8") as stream:
        stream.write("\nEXTRA = 1\n")
    require_anchors(copy, "copy")
    with pytest.raises(UnsupportedTrainer, match="not supported"):
        require_supported(inspect_checkout(copy, "test"))


@pytest.mark.sd_scripts
def test_the_corrected_loop_compiles_and_changes_only_its_places(copy: Path) -> None:
    source = copy / "train_network.py"
    corrected = correct_loop(copy, "copy")
    compile(corrected, str(source), "exec")
    text = ast.unparse(corrected)
    assert text.count(f"{LOOP}.") == sum((each.replacement or "").count(f"{LOOP}.") for each in LOOP_ANCHORS)
    whole = ast.parse(source.read_text(encoding="utf-8"))
    trainer = next(node for node in whole.body if isinstance(node, ast.ClassDef))
    before = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    changed = set(ast.unparse(before).splitlines()) ^ set(text.splitlines())
    assert 10 < len(changed) < 40
