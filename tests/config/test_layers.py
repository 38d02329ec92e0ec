"""Layers: who wins, who is named, how `--set` is typed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import program, run_program
from kohaku_wrap.config.layers import load_layers, resolve_template
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.config.templates import UnknownTemplate
from kohaku_wrap.config.trainer_arguments import escape_tags, render_literals
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.errors import ProblemsFound

MakeSite = Callable[..., Site]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win_and_are_named(tmp_path: Path, make_site: MakeSite) -> None:
    write(tmp_path / "first.toml", "[a]\nseed = 1\nunet_lr = 1e-3\nnoise_offset = 0.1\n")
    write(tmp_path / "second.toml", "[a]\nunet_lr = 2e-3\n")
    own = write(tmp_path / "own.toml", 'extends = ["first", "second"]\n[b]\nmin_snr_gamma = 3\nmax_grad_norm = 2\n')
    site = make_site(trainer="min_snr_gamma = 4\nlog_with = 'tensorboard'")
    effective, problems = load_layers(own, site, ["max_grad_norm=0.5"])
    assert problems == []
    assert effective.get("seed") == 1
    assert effective.origin("seed") == f"base {tmp_path / 'first.toml'}"
    assert effective.get("unet_lr") == 2e-3
    assert effective.origin("unet_lr") == f"base {tmp_path / 'second.toml'}"
    assert effective.get("min_snr_gamma") == 4.0
    assert effective.origin("min_snr_gamma") == f"site {site.path}"
    assert (effective.get("max_grad_norm"), effective.origin("max_grad_norm")) == (0.5, "--set")
    assert (effective.get("huber_c"), effective.origin("huber_c")) == (0.1, "default")
    assert effective.values["pretrained_model_name_or_path"] == str(site.paths.base_model)


def test_a_dataset_file_has_options_over_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.toml", "[dataset_options]\nkeep_tokens = 2\n")
    assert load_dataset("mine.toml").selection.strata
    own = 'extends = "sdxl-lokr"\n[kwrap]\ndataset = "mine.toml"\n[dataset_options]\nkeep_tokens = 1\n'
    effective, problems = load_layers(write(tmp_path / "own.toml", own))
    assert not problems
    assert (effective.get("dataset_options.keep_tokens"), effective.origin("dataset_options.keep_tokens")) == (
        2,
        "dataset mine.toml",
    )
    write(tmp_path / "mine.toml", "dataset_options = 5\n")
    with pytest.raises(ProblemsFound, match="must be a table"):
        load_dataset("mine.toml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("unet_lr=1e-4", "unet_lr", 1e-4),
        ("training.unet_lr=1", "unet_lr", 1.0),
        ("seed=7", "seed", 7),
        ("sdpa=false", "sdpa", False),
        ("text_encoder_lr=1e-5", "text_encoder_lr", [1e-5]),
        ("training_comment=12", "training_comment", "12"),
        ('training_comment="a b"', "training_comment", "a b"),
        ("resolution=512", "dataset_options.resolution", 512),
        ("resolution=512,768", "dataset_options.resolution", [512, 768]),
        ('resolution="512,768"', "dataset_options.resolution", [512, 768]),
        ("dataset_options.resolution=[512, 768]", "dataset_options.resolution", [512, 768]),
        ("caption_tag_dropout_rate=0", "dataset_options.caption_tag_dropout_rate", 0),
        ("network_args.factor=4", "network_args.factor", 4),
        ("optimizer_args.betas=[0.9, 0.99]", "optimizer_args.betas", [0.9, 0.99]),
        ("optimizer_args.betas=0.9,0.99", "optimizer_args.betas", [0.9, 0.99]),
        ("effective_batch=64", "effective_batch", 64),
        ("batch.effective_batch=64", "effective_batch", 64),
        ("states.keep=5", "states.keep", 5),
        ("lr_warmup_steps=0.05", "lr_warmup_steps", 0.05),
        ("preset=small-24gib", "preset", "small-24gib"),
    ],
)
def test_set_is_typed_as_the_option_is(text: str, key: str, value: object) -> None:
    effective = resolve_template("epsilon", None, [text])
    assert effective.get(key) == value
    assert type(effective.get(key)) is type(value)
    assert effective.origin(key) == "--set"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("learning_rat=1", "learning_rat", "did you mean learning_rate"),
        ("unet_lr=fast", "unet_lr", '"fast" is text, not a number'),
        ("mixed_precision=fp61", "mixed_precision", "did you mean fp16"),
        ("unet_lr", "unet_lr", "is not KEY=VALUE"),
        ("train_batch_size=4", "train_batch_size", "batch_per_gpu"),
        ("output_name=x", "output_name", "the run's name"),
        ("preset=nothing", "preset", "no preset is called nothing"),
        ("seed=2024-11-26", "seed", '"2024-11-26" is a date or a time, not a whole number'),
        ("seed=7\nunet_lr = 1", "seed", "is text, not a whole number"),
        ("optimizer_args.betas=[0.9, 2024-11-26]", "optimizer_args.betas", "cannot be written as the trainer reads it"),
    ],
)
def test_faults_of_set_name_it(text: str, where: str, what: str) -> None:
    with pytest.raises(ProblemsFound) as found:
        resolve_template("epsilon", None, [text])
    [problem] = found.value.problems
    assert problem.where == where
    assert what in problem.what
    assert problem.layer == "--set"


def test_a_set_preset_is_loaded() -> None:
    assert resolve_template("epsilon", None, ["preset=small-24gib"]).preset["enable_conv"] is False


def test_set_steps_win_over_the_templates_epochs() -> None:
    effective = resolve_template("epsilon", None, ["max_train_steps=1700"])
    assert not effective.is_set("max_train_epochs")
    with pytest.raises(ProblemsFound, match="both given"):
        resolve_template("epsilon", None, ["max_train_steps=1700", "max_train_epochs=2"])


def test_a_templates_steps_win_over_its_bases_epochs(tmp_path: Path) -> None:
    base = write(tmp_path / "base.toml", 'extends = "epsilon"\nmax_train_steps = 17000\n')
    effective = resolve_template(base)
    assert effective.get("max_train_steps") == 17000 and not effective.is_set("max_train_epochs")
    effective = resolve_template(write(tmp_path / "mine.toml", f'extends = "{base.name}"\nmax_train_epochs = 3\n'))
    assert effective.get("max_train_epochs") == 3 and not effective.is_set("max_train_steps")


def test_a_circle_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one.toml", 'extends = "two"\n')
    write(tmp_path / "two.toml", 'extends = "one"\n')
    with pytest.raises(ProblemsFound, match="one → two → one"):
        load_layers(tmp_path / "one.toml")


def test_a_template_reads_only_files_below_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    outside = write(tmp_path / "outside.toml", 'extends = "demo"\n[dataset_options]\nflip_aug = true\n')
    (tmp_path / "theirs" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in (str(outside), "../outside.toml", "deep/../../outside.toml", "~/outside.toml", "outside.toml"):
        for mine in ("theirs/mine.toml", str(tmp_path / "theirs" / "mine.toml")):
            write(Path(mine), f'extends = "{base}"\n')
            with pytest.raises(UnknownTemplate, match=r"outside of|no such template"):
                load_layers(Path(mine))
    with pytest.raises(ProblemsFound, match="climbs out"):
        resolve_template(write(Path("theirs/mine.toml"), '[kwrap]\ndataset = "deep/../../outside.toml"\n'))
    for base in ("deep/base.toml", "./deep/../deep/base.toml"):
        write(Path("theirs/deep/base.toml"), 'extends = "demo"\nmax_train_steps = 3\n')
        assert resolve_template(write(Path("theirs/mine.toml"), f'extends = "{base}"\n')).get("max_train_steps") == 3


def test_unknown_template_suggests() -> None:
    with pytest.raises(UnknownTemplate, match="no template is called epsilom; did you mean epsilon"):
        load_layers("epsilom")


def test_all_layers_faults_at_once(tmp_path: Path, make_site: MakeSite) -> None:
    own = write(
        tmp_path / "own.toml", 'extends = "epsilon"\n[a]\nunet_lrr = 1\n[dataset_options]\nbucket_reso_steps = 40\n'
    )
    site = make_site(trainer="wrong_one = 1")
    with pytest.raises(ProblemsFound) as found:
        resolve_template(own, site, ["other_one=1"])
    layers = {problem.where: problem.layer for problem in found.value.problems}
    assert layers == {
        "a.unet_lrr": f"template {own}",
        "trainer.wrong_one": f"site {site.path}",
        "other_one": "--set",
        "dataset_options.bucket_reso_steps": f"template {own}",
    }


def test_site_paths_resolve_against_its_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = write(tmp_path / "here" / "site.toml", '[paths]\nimages = "../pictures"\nruns = "/r"\n[machine]\ngpus = 0\n')
    site = load_site(path)
    assert site.paths.images == tmp_path / "here" / ".." / "pictures"
    assert site.paths.runs == Path("/r")
    assert site.paths.db == tmp_path / "here" / "danbooru.db"
    assert (site.machine.engine, site.machine.processes) == ("sd-scripts", 1)


def test_paths_of_trainer_options_begin_where_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer reads them in the run's folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "start.safetensors").write_bytes(b"")
    site = tmp_path / "site.toml"
    site.write_text(
        '[trainer]\nnetwork_weights = "start.safetensors"\nbase_weights = ["a.safetensors", "~/b"]\n'
        'metadata_thumbnail = "data:image/png;base64,AA=="\n'
    )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/someone")
    effective = load_layers("demo", load_site(site), ["base_weights=['c.safetensors', '/d']"])[0]
    assert effective.get("network_weights") == str(tmp_path / "start.safetensors")
    assert effective.get("metadata_thumbnail") == "data:image/png;base64,AA=="
    assert effective.get("base_weights") == [str(tmp_path / "here" / "c.safetensors"), "/d"]
    assert load_layers("demo", load_site(site))[0].get("base_weights") == [
        str(tmp_path / "a.safetensors"),
        "/home/someone/b",
    ]


@pytest.mark.parametrize("checked", ["demo", "site.toml"])
def test_a_missing_network_of_the_site_is_shown(tmp_path: Path, checked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text('[machine]\ngpus = 0\n[trainer]\nnetwork_weights = "w/gone.safetensors"\n')
    result = CliRunner().invoke(program, ["template", "check", checked, "--site", "site.toml", "--no-modules"])
    assert result.exit_code == 1
    assert f"network_weights  {tmp_path}/w/gone.safetensors: no such file  (site " in result.stdout


def test_every_fault_of_a_site_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "site.toml",
        '[path]\n[paths]\nimage = "x"\nruns = 3\n'
        '[machine]\ngpu = 1\ngpus = "two"\nbatch_per_gpu = 0\nengine = "kohya"\n',
    )
    with pytest.raises(ProblemsFound) as found:
        load_site(path)
    faults = {problem.where: problem.what for problem in found.value.problems}
    assert set(faults) == {
        "path",
        "paths.image",
        "paths.runs",
        "machine.gpu",
        "machine.gpus",
        "machine.batch_per_gpu",
        "machine.engine",
    }
    assert "did you mean images?" in faults["paths.image"]
    assert "did you mean gpus?" in faults["machine.gpu"]


def test_no_persistent_workers_without_workers(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site("gpus = 4\nbatch_per_gpu = 4\nworkers = 0"))
    assert effective.get("max_data_loader_n_workers") == 0
    assert effective.get("persistent_data_loader_workers") is False


def test_arguments_may_be_written_as_sd_scripts_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "epsilon"\n[optimizer]\noptimizer_type = "AdamW"\n'
        'optimizer_args = ["weight_decay=0.1", "betas=0.9,0.95", "eps=(1e-6)", "amsgrad=False"]\n'
        'network_args = ["factor=4", "algo=lokr"]\n'
    )
    effective, problems = load_layers(path)
    assert not problems
    arguments = effective.subtable("optimizer_args")
    assert arguments == {"weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-6, "amsgrad": False}
    assert "amsgrad=False" in render_literals(arguments)
    assert effective.get("network_args.algo") == "lokr"


def test_a_prompt_is_one_line() -> None:
    assert escape_tags("1girl,\n  long hair\n(cosplay)") == r"1girl, long hair \(cosplay\)"


def test_one_bad_file_of_a_folder_hides_no_other(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "templates"
    folder.mkdir()
    (folder / "broken.toml").write_text("title = ")
    (folder / "good.toml").write_text('title = "Mine"\nextends = "demo"\n')
    (folder / "loop.toml").symlink_to("loop.toml")
    (folder / "folder.toml").mkdir()
    os.mkfifo(folder / "pipe.toml")
    assert run_program(["template", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "broken" in shown and "cannot be read: Invalid value (at end of document)" in shown and "Mine" in shown
    assert "loop" not in shown and "pipe" not in shown
    assert run_program(["template", "check", str(folder), "--no-modules", "--json"]) == 1
    assert {fault["where"] for fault in json.loads(capsys.readouterr().out)["problems"]} == {
        "broken.toml", "folder.toml", "loop.toml", "pipe.toml",
    }  # fmt: skip
