"""`kwrap trainer`: a supported commit under `$KWRAP_HOME`, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.planning.doctor import examine_trainer
from kohaku_wrap.trainer.checkout import TrainerMissing, find_checkout
from kohaku_wrap.trainer.commits import SUPPORTED, digest_sources
from kohaku_wrap.trainer.git import run_git

Command = Callable[..., str]


def test_a_commit_that_is_not_supported_is_refused_before_anything_is_fetched(kwrap: Command, home: Path) -> None:
    output = kwrap("trainer", "install", "--commit", "v0.9.1", expect=2)
    assert "v0.9.1 is not supported" in output
    assert "v0.10.1" in output
    assert not (home / "trainer").exists()


def test_a_source_that_is_not_there_leaves_nothing(kwrap: Command, home: Path, tmp_path: Path) -> None:
    output = kwrap("trainer", "install", "--source", str(tmp_path / "nowhere"), expect=1)
    assert "nowhere" in output
    assert list((home / "trainer").iterdir()) == []


def test_show_says_how_to_get_a_trainer(kwrap: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KWRAP_SD_SCRIPTS", raising=False)
    assert "kwrap trainer install" in kwrap("trainer", "show", expect=1)


def test_a_folder_that_is_no_checkout_is_named(kwrap: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(tmp_path))
    assert f"{tmp_path}: no sd-scripts checkout" in kwrap("trainer", "show", expect=1)
    finding = examine_trainer(required=True)
    assert f"{tmp_path}: no sd-scripts checkout" in finding.what
    assert "KWRAP_SD_SCRIPTS" in finding.do, "to install another would not help while it is set"


def test_the_commit_of_a_run_that_is_not_installed_is_told_with_what_helps(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KWRAP_SD_SCRIPTS", raising=False)
    with pytest.raises(TrainerMissing) as known:
        find_checkout(SUPPORTED[1].commit)
    assert known.value.next_step == f"Install it: kwrap trainer install --commit {SUPPORTED[1].commit[:10]}"
    with pytest.raises(TrainerMissing) as foreign:
        find_checkout("f" * 40)
    assert "trainer install" not in foreign.value.next_step and "KWRAP_SD_SCRIPTS" in foreign.value.next_step


@pytest.mark.parametrize(
    "name", ["train_network.py", "library/train_util.py", "library/ipex/attention.py", "networks/lora.py"]
)
def test_a_change_in_whatever_a_training_imports_is_seen(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"rank = 4\n")
    (tmp_path / "networks").mkdir(exist_ok=True)
    before = digest_sources(tmp_path)
    path.write_bytes(b"rank = 4\r\n")
    assert digest_sources(tmp_path) == before, "line ends do not count"
    path.write_bytes(b"rank = 5\n")
    changed = digest_sources(tmp_path)
    assert changed != before
    (tmp_path / "networks" / "another.py").write_text("")
    assert digest_sources(tmp_path) != changed, "a file more counts, too"


@pytest.mark.sd_scripts
def test_install_from_a_repository_then_show_then_fix(
    trainer: Any, kwrap: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (trainer.checkout.path / ".git").exists():
        pytest.skip("the checkout is not a git repository; enable with `kwrap trainer install`")
    monkeypatch.delenv("KWRAP_SD_SCRIPTS", raising=False)
    install = ("trainer", "install", "--source", str(trainer.checkout.path), "--commit", trainer.checkout.commit)
    first = json.loads(kwrap(*install, "--no-requirements", "--json"))
    assert first["supported"]
    assert not first["was_there"]
    assert Path(first["path"]) == home / "trainer" / trainer.checkout.commit

    shown = json.loads(kwrap("trainer", "show", "--json"))
    assert shown["commit"] == trainer.checkout.commit
    assert {each["found"] for each in shown["anchors"]} == {1}
    assert len(shown["patches"]) == sum(each["corrected"] for each in shown["anchors"])

    script = Path(first["path"]) / "networks" / "lora.py"
    script.write_text(script.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    changed = json.loads(kwrap("trainer", "show", "--json"))
    assert changed["changed"]
    assert not changed["ready"]
    kwrap(*install, "--no-requirements")
    assert json.loads(kwrap("trainer", "show", "--json"))["supported"]
    assert [path.name for path in (home / "trainer").iterdir()] == [trainer.checkout.commit]


@pytest.mark.sd_scripts
def test_the_newest_is_what_the_source_has_checked_out_and_said_to_be(
    trainer: Any, kwrap: Command, home: Path, tmp_path: Path
) -> None:
    """A fork's own commit on top, and a branch of it beside: neither is supported, and both are named."""
    if not (trainer.checkout.path / ".git").exists():
        pytest.skip("the checkout is not a git repository; enable with `kwrap trainer install`")
    fork = tmp_path / "fork"
    run_git(["clone", "--quiet", "--no-checkout", str(trainer.checkout.path), str(fork)], tmp_path)
    author = ("-c", "user.name=x", "-c", "user.email=x@x")
    tree = run_git(["mktree"], fork).strip()
    for branch in ("aside", "own"):
        commit = run_git([*author, "commit-tree", tree, "-p", "HEAD", "-m", f"on {branch}"], fork).strip()
        run_git(["branch", branch, commit], fork)
    run_git(["symbolic-ref", "HEAD", "refs/heads/own"], fork)
    install = ("trainer", "install", "--source", str(fork), "--prove", "--no-requirements", "--commit")
    said = kwrap(*install, "newest", expect=1)
    assert f"{fork} has checked out: own, " in said and "(on own)" in said
    assert f"1 commit after {trainer.checkout.name}" in said and "--commit TAG, HASH or BRANCH" in said
    assert "sdxl_train_network.py is not there" in said
    assert "sdxl_train_network.py is not there" in kwrap(*install, "aside", expect=1)
    assert [*(home / "trainer").iterdir()] == []
