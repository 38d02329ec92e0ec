"""What stands after `Next:` can be pasted: it runs as it is, in folders with spaces and with the site's paths."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.errors import command_line


def follow(words: list[str]) -> list[str]:
    """Run a command; the words of its next command."""
    result = CliRunner().invoke(program, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    name, *following = shlex.split(line.removeprefix("Next: "))
    assert name == "kwrap"
    return following


def test_the_way_to_a_plan_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo", "my world", "--posts", "40"]
    verbs = []
    while words[0] != "train":
        if words[0] == "plan":
            words.append("--no-modules")
        verbs.append(words[0])
        words = follow(words)
    assert verbs == ["demo", "select", "extract", "caption", "plan"]
    assert words == ["train", "demo", "--site", "my world/site.toml", "--dry-run"]
    cached = ["demo", "--site", "my world/site.toml", "--set", "cache.latents=true"]
    assert follow(["plan", *cached, "--no-modules"]) == ["cache", *cached]
    assert follow(["cache", *cached, "--dry-run"]) == ["cache", *cached]
    dry = CliRunner().invoke(program, ["train", *cached, "--dry-run"], catch_exceptions=False)
    assert "32 of 32 images have no latents there. Make them first: kwrap cache" in dry.stderr


def test_posts_are_not_sent_into_a_folder_of_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = follow(["demo", "world", "--posts", "40"])
    Path("mine").mkdir()
    Image.new("RGB", (64, 64)).save("mine/a.png")
    words_after_import = follow(["import", "mine", "--out", "world/images"])
    assert words_after_import == ["template", "cp", "own-images", "mine.toml"]
    assert CliRunner().invoke(program, words_after_import).exit_code == 0
    again = follow(["import", "mine", "--out", "world/images"])  # A second copy would be refused.
    assert again == ["plan", "mine.toml", "--site", "world/site.toml"]
    assert follow(words)[-2:] == ["--out", "IMAGES"]


def test_a_plan_hands_its_overrides_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(["demo", "world", "--posts", "40"])
    at_site = ["demo", "--site", "world/site.toml"]
    words = follow(["plan", *at_site, "--images", "64", "--no-modules", "--set", "seed=7"])
    assert words == ["train", *at_site, "--set", "seed=7", "--dry-run"]
    given = ["--set", "seed=7", "--set", "states.keep=2", "--report", "--restarts", "5"]
    dry = CliRunner().invoke(program, ["train", *at_site, *given, "--dry-run"], catch_exceptions=False)
    assert dry.stderr.splitlines()[-1] == f"Next: {command_line('train', *at_site, *given)}"


def test_a_metadata_set_is_selected_from_as_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("posts.csv").write_text("number,tag_string,rating\n1,solo,g\n")
    Path("tags.csv").write_text("name,category\nsolo,0\n")
    Path("my set.toml").write_text('[metadata.columns]\nid = "number"\n')
    given = ["--dataset", "my set.toml", "--tags", "tags.csv"]
    words = follow(["inspect", "posts.csv", *given])
    assert words == ["select", "my set.toml", "--db", "posts.csv", "--out", "my set.parquet", "--tags", "tags.csv"]
    assert follow(words)[0] == "extract"


def test_a_copied_template_is_called_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(program, ["template", "cp", "epsilon", "mine.toml"]).exit_code == 0
    shown = ["template", "show", "mine.toml", "--why"]
    assert follow(["template", "show", "mine.toml"]) == shown
    assert follow(["template", "diff", "delta", "mine.toml"]) == shown


def test_a_command_line_is_quoted() -> None:
    assert command_line("resume", Path("my runs/a"), "--step", 4) == "kwrap resume 'my runs/a' --step 4"


def test_a_merge_with_networks_of_one_run_leads_to_its_publishing(tmp_path: Path) -> None:
    from kohaku_wrap.cli.merge import next_after

    networks = []
    for name in ("a", "b"):
        run = tmp_path / "runs" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "run.lock.toml").write_text("")
        networks.append(run / "checkpoints" / "n.safetensors")
    assert next_after(networks[:1], tmp_path / "out") == f"kwrap publish {tmp_path}/runs/a --out a-published"
    assert next_after(networks, tmp_path / "out") == f"kwrap inspect {tmp_path}/out"
    assert next_after([tmp_path / "n.safetensors"], tmp_path / "out") == f"kwrap inspect {tmp_path}/out"


def test_what_sample_lacks_is_asked_for_in_the_order_of_its_arguments() -> None:
    for words, lacking in (([], "no prompt is given"), (["--prompt", "x"], "no model is named")):
        result = CliRunner().invoke(program, ["sample", *words])
        assert str(result.exception).startswith(lacking)
