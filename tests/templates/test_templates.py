"""Shipped templates have no fault; a folder of broken ones has every planted one, by layer and key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kohaku_wrap.cli.template import command
from kohaku_wrap.config.check_files import check_files
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.merging.recipes import find_recipe
from kohaku_wrap.trainer.options import load_recorded_table

BROKEN = Path(__file__).with_name("broken")
SHIPPED = [
    path for path in sorted(shipped_folder("templates").rglob("*.toml")) if path.parent.name not in ("merges", "styles")
]


def broken_files() -> list[Path]:
    return sorted(BROKEN.rglob("*.toml"))


def planted_faults(path: Path) -> list[str]:
    return re.findall(r"^# fault: (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_there_are_templates_to_check() -> None:
    named = {"sdxl-lokr", "sdxl-vpred", "epsilon", "delta", "gamma-base7", "own-images", "demo"}
    assert named <= {path.stem for path in SHIPPED}
    assert len(broken_files()) > 30


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_templates_have_no_fault(path: Path) -> None:
    assert check_files([str(path)], None, load_recorded_table()) == [(path, [])]


@pytest.mark.parametrize("path", broken_files(), ids=lambda path: path.stem)
def test_every_planted_fault_is_found_and_no_other(path: Path) -> None:
    [(checked, problems)] = check_files([str(path)], None, load_recorded_table())
    assert checked == path
    planted = planted_faults(path)
    assert planted
    assert set(planted) == {problem.where for problem in problems}
    for problem in problems:
        assert ".toml" in problem.layer, problem


def test_a_fault_names_the_layer_that_brought_it_in() -> None:
    [(_, problems)] = check_files([str(BROKEN / "two_attentions.toml")], None, load_recorded_table())
    assert problems[0].layer.startswith("base ")
    assert problems[0].layer.endswith("base sdxl-lokr.toml")
    assert "broken/two_attentions.toml)" in problems[0].what


def test_check_command_prints_all_faults_and_exits_1() -> None:
    result = CliRunner().invoke(command, ["check", str(BROKEN), "--no-modules"])
    assert result.exit_code == 1
    for path in broken_files():
        for planted in planted_faults(path):
            assert planted in result.output
    assert "unknown option; did you mean learning_rate?" in result.output
    assert '"bf17" is not one of no, fp16, bf16' in result.output


def test_check_command_as_json() -> None:
    result = CliRunner().invoke(command, ["check", str(BROKEN / "unknown_option.toml"), "--no-modules", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert {problem["where"] for problem in document["problems"]} == {"training.learning_rat", "training.noise_ofset"}


def test_check_command_on_the_shipped_folder() -> None:
    result = CliRunner().invoke(command, ["check", str(shipped_folder("templates"))])
    assert result.exit_code == 0, result.output
    assert "no problems" in result.output


@pytest.mark.parametrize(
    ("checked", "following"),
    [
        ("epsilon", "kwrap plan epsilon --site site.toml"),
        ("mine", "kwrap plan mine/own.toml --site site.toml"),
        ("world.toml", "kwrap plan TEMPLATE --site world.toml"),
        ("presets/near.toml", "kwrap plan TEMPLATE --site site.toml"),
    ],
)
def test_what_follows_a_check_is_the_plan_of_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: str, following: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "mine/own.toml": 'extends = "epsilon"\n', "world.toml": "[machine]\ngpus = 0\n", "presets/near.toml": "",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    result = CliRunner().invoke(command, ["check", checked, "--no-modules"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"Next: {following}"), result.output


def test_an_empty_folder_is_no_success(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["check", str(tmp_path)])
    assert result.exit_code != 0


def test_copy_lands_in_the_users_folder_and_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KWRAP_HOME", str(tmp_path))
    assert CliRunner().invoke(command, ["cp", "epsilon", "mine"]).exit_code == 0
    copied = tmp_path / "templates" / "mine.toml"
    copied.write_text(copied.read_text() + "\n[more]\nnetwork_dropout = 0.1\n")
    result = CliRunner().invoke(command, ["show", "mine", "--json"])
    document = json.loads(result.stdout)
    assert document["path"] == str(copied)
    assert document["values"]["network_dropout"] == 0.1
    assert document["values"]["unet_lr"] == 2e-5
    listed = json.loads(CliRunner().invoke(command, ["ls", "--json"]).stdout)["templates"]
    assert [each["origin"] for each in listed if each["name"] == "mine"] == ["yours"]
    again = CliRunner().invoke(command, ["cp", "epsilon", "mine"])
    assert again.exit_code != 0


def test_a_copy_that_loses_what_lies_beside_it_is_warned_of(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "presets").mkdir(parents=True)
    (folder / "presets" / "near.toml").write_text("")
    (folder / "base.toml").write_text('extends = "epsilon"\n')
    (folder / "t.toml").write_text('extends = ["./base.toml", "demo"]\npreset = "near"\n')
    moved = CliRunner().invoke(command, ["cp", str(folder / "t.toml"), str(tmp_path / "mine.toml")])
    assert moved.exit_code == 0
    assert [line.split()[4] for line in moved.stderr.splitlines()] == ["./base.toml,", "near,"]
    beside = CliRunner().invoke(command, ["cp", str(folder / "t.toml"), str(folder / "mine.toml")])
    assert (beside.exit_code, beside.stderr) == (0, "")


def test_a_preset_within_the_template_is_not_missed_by_its_copy(tmp_path: Path) -> None:
    source = tmp_path / "t.toml"
    source.write_text('extends = "sdxl-lokr"\n[preset]\nunet_target_module = ["Attention"]\n')
    copied = CliRunner().invoke(command, ["cp", str(source), str(tmp_path / "there" / "t.toml")])
    assert copied.exit_code == 0 and copied.stderr == ""


def test_presets_and_merge_recipes_are_copied_by_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(command, ["cp", "small-24gib", "tiny"]).exit_code == 0
    assert (home / "templates" / "presets" / "tiny.toml").is_file()
    Path("mine.toml").write_text('extends = "epsilon"\npreset = "tiny"\n')
    assert CliRunner().invoke(command, ["check", "mine.toml", "--no-modules"]).exit_code == 0
    assert CliRunner().invoke(command, ["cp", "small-24gib", "."]).exit_code == 0
    assert Path("presets", "small-24gib.toml").is_file()
    copied = CliRunner().invoke(command, ["cp", "gamma-rev1", "recipe"])
    assert "kwrap merge recipe.toml --dry-run" in copied.stdout
    assert find_recipe("recipe.toml") == find_recipe("gamma-rev1")
    unknown = CliRunner().invoke(command, ["cp", "gamma-rev", "x.toml"])
    assert "did you mean gamma-rev1?" in str(unknown.exception)


def test_users_own_epsilon_may_extend_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KWRAP_HOME", str(tmp_path))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "epsilon.toml").write_text('extends = "epsilon"\n[more]\nseed = 5\n')
    document = json.loads(CliRunner().invoke(command, ["show", "epsilon", "--json"]).stdout)
    assert document["values"]["seed"] == 5
    assert document["values"]["effective_batch"] == 256
    assert document["origins"]["effective_batch"].endswith("base epsilon.toml")


def test_diff_shows_what_differs_in_effect() -> None:
    document = json.loads(CliRunner().invoke(command, ["diff", "epsilon", "delta", "--json"]).stdout)
    differences = {row["key"]: (row["first"], row["second"]) for row in document["differences"]}
    assert differences["unet_lr"] == (2e-5, 4e-5)
    assert differences["full_fp16"] == (False, True)
    assert differences["dataset_options.caption_tag_dropout_rate"] == (0.15, 0.1)
    assert "network_dim" not in differences


def test_diff_refuses_a_faulty_template(tmp_path: Path) -> None:
    (tmp_path / "faulty.toml").write_text('extends = "epsilon"\n[rates]\nunet_lr = "much"\nunet_rl = 1.0\n')
    result = CliRunner().invoke(command, ["diff", str(tmp_path / "faulty.toml"), "epsilon"])
    assert isinstance(result.exception, ProblemsFound) and len(result.exception.problems) == 2


def test_an_unknown_preset_is_answered_with_those_that_exist() -> None:
    result = CliRunner().invoke(command, ["show", "epsilon", "--set", "preset=nothing"])
    assert isinstance(result.exception, ProblemsFound)
    assert result.exception.problems[0].what == "no preset is called nothing; there are kohaku-lokr, small-24gib"
    result = CliRunner().invoke(command, ["show", "epsilon", "--set", "preset=kohaku-lora"])
    assert isinstance(result.exception, ProblemsFound)
    assert result.exception.problems[0].what.endswith("did you mean kohaku-lokr?")


def test_show_why_names_layer_and_file() -> None:
    result = CliRunner().invoke(command, ["show", "demo", "--why"])
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    table = [line for line in lines.values() if line.endswith(".toml")]
    assert table and max(map(len, table)) <= 80
    assert "decide files, logs or speed only: dataset_options.cache_info" in result.output
    assert "sdpa (chooses kernels: may change only last bits)" in result.output
    assert lines["unet_lr"].endswith("template demo.toml")
    assert lines["min_snr_gamma"].endswith("base epsilon.toml")
    assert lines["network_dim"].endswith("base sdxl-lokr.toml")


@pytest.mark.torch
def test_an_optimizer_of_ones_own_is_asked_for_its_signature(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'extends = "epsilon"\n[optimizer]\noptimizer_type = "torch.optim.NAdam"\n'
        "[optimizer_args]\nmomentum_decay = 0.004\nmomentum_decai = 1\n"
    )
    [(_, problems)] = check_files([str(own)], None, load_recorded_table())
    assert [problem.where for problem in problems] == ["optimizer_args.momentum_decai"]
    assert "did you mean momentum_decay?" in problems[0].what


def test_a_site_beside_templates_is_checked_as_a_site(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[paths]\nimages = "images"\n[machine]\ngpus = 2\n[trainer]\nno_half_vae = true\n')
    assert check_files([str(tmp_path)], None, load_recorded_table()) == [(site, [])]
    site.write_text('[paths]\nimage = "images"\n[machine]\ngpus = "2"\n')
    [(_, problems)] = check_files([str(site)], None, load_recorded_table())
    assert [problem.where for problem in problems] == ["paths.image", "machine.gpus"]
    assert {problem.layer for problem in problems} == {f"site {site}"}
    site.write_text("[machine]\ngpus = 2\n[trainer]\nlearning_rat = 1\n")
    [(_, [problem])] = check_files([str(site)], None, load_recorded_table())
    assert problem.where == "trainer.learning_rat"


def test_the_presets_factors_stand_beside_factor_and_what_it_still_reaches() -> None:
    shown = CliRunner().invoke(command, ["show", "epsilon", "--why"]).stdout
    assert "4 for CrossAttention, by the preset" in shown
    reached = next(line for line in shown.splitlines() if "still reaches" in line)
    assert "ResnetBlock2D" in reached
    assert "CLIPAttention" not in reached, "it has a factor of its own"
    document = json.loads(CliRunner().invoke(command, ["show", "epsilon", "--json"]).stdout)
    assert document["preset_factors"]["FeedForward"] == 2
    assert "Upsample2D" in document["factor_reaches"]
    assert not set(document["preset_factors"]) & set(document["factor_reaches"])
