"""The sdist and wheel are complete, and the wheel works in an empty environment outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_THE_WHEEL = ("kohaku_wrap/", "templates/", "datasets/", "proofs/")


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_wheel_holds_all_that_git_knows_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        name if name.startswith("kohaku_wrap/") else f"kohaku_wrap/{name}"
        for name in tracked_files()
        if name.startswith(IN_THE_WHEEL)
    }
    assert held == wanted


@pytest.mark.slow
def test_the_sdist_holds_what_git_knows_and_no_caches(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    wanted = {name for name in tracked_files() if not name.startswith((".ci/", ".git"))}
    assert {name for name in held if name != "PKG-INFO" and ".egg-info/" not in name} == wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr[-3000:]
    kwrap = environment / "bin" / "kwrap"
    for arguments in (
        ["template", "ls"],
        ["demo", "world", "--posts", "60"],
        ["select", "demo", "--db", "world/danbooru.db", "--out", "demo.parquet"],
        ["extract", "demo.parquet", "--tars", "world/tars", "--out", "world/images"],
        ["caption", "demo.parquet", "--db", "world/danbooru.db", "--out", "world/images"],
    ):
        done = subprocess.run([kwrap, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"kwrap {arguments}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "world" / "images" / "metadata_cache.json").is_file()
    refused = subprocess.run(
        [kwrap, "train", "demo", "--site", "world/site.toml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "kohaku-wrap[train]" in refused.stderr
