"""What was proved on this machine is taken by its files alone, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from kohaku_wrap.config.render import describe_trainer
from kohaku_wrap.planning.doctor import examine_trainer
from kohaku_wrap.proving import prove_trainer
from kohaku_wrap.trainer import checkout as checkout_module
from kohaku_wrap.trainer.checkout import (
    Checkout,
    ImpossiblePair,
    find_commit,
    inspect_checkout,
    install_checkout,
    list_installed,
    list_later,
    require_supported,
    require_transformers,
)
from kohaku_wrap.trainer.commits import (
    TRIAL_VARIABLE,
    SupportedCommit,
    digest_sources,
    find_known,
    write_proof,
)
from kohaku_wrap.trainer.corrections import AnchorsMissing
from kohaku_wrap.trainer.git import run_git
from kohaku_wrap.trainer.options import OptionTable, compare_tables, parse_table

TEXT = "proved on this machine on 2026-11-25, identical to v0.11.1"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("sdxl_train_network.py", "train_network.py", "networks/lora.py", "library/loss.py"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path / "checkout"


def proved(checkout: Path, support: str = TEXT) -> SupportedCommit:
    return SupportedCommit("new", "c0ffee" * 6 + "beef", digest_sources(checkout), True, support)


def test_a_proved_checkout_is_taken_like_a_supported_one(checkout: Path) -> None:
    assert not inspect_checkout(checkout, "test").is_supported
    write_proof(proved(checkout), {"date": "2026-11-25"})
    found = require_supported(inspect_checkout(checkout, "test"))
    assert (found.name, found.support) == ("new", TEXT)
    assert find_commit("c0ffeec") == find_commit("new") == proved(checkout)
    assert describe_trainer(checkout) == {
        "path": str(checkout),
        "commit": "c0ffee" * 6 + "beef",
        "support": TEXT,
        "joins_by_separator": True,
    }


@pytest.mark.parametrize("name", ["networks/lora.py", "library/loss.py", "train_network.py"])
def test_a_file_changed_after_the_proof_ends_it(checkout: Path, name: str) -> None:
    write_proof(proved(checkout), {})
    (checkout / name).write_text("x = 1\n")
    assert find_known(checkout) is None
    with pytest.raises(AnchorsMissing, match="found 0 times"):
        require_supported(inspect_checkout(checkout, "test"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": 1', json.dumps({"name": "new", "commit": "c"})])
def test_what_is_no_proof_proves_nothing(checkout: Path, home: Path, content: str) -> None:
    path = write_proof(proved(checkout), {})
    assert path.parent == home / "proofs"
    path.write_text(content)
    assert find_known(checkout) is None


def test_a_trial_holds_for_its_own_processes_only(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = write_proof(proved(checkout, "on trial"), {}, tmp_path / "trial.json")
    assert find_known(checkout) is None
    monkeypatch.setenv(TRIAL_VARIABLE, str(trial))
    assert find_known(checkout) is not None


def test_what_another_process_is_proving_is_not_proved_beside_it(
    checkout: Path, kwrap: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(checkout))
    with prove_trainer.proof_folder(inspect_checkout(checkout, "test")) as folder:
        (folder / "world").mkdir(parents=True)
        said = kwrap("trainer", "prove", expect=1)
        assert "another process is proving these files already" in said and "kwrap trainer show" in said
        assert (folder / "world").is_dir()
    assert not folder.exists()
    assert "already" not in kwrap("trainer", "prove", expect=1)


def test_a_commit_that_another_process_installs_meanwhile_is_kept(checkout: Path, home: Path, tmp_path: Path) -> None:
    """Trainings of the other process may use its files: they are not replaced under them."""
    author = ("-c", "user.name=x", "-c", "user.email=x@x")
    for words in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "-m", "new")):
        run_git(words, checkout)
    commit = run_git(["rev-parse", "HEAD"], checkout).strip()
    others: list[Path] = []

    def examine(found: Checkout) -> None:
        known = replace(proved(found.path), commit=commit)
        if not others:
            write_proof(known, {})
            others.append(install_checkout(str(checkout), commit, examine=lambda _: None)[0].path)
            others[0].joinpath("mark").write_text("of the other process")

    path, was_there = install_checkout(str(checkout), commit, examine=examine)
    assert was_there and path.path == others[0] == home / "trainer" / commit and (others[0] / "mark").exists()
    assert [each.name for each in (home / "trainer").iterdir()] == [commit]
    (others[0] / "networks" / "lora.py").write_text("changed")
    install_checkout(str(checkout), commit)
    assert not (others[0] / "mark").exists() and inspect_checkout(others[0], "test").is_supported
    (others[0] / "sdxl_train_network.py").unlink()
    install_checkout(str(checkout), commit)
    assert inspect_checkout(others[0], "test").is_supported


def test_what_is_installed_and_later_is_named(checkout: Path, home: Path) -> None:
    """By the dates of the commits; of a folder that is no repository it is not known."""
    days = {"first": "2026-02-01", "second": "2026-03-01", "third": "2026-03-02", "fourth": "2026-04-01"}
    folders = {name: home / "trainer" / (str(number) * 40) for number, name in enumerate([*days, "undated"])}
    for name, folder in folders.items():
        shutil.copytree(checkout, folder)
        (folder / "library" / "loss.py").write_text(name)
        write_proof(replace(proved(folder), name=name, commit=folder.name), {})
        if name in days:
            run_git(["init", "--quiet"], folder)
            tree = run_git(["write-tree"], folder).strip()
            when = f"{days[name]}T12:00:00Z"
            text = f"tree {tree}\nauthor x <x> {stamp(when)}\ncommitter x <x> {stamp(when)}\n\n{name}\n"
            (folder / "commit").write_text(text)
            commit = run_git(["hash-object", "-t", "commit", "-w", "commit"], folder).strip()
            run_git(["update-ref", "HEAD", commit], folder)
    assert sorted(list_later(inspect_checkout(folders["second"], "test"))) == ["fourth", "third"]
    assert list_later(inspect_checkout(folders["fourth"], "test")) == []
    assert list_later(inspect_checkout(folders["undated"], "test")) == []


def stamp(day: str) -> str:
    return f"{int(datetime.fromisoformat(day).timestamp())} +0000"


@pytest.mark.parametrize("commit", ["v9.9.9", "f" * 40])
def test_a_commit_that_the_source_does_not_have_is_said(
    checkout: Path, kwrap: Callable[..., str], monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    run_git(["init", "--quiet"], checkout)
    monkeypatch.setenv("LANGUAGE", "de")
    said = kwrap("trainer", "install", "--prove", "--source", str(checkout), "--commit", commit, expect=1)
    assert f"{checkout} has no tag, branch or commit {commit}" in said and f"git ls-remote {checkout}" in said


def test_an_unknown_commit_is_refused_without_a_proof(kwrap: Callable[..., str]) -> None:
    assert "--prove" in kwrap("trainer", "install", "--commit", "0123456789", expect=2)
    assert "Add --prove" in kwrap("trainer", "install", "--accept-difference", expect=2)


def test_changed_options_are_listed() -> None:
    def table(**options: object) -> OptionTable:
        entries = {name: {"type": "int", "default": default} for name, default in options.items()}
        return parse_table({"options": entries, "dataset_options": {}}, "test")

    assert compare_tables(table(a=1, b=2, c=3), table(b=2, c=4, d=5)) == [
        "a: gone",
        "c: default 3, now 4",
        "d: new, a whole number",
    ]


@pytest.mark.parametrize(
    ("version", "line", "fits"),
    [
        ("5.23.0", "from transformers import CLIPFeatureExtractor, CLIPTextModel", False),
        ("5.23.0", "from transformers import CLIPTextModel, CLIPFeatureExtractor", False),
        ("5.23.0", "from transformers import (\n    CLIPTextModel,\n    CLIPFeatureExtractor,\n)", False),
        ("5.23.0", "from transformers import (\n    CLIPImageProcessor as CLIPFeatureExtractor,\n)", True),
        ("5.23.0", "from transformers import CLIPImageProcessor as CLIPFeatureExtractor, CLIPTextModel", True),
        ("4.57.6", "from transformers import CLIPFeatureExtractor, CLIPTextModel", True),
    ],
)
def test_an_impossible_pair_with_transformers_is_refused_by_train_and_doctor(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, line: str, fits: bool
) -> None:
    (checkout / "library" / "pipeline.py").write_text(f"import torch\n{line}\n")
    write_proof(proved(checkout), {})
    package = tmp_path / "packages" / f"transformers-{version}.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(checkout))
    found = inspect_checkout(checkout, "test")
    if fits:
        assert require_supported(found) == found
        return
    with pytest.raises(ImpossiblePair, match=r"sd-scripts new does not train with transformers 5\.23\.0"):
        require_supported(found)
    finding = examine_trainer(required=True)
    assert finding.status == "broken" and "library/pipeline.py" in finding.what


@pytest.mark.sd_scripts
def test_the_matrix_of_commits_and_transformers(use_trainer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KWRAP_SD_SCRIPTS", raising=False)
    there = {each.name for each in list_installed()}
    february = {"v0.10.0", "v0.10.1", "48d368f"} & there
    for version, expected in {"4.57.6": set(), "5.5.4": february, "5.6.0": there, "5.24.0": there}.items():
        monkeypatch.setattr(checkout_module, "installed_version", lambda _, version=version: version)
        refused = set()
        for each in list_installed():
            try:
                require_transformers(each)
            except ImpossiblePair as pair:
                refused.add(each.name)
                assert version in pair.message and "make setup" in pair.next_step
        assert refused == expected, version


def test_a_commit_is_not_proved_by_another_checkout(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_proof(proved(checkout), {})
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(checkout))
    listed = tmp_path / "proved.md"
    with pytest.raises(prove_trainer.NotProved, match=f"{checkout}, which is not at v0.11.1 but at new"):
        prove_trainer.main(["--commit", "v0.11.1", "--folder", str(tmp_path / "work"), "--list", str(listed)])
    assert not listed.exists()
