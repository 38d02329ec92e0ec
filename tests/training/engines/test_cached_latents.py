"""Cached latents in real processes: made once by several, killed, damaged, and trained from bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import toml
from engine_world import World, flip_byte, kwrap, train_arguments

from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.processes import python_command
from kohaku_wrap.proving.killing import Kill, train_with_kills
from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.caching import make_shards, open_caches, require_all

MOMENTS = ("cache.latents=true", "cache.precision=fp32")


@pytest.fixture
def site(world: World, tmp_path: Path) -> Path:
    """A site with a copy of the images, and latents and runs of its own."""
    shutil.copytree(world.images, tmp_path / "images")
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["paths"] = {name: str(world.folder / path) for name, path in document["paths"].items()}
    document["paths"] |= {"images": str(tmp_path / "images"), "runs": str(tmp_path / "runs")}
    (tmp_path / "site.toml").write_text(toml.dumps(document), encoding="utf-8")
    return tmp_path / "site.toml"


def cache_arguments(site: Path, *settings: str) -> tuple[str, ...]:
    words = train_arguments(site, "", *settings)
    return ("cache", "demo", "--site", str(site), *words[words.index("--set") :], "--json")


def cache(site: Path, *settings: str) -> dict:
    done = kwrap(*cache_arguments(site, *settings))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def hashes(made: dict) -> dict[str, str]:
    """The sha256 of each shard by its name."""
    return {path.stem: json.loads(path.read_text())["sha256"] for path in Path(made["folder"]).glob("0*.json")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_from_cached_moments_is_the_uncached_one(site: Path, tmp_path: Path) -> None:
    whole, run = Run(tmp_path / "runs" / "whole"), Run(tmp_path / "runs" / "cached")
    refused = kwrap(*train_arguments(site, "cached", *MOMENTS))
    assert refused.returncode == 1
    assert "Make them first: kwrap cache" in refused.stderr
    assert not run.folder.exists()
    assert cache(site, *MOMENTS)["images_encoded"] == 7
    done = kwrap(*train_arguments(site, "whole"))
    assert done.returncode == 0, done.stderr
    train_with_kills(run, train_arguments(site, "cached", *MOMENTS), (Kill(0.7),), (0, 1), tmp_path)
    assert compare_runs(whole, run).attempts == 2
    verified = kwrap("verify", str(run.folder), "--deep", "4", "--json")
    assert json.loads(verified.stdout)["faults"] == [], verified.stdout
    assert json.loads(verified.stdout)["changed_after"] == []
    moved = toml.loads(site.read_text(encoding="utf-8"))
    moved["paths"]["latents"] = str(tmp_path / "other disk")
    (tmp_path / "images-latents").rename(tmp_path / "other disk")
    lost = json.loads(kwrap("verify", str(run.folder), "--json").stdout)["changed_after"]
    assert len(lost) == 1 and "no latents are cached there" in lost[0]
    (tmp_path / "moved.toml").write_text(toml.dumps(moved), encoding="utf-8")
    at = ("--site", str(tmp_path / "moved.toml"))
    found = json.loads(kwrap("verify", str(run.folder), "--deep", "4", "--json", *at).stdout)
    assert found["changed_after"] == []
    assert any("encoded again, bit for bit the same" in str(check) for check in found["checks"])
    extended = kwrap("extend", str(run.folder), "--steps", "1", *at)
    assert extended.returncode == 0, extended.stderr
    assert f"latents: {tmp_path / 'other disk'}" in extended.stderr


@pytest.mark.slow
def test_a_damaged_shard_is_found_before_it_is_trained_and_made_again(site: Path) -> None:
    made = cache(site, *MOMENTS)
    before, [shard, *_] = hashes(made), sorted(Path(made["folder"]).glob("*.safetensors"))
    flip_byte(shard, shard.stat().st_size // 2)
    refused = kwrap(*train_arguments(site, "r", *MOMENTS))
    assert refused.returncode == 1
    assert f"{shard}: damaged" in refused.stderr
    assert "Make it again: kwrap cache" in refused.stderr and "--check" in refused.stderr
    assert not (site.parent / "runs" / "r").exists()
    again = cache(site, *MOMENTS)
    assert again["damaged"] == [shard.stem]
    assert 0 < again["images_encoded"] < 7
    assert hashes(again) == before


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["moments", "sample"])
def test_two_commands_at_once_make_each_shard_once(site: Path, tmp_path: Path, keep: str) -> None:
    words = cache_arguments(site, "cache.latents=true", f"cache.keep={keep}")
    both = [
        subprocess.Popen(python_command("-m", "kohaku_wrap", *words), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    documents = [json.loads(each.communicate()[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    folder = Path(documents[0]["folder"])
    parents = {json.loads(path.read_text())["images"] for path in folder.glob("0*.json")}
    assert sum(parents) <= 7
    names = {path.name.partition(".")[0] for path in folder.iterdir()} - {"index", "index-copy", "rule"}
    assert names == set(hashes(documents[0]))
    first = hashes(documents[0])
    shutil.rmtree(folder)
    assert hashes(cache(site, "cache.latents=true", f"cache.keep={keep}")) == first


@pytest.mark.slow
def test_a_new_image_is_added_and_no_shard_is_made_again(site: Path, world: World) -> None:
    from engine_world import SIZES, write_images

    made = cache(site, *MOMENTS)
    before = hashes(made)
    write_images(site.parent / "images", (*SIZES, (120, 70)))
    again = cache(site, *MOMENTS)
    assert again["images_encoded"] == 1
    assert hashes(again).items() > before.items()


@pytest.mark.slow
def test_images_that_another_command_added_meanwhile_are_left_where_they_are(site: Path, tmp_path: Path) -> None:
    """Of another template, or of the same one with fewer images; a shard that is being made elsewhere stays, too."""
    from engine_world import SIZES, write_images

    write_images(tmp_path / "other", SIZES[:2])
    chosen = [word for word in cache_arguments(site, *MOMENTS) if "=" in word]
    loaded = load_site(site)
    [cache_of_all] = open_caches(resolve_template("demo", loaded, chosen), loaded)
    assert len(cache_of_all.shards) == 2
    other = toml.loads(site.read_text(encoding="utf-8"))
    other["paths"] |= {"images": str(tmp_path / "other"), "latents": str(loaded.paths.latents)}
    (tmp_path / "other.toml").write_text(toml.dumps(other), encoding="utf-8")
    made = cache(tmp_path / "other.toml", *MOMENTS)
    assert made["images_encoded"] == 2
    half = Path(made["folder"]) / ".000001-64x64.safetensors.999999999.part"
    half.write_bytes(b"of a process in another container")
    assert make_shards(cache_of_all, lambda done, total: None) == 5
    assert require_all(cache_of_all)
    assert half.exists()
