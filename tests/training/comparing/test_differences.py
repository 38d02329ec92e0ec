"""What changed between a run and its lock, without training: models, captions, packages, states."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml
from list_imports import COMPUTES_NOTHING
from plain_runs import HELPERS, write_captions

from kohaku_wrap.config.render import hash_named_files
from kohaku_wrap.errors import KwrapError, Problem, UsageError
from kohaku_wrap.trainer.installed import is_decisive, list_versions
from kohaku_wrap.training.comparing import differences
from kohaku_wrap.training.comparing.accepting import KEY_OF_FINGERPRINT, can_be_accepted, refuse_changes, refuse_unknown
from kohaku_wrap.training.comparing.differences import (
    check_captions,
    compare_dataset,
    compare_fingerprint,
    compare_lock,
    compare_models,
    compare_packages,
    list_changes,
    list_notes,
)
from kohaku_wrap.training.comparing.places import DifferentRun, read_run_file, read_trainer
from kohaku_wrap.training.comparing.site_places import settle_places
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import BadRunFolder
from kohaku_wrap.training.records.saving import fingerprint_of
from kohaku_wrap.training.records.states import write_state

NewRun = Callable[..., Run]


def with_table(run: Run, name: str, table: dict[str, str]) -> Run:
    """The run with one table more in its lock."""
    tables = {**run.lock.tables, name: table}
    run.lock_file.write_text(toml.dumps(tables))
    return Run(run.folder)


def keys(problems: Any) -> list[str]:
    return [problem.where for problem in problems]


def prove_compared(engine: str) -> None:
    """Each package that the engine imports is compared between attempts, or computes nothing."""
    program = HELPERS / "list_imports.py"
    done = subprocess.run([sys.executable, program, engine], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "lycoris-lora", "pyarrow", "einops"} <= imported
    assert {name for name in imported if not is_decisive(name)} == imported & COMPUTES_NOTHING


def test_packages_of_the_builtin_engine_are_compared() -> None:
    prove_compared("builtin")


@pytest.mark.sd_scripts
@pytest.mark.usefixtures("use_trainer")
def test_packages_of_the_real_trainer_are_compared() -> None:
    prove_compared("sd-scripts")


def test_an_untouched_run_has_no_changes(new_run: NewRun) -> None:
    run = new_run()
    assert list_changes(run) == []
    assert (
        len(list_notes(run, settle_places(run))) == 1 and "made by kwrap 0.1" in list_notes(run, settle_places(run))[0]
    )


def test_files_of_the_run_are_read_flat(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text("alone = 1\n[one]\na = 2\n[two]\nb = 3\n")
    assert read_trainer(path) == {"alone": 1, "a": 2, "b": 3}
    for text in ("a = ", "a = 1\na = 2"):
        path.write_text(text)
        with pytest.raises(DifferentRun, match=r"trainer\.toml"):
            read_run_file(path)
    with pytest.raises(DifferentRun):
        read_run_file(tmp_path / "none.toml")


def test_models_are_compared_with_the_locks_hashes(new_run: NewRun, tmp_path: Path) -> None:
    files = {}
    for name in ("base", "vae"):
        files[name] = tmp_path / f"{name}.safetensors"
        files[name].write_bytes(name.encode())
    trainer = {"pretrained_model_name_or_path": str(files["base"]), "vae": str(files["vae"])}
    hashes = {
        "base_model_sha256": hashlib.sha256(b"base").hexdigest(),
        "vae_sha256": hashlib.sha256(b"vae").hexdigest(),
    }
    run = new_run(inputs=hashes)
    assert list(compare_models(run, trainer)) == []
    assert list(compare_models(run, {})) == []
    files["vae"].write_bytes(b"vAe")
    (found,) = compare_models(run, trainer)
    now = hashlib.sha256(b"vAe").hexdigest()
    assert found.where == "vae" and f"was {hashes['vae_sha256'][:12]}…, is now {now[:12]}…" in found.what
    files["base"].unlink()
    assert keys(compare_models(run, trainer)) == ["base_model", "vae"]
    assert list(compare_models(new_run("other"), trainer)) == [], "what the lock has no hash of is not compared"


def test_named_files_are_compared_too(new_run: NewRun, tmp_path: Path) -> None:
    weights = tmp_path / "start.safetensors"
    weights.write_bytes(b"start")
    trainer = {"network_weights": str(weights)}
    locked = hash_named_files(trainer)
    run = new_run(inputs=locked)
    assert list(compare_models(run, trainer)) == []
    weights.write_bytes(b"other")
    (found,) = compare_models(run, trainer)
    was, now = locked["network_weights_sha256"], hash_named_files(trainer)["network_weights_sha256"]
    assert (found.where, found.what) == ("network_weights", f"the sha256 was {was[:12]}…, is now {now[:15]}…")
    weights.unlink()
    (found,) = compare_models(run, trainer)
    assert "is now none: not there" in found.what


def test_captions_are_compared_with_the_locks_digest(new_run: NewRun) -> None:
    run = new_run()
    images = run.folder.parent.parent / "images"
    assert list(compare_dataset(run, settle_places(run))) == []
    write_captions(images, 45, "0ther")
    (found,) = compare_dataset(run, settle_places(run))
    assert found.where == "dataset" and f"had the digest {run.lock.dataset_digest[:12]}…, now " in found.what
    (images / "captions.arrow").unlink()
    assert keys(compare_dataset(run, settle_places(run))) == ["images"]
    check_captions(run.lock.data, settle_places(run).images, run.lock.dataset_digest)  # nothing there to read
    without = new_run("without", inputs={"captions_digest": ""})
    (images / "captions.arrow").unlink()
    assert list(compare_dataset(without, settle_places(without))) == []


def test_captions_that_would_be_trained_are_read(new_run: NewRun) -> None:
    run, other = new_run(), new_run("other", run={"data": "sd-scripts"})
    check_captions(run.lock.data, settle_places(run).images, run.lock.dataset_digest)
    path = run.folder.parent.parent / "images" / "captions.arrow"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(KwrapError, match=r"captions\.arrow"):
        check_captions(run.lock.data, settle_places(run).images, run.lock.dataset_digest)
    # The trainer reads captions of its own.
    check_captions(other.lock.data, settle_places(other).images, other.lock.dataset_digest)


def test_a_lock_of_0_1_has_no_digest_and_one_of_today_must(new_run: NewRun) -> None:
    assert list(compare_lock(new_run())) == []
    assert keys(compare_lock(new_run("today", format=2))) == ["run.lock.toml"]
    assert keys(compare_lock(new_run("odd", format=2, digest="0" * 64))) == ["run.lock.toml"]
    hidden = new_run("hidden")
    for line in ("", "format = 1\n", "format = true\n"):
        text = hidden.lock_file.read_text(encoding="utf-8")
        hidden.lock_file.write_text(f'{line}digest = "0"\n{text}', encoding="utf-8")
        with pytest.raises(BadRunFolder, match="the line `format = 2` was changed or taken out"):
            _ = Run(hidden.folder).lock
        hidden.lock_file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("datasets = 3", "datasets is 3, not a list of tables"),
        ("datasets = [1]", r"datasets is \[1\], not a list of tables"),
        ("[[datasets]]\nsubsets = 5", "subsets is 5, not a list of tables"),
        ("[[datasets]]\n[datasets.subsets]\na = 1", r"subsets is \{'a': 1\}, not a list of tables"),
        ("general = 1", "general is 1, not a table"),
        ("[[datasets]]\n[[datasets.subsets]]\n[[datasets.subsets]]\nimage_dir = 5", "image_dir is 5, not a path"),
        ('[model]\npretrained_model_name_or_path = ["x"]', r"pretrained_\w+ is \['x'\], not a path"),
        ("[network]\nbase_weights = [1]", r"base_weights is \[1\], not a path"),
    ],
)
def test_files_of_a_run_of_another_shape_are_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "dataset.toml").write_text(text, encoding="utf-8")
    with pytest.raises(DifferentRun, match=rf"dataset\.toml +(datasets\S+)?{what}\nRestore the run's own files"):
        read_run_file(tmp_path / "dataset.toml")


def test_packages_that_can_change_bits_are_compared(new_run: NewRun) -> None:
    here = {"torch": version("torch"), "numpy": version("numpy"), "click": "0.0.1"}
    assert list(compare_packages(new_run("none"))) == []
    base = list_versions(())
    assert list(compare_packages(with_table(new_run("same"), "versions", base))) == []
    changed = with_table(new_run("changed"), "versions", {**base, "torch": "0.1", "click": "0.0.1"})
    (found,) = compare_packages(changed)
    assert (found.where, found.what) == ("versions", f"torch was 0.1, is now {here['torch']}")
    assert list_changes(changed) == [], "a run of kwrap 0.1 goes on as before"
    assert any("torch was 0.1" in note for note in list_notes(changed, settle_places(changed)))
    today = with_table(new_run("today", format=2), "versions", {**base, "torch": "0.1"})
    assert "versions" in keys(list_changes(today))
    own = new_run("own", values={"optimizer_type": "my_optimizer.Fast"})
    (found,) = compare_packages(with_table(own, "versions", {**base, "my_optimizer": "1"}))
    assert found.what == "my-optimizer was 1, is now not installed"


def test_a_state_of_the_run_fits_and_others_are_named(new_run: NewRun) -> None:
    run = new_run()
    made = fingerprint_of(run, 3, 1)
    assert list(compare_fingerprint(made, run)) == []
    assert list(compare_fingerprint(replace(made, epoch=7, position=1, micro_batch=2, accumulation=9), run)) == []
    others: dict[str, Any] = {
        "engine": "sd-scripts", "data": "sd-scripts", "seed": 1, "group": 8, "batch_size": 3, "batches": 7, "images": 9,
        "dataset_digest": "0", "trainer_commit": "abc",
    }  # fmt: skip
    for name, value in others.items():
        (found,) = compare_fingerprint(replace(made, **{name: value}), run)
        assert found.where == KEY_OF_FINGERPRINT[name]
        assert f"made with {value!r}" in found.what
        assert (" batches an optimizer step" in found.what) is (name == "group")
    (found,) = compare_fingerprint(replace(made, run_id="f" * 32), run)
    assert found.where == "other-run" and f"run {'f' * 12}…, this is of kwrap 0.1" in found.what


def test_ids_and_options_of_a_state(new_run: NewRun) -> None:
    run = new_run(run={"id": "a" * 32, "options_digest": "b" * 64}, format=2)
    made = fingerprint_of(run, 3, 1)
    assert list(compare_fingerprint(made, run)) == []
    (found,) = compare_fingerprint(replace(made, run_id=""), run)
    assert found.where == "other-run" and "a run of kwrap 0.1, which has no id, this is aaaaaaaaaaaa…" in found.what
    assert keys(compare_fingerprint(replace(made, options_digest="c" * 64), run)) == ["options"]
    assert list(compare_fingerprint(replace(made, options_digest=("B" * 64).lower()), run)) == []
    assert list(compare_fingerprint(replace(made, options_digest=""), run)) == [], "unknown is not another"


def test_a_state_of_an_attempt_whose_record_is_gone_is_noted(new_run: NewRun) -> None:
    run = new_run(run={"id": "a" * 32, "options_digest": "b" * 64}, format=2)

    def save(step: int, attempt: int, run_id: str) -> None:
        made_with = replace(fingerprint_of(run, step, 1), run_id=run_id)
        write_state(run.states, step, lambda folder: (folder / "n").touch(), made_with, attempt=attempt, scheduled=True)

    save(1, attempt=3, run_id=("A" * 32).lower())
    save(2, attempt=4, run_id="another run's")
    [note] = [each for each in list_notes(run, settle_places(run)) if "may count twice" in each]
    assert note == f"{run.attempts / '3'} is gone: what it trained may count twice for `kwrap verify`"


def test_what_is_accepted_is_not_refused() -> None:
    changes = [Problem("dataset", "one"), Problem("learning_rate", "two"), Problem("base_model", "three")]
    refuse_changes("r", [], [])
    refuse_changes("r", changes[:1], ["dataset"])
    with pytest.raises(DifferentRun) as refused:
        refuse_changes("r", changes, ["dataset"])
    assert keys(refused.value.problems) == ["learning_rate", "base_model"]
    assert "Undo the changes of learning_rate:" in refused.value.next_step
    assert "The rest can be accepted: --allow base_model" in refused.value.next_step
    with pytest.raises(DifferentRun) as refused:
        refuse_changes("r", changes[1:2], [])
    assert "can be accepted" not in refused.value.next_step
    of_today = "Each of its files stands as it was written in run.lock.toml, [files]."
    assert of_today in refused.value.next_step
    for lock_format, advice in ((1, "in run.lock.toml, [values] and [dataset]."), (2, of_today), (3, of_today)):
        with pytest.raises(DifferentRun) as refused:
            refuse_changes("r", changes[1:2], [], lock_format)
        assert advice in refused.value.next_step
        assert ("Its options stand as they were" in refused.value.next_step) is (lock_format == 1)
    with pytest.raises(DifferentRun) as refused:
        refuse_changes("r", [changes[0], changes[2], changes[0]], [])
    assert "accept them: --allow dataset --allow base_model" in refused.value.next_step


def test_only_what_takes_effect_can_be_accepted() -> None:
    assert all(map(can_be_accepted, ("dataset", "versions", "other-run", "logging_dir")))
    assert not any(
        map(can_be_accepted, ("learning_rate", "output_dir", "output_name", "max_data_loader_n_workers", "seed"))
    )


def test_allowed_words_must_stand_for_something(new_run: NewRun) -> None:
    run = new_run(dataset={"shuffle_caption": True})
    refuse_unknown(["bad-images", "nan-latents", "non-finite-loss"])
    refuse_unknown(["bad-images", "dataset", "logging_dir"], run)
    refuse_unknown([], run)
    with pytest.raises(UsageError, match="--allow seed"):
        refuse_unknown(["dataset", "seed"], run)
    for key in ("seed", "train_batch_size", "batch_size", "effective_batch", "options", "run.lock.toml", "preset.name"):
        with pytest.raises(UsageError, match=f"--allow {key}: cannot change within a run"):
            refuse_unknown([key], run)
    with pytest.raises(UsageError) as refused:
        refuse_unknown(["max_train_epochs"], new_run("long", values={"max_train_epochs": 2}))
    assert "kwrap extend" in refused.value.next_step and "--epochs 1" in refused.value.next_step
    with pytest.raises(UsageError) as refused:
        refuse_unknown(["seed"], run)
    assert "extend" not in refused.value.next_step and "--set seed=VALUE" in refused.value.next_step
    for key, advice in (
        ("network_args.factor", "kwrap train TEMPLATE --run NAME --set network_args.factor=VALUE"),
        ("shuffle_caption", "--set shuffle_caption=VALUE"),
        ("train_batch_size", "It follows from effective_batch and the site's gpus and batch_per_gpu. "),
        ("images", "Start a new run: kwrap train TEMPLATE --run NAME"),
        ("run.lock.toml", "Start a new run: kwrap train TEMPLATE --run NAME"),
        ("max_data_loader_n_workers", f"kwrap resume {run.folder} --workers 1"),
        ("gradient_accumulation_steps", f"kwrap resume {run.folder} --processes 1"),
    ):
        with pytest.raises(UsageError) as refused:
            refuse_unknown([key], run)
        assert advice in refused.value.next_step and ("--set" in advice) is ("--set" in refused.value.next_step)
    for key, near in (("datasett", "dataset"), ("bad-image", "bad-images")):
        with pytest.raises(UsageError, match=f"no such fault or option; did you mean {near}"):
            refuse_unknown([key], run)
    with pytest.raises(UsageError, match="no such fault or option"):
        refuse_unknown(["dataset"])


def test_sources_that_changed_are_noted_and_kept(new_run: NewRun, tmp_path: Path) -> None:
    template, site = tmp_path / "own.toml", tmp_path / "site.toml"
    template.write_text("a")
    made_on = "[machine]\ngpus = 0\n"
    site.write_text(made_on)
    hashes = {
        "site": str(site),
        "site_sha256": hashlib.sha256(made_on.encode()).hexdigest(),
        "template_0_sha256": hashlib.sha256(b"a").hexdigest(),
    }
    run = new_run(inputs=hashes, run={"template_files": [str(template)]})
    assert len(list_notes(run, settle_places(run))) == 1
    site.write_text(made_on + "workers = 3\n[trainer]\nunet_lr = 0.5\n")
    notes = list_notes(run, settle_places(run))
    assert f"{site} changed since the run was made" in notes
    assert any("taken from" in note and "workers: 3" in note for note in notes)
    assert any("not taken from" in note and "unet_lr = 0.5" in note for note in notes)
    template.unlink()
    template.with_name("site.toml").write_text(made_on)
    assert len(list_notes(run, settle_places(run))) == 1
    template.write_text("other")
    assert len(list_notes(run, settle_places(run))) == 2
    site.write_text("none")
    assert any("nothing is taken from this site" in note for note in list_notes(run, settle_places(run)))


def test_another_commit_of_the_trainer(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_table(new_run(run={"engine": "sd-scripts"}), "trainer", {"commit": "a" * 40})
    commits = SimpleNamespace(now="a" * 40)
    monkeypatch.setattr(differences, "find_trainer", lambda commit: Path("checkout"))
    monkeypatch.setattr(differences, "read_trainer_commit", lambda checkout: commits.now)
    monkeypatch.setattr(differences, "find_known", lambda checkout: object())
    assert list(differences.compare_trainer(run)) == []
    monkeypatch.setattr(differences, "find_known", lambda checkout: None)
    assert keys(differences.compare_trainer(run)) == ["trainer"]
    commits.now = "b" * 40
    (found,) = differences.compare_trainer(run)
    assert (found.where, found.what) == ("trainer_commit", "was aaaaaaa, is now bbbbbbb")
    monkeypatch.setattr(differences, "find_trainer", lambda commit: None)
    (found,) = differences.compare_trainer(run)
    assert "is now not installed" in found.what
    assert list(differences.compare_trainer(new_run("builtin"))) == []
