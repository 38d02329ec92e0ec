"""Ways to change a run between two attempts, its files, packages, states or data: refused, or applied and shown."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import toml
from engine_world import CAPTION, write_images
from kwrap_0_1 import make_older
from PIL import Image
from safetensors.numpy import load_file, save_file

from kohaku_wrap.config.run_files import digest_lock
from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.tokenizers import write_tokenizers
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.sampling.of_runs import models_of_run
from kohaku_wrap.training.comparing.places import DifferentRun, read_trainer
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import MANIFEST, read_manifest
from kohaku_wrap.training.records.saving import fingerprint_of
from kohaku_wrap.training.records.states import state_folder, write_state
from kohaku_wrap.training.starting.choose_state import NoSuchState
from kohaku_wrap.training.starting.create import create_run, plan_new_run
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.verifying.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEP = 3
TEMPLATE = """
extends = "demo"
[batch]
effective_batch = 4
[length]
max_train_steps = 5
[saving]
save_every_n_steps = 1
save_last_n_steps = 2
[states]
keep = 9
[precision]
save_precision = "float"
[captions]
max_token_length = 150
[loss]
min_snr_gamma = 5
noise_offset = 0.0357
[dataset_options]
resolution = [64, 64]
min_bucket_reso = 32
max_bucket_reso = 128
shuffle_caption = true
caption_tag_dropout_rate = 0.3
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A world with a finished run, and others beside it."""

    folder: Path
    """Images, base model, VAE, tokenizers, template, site and runs; the same place for every test."""

    @property
    def run(self) -> Run:
        """Read anew each time."""
        return Run((self.folder / "runs" / "first").resolve())

    def other(self, name: str) -> Run:
        return Run((self.folder / "runs" / name).resolve())


def kwrap(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def write_state_of(run: Run, like: Path) -> None:
    """A state of the run with the files of another run's."""

    def fill(folder: Path) -> None:
        for path in like.iterdir():
            if path.name != MANIFEST:
                shutil.copy(path, folder)

    write_state(run.states, STEP, fill, fingerprint_of(run, STEP, 1), attempt=1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The place of the world, and a copy of it as it was after the training."""
    folder = tmp_path_factory.mktemp("changed") / "world"
    write_images(folder / "images")
    write_base_model(folder / "base", seed=1)
    write_base_model(folder / "base-2", seed=2)
    for number in ("", "-2"):
        tensors = load_file(folder / f"base{number}" / "model.safetensors")
        parts = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
        save_file(parts, folder / f"vae{number}.safetensors")
    write_tokenizers(folder / "tokenizers", [CAPTION.format("one", "two")])
    (folder / "mine.toml").write_text(TEMPLATE, encoding="utf-8")
    paths = {name: name for name in ("images", "tokenizers", "runs")}
    paths |= {"base_model": "base/model.safetensors", "vae": "vae.safetensors"}
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    site = folder / "site.toml"
    site.write_text(toml.dumps({"paths": paths, "machine": machine}), encoding="utf-8")
    done = kwrap("train", folder / "mine.toml", "--site", site, "--run", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, settings in (("twin", ()), ("faster", ("unet_lr=1e-3",))):
        run = create_run(plan_new_run(str(folder / "mine.toml"), site, name, None, settings), ["kwrap", "train"])
        write_state_of(run, state_folder(folder / "runs" / "first" / "states", STEP))
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    return folder, copy


@pytest.fixture
def stage(kept: tuple[Path, Path]) -> Iterator[Stage]:
    """The world as it was."""
    folder, copy = kept
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    yield Stage(folder)


def edit(name: str, pattern: str, new: str) -> Callable[[Stage], None]:
    """Change one place of a file of the run, by a regular expression that must match."""

    def change(stage: Stage) -> None:
        path = stage.run.folder / name
        text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        assert count == 1, f"{pattern} is not in {name}"
        path.write_text(text, encoding="utf-8")

    return change


def line_out(name: str, option: str) -> Callable[[Stage], None]:
    return edit(name, rf"^{option} = .*\n", "")


def add(name: str, line: str) -> Callable[[Stage], None]:
    """A line at the end of a file, in its last table."""

    def change(stage: Stage) -> None:
        with (stage.run.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return change


def remove(name: str) -> Callable[[Stage], None]:
    return lambda stage: (stage.run.folder / name).unlink()


def put(source: str, target: str) -> Callable[[Stage], None]:
    """One file of the world over another."""

    def change(stage: Stage) -> None:
        (stage.folder / target).unlink()
        shutil.copy(stage.folder / source, stage.folder / target)

    return change


def caption_otherwise(stage: Stage) -> None:
    import engine_world

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_world, "CAPTION", engine_world.CAPTION.replace("hat", "cap"))
        write_images(stage.folder / "images")


def drop_the_last_image(stage: Stage) -> None:
    import engine_world

    write_images(stage.folder / "images", engine_world.SIZES[:-1])


def resize_an_image(stage: Stage) -> None:
    import engine_world

    write_images(stage.folder / "images", (*engine_world.SIZES[:-1], (170, 90)))


def repaint(stage: Stage) -> None:
    path = stage.folder / "images" / "0004" / "1004.png"
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, (9, 9, 200)).save(path)


def swap_states(stage: Stage) -> None:
    """cases/siege/state_swap: the state of the next step under the name of this one."""
    state = state_folder(stage.run.states, STEP)
    shutil.rmtree(state)
    shutil.copytree(state_folder(stage.run.states, STEP + 1), state)


def state_of(name: str) -> Callable[[Stage], None]:
    def change(stage: Stage) -> None:
        state = state_folder(stage.run.states, STEP)
        shutil.rmtree(state)
        shutil.copytree(state_folder(stage.other(name).states, STEP), state)

    return change


def replace_a_tokenizer(stage: Stage) -> None:
    shutil.rmtree(stage.folder / "tokenizers")
    write_tokenizers(stage.folder / "tokenizers", [CAPTION.format("seven", "eight") + ", umbrella, rain"])


def edit_the_lock(pattern: str, new: str) -> Callable[[Stage], None]:
    return edit("run.lock.toml", pattern, new)


REFUSED: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "min_snr_gamma taken out": ("min_snr_gamma", line_out("trainer.toml", "min_snr_gamma")),
    "noise_offset taken out": ("noise_offset", line_out("trainer.toml", "noise_offset")),
    "noise_offset changed": ("noise_offset", edit("trainer.toml", r"^noise_offset = .*", "noise_offset = 0.1")),
    "a rate changed": ("unet_lr", edit("trainer.toml", r"^unet_lr = .*", "unet_lr = 0.5")),
    "a rate as a whole number": ("max_grad_norm", add("trainer.toml", "max_grad_norm = 1")),
    "the optimizer": ("optimizer_type", edit("trainer.toml", r"^optimizer_type = .*", 'optimizer_type = "AdamW"')),
    "the length": ("max_train_steps", edit("trainer.toml", r"^max_train_steps = .*", "max_train_steps = 9")),
    "the seed": ("seed", edit("trainer.toml", r"^seed = .*", "seed = 1")),
    "the batch": ("train_batch_size", edit("trainer.toml", r"^train_batch_size = .*", "train_batch_size = 1")),
    "an option of its own section": ("ip_noise_gamma", add("trainer.toml", "[more]\nip_noise_gamma = 0.1")),
    "a later section with the same option": ("unet_lr", add("trainer.toml", "[zzz]\nunet_lr = 0.5")),
    "a new network argument": (
        "network_args.rank_dropout",
        edit("trainer.toml", r"^network_args = \[", 'network_args = [ "rank_dropout=0.5",'),
    ),
    "a network argument changed": ("network_args.factor", edit("trainer.toml", '"factor=[^"]*"', '"factor=4"')),
    "a network argument taken out": ("network_args.train_norm", edit("trainer.toml", '"train_norm=[^"]*", *', "")),
    "another preset": ("network_args.preset", edit("trainer.toml", '"preset=[^"]*"', '"preset=full"')),
    "an optimizer argument": ("optimizer_args.betas", edit("trainer.toml", '"betas=[^"]*"', '"betas=0.5,0.5"')),
    "a schedule argument": ("lr_scheduler_args.gamma", add("trainer.toml", 'lr_scheduler_args = [ "gamma=0.5",]')),
    "all optimizer arguments": ("optimizer_args.betas", line_out("trainer.toml", "optimizer_args")),
    "text that is no TOML": ("trainer.toml", add("trainer.toml", "= = =")),
    "output_dir": ("output_dir", edit("trainer.toml", r"^output_dir = .*", 'output_dir = "/nowhere"')),
    "output_name": ("output_name", edit("trainer.toml", r"^output_name = .*", 'output_name = "second"')),
    "shuffle_caption taken out": ("shuffle_caption", line_out("dataset.toml", "shuffle_caption")),
    "tag dropout taken out": ("caption_tag_dropout_rate", line_out("dataset.toml", "caption_tag_dropout_rate")),
    "the separator": (
        "keep_tokens_separator",
        edit("dataset.toml", r"^keep_tokens_sep.*", 'keep_tokens_separator = "#"'),
    ),
    "the resolution": ("resolution", edit("dataset.toml", r"^resolution = .*", "resolution = [ 96, 96,]")),
    "repeats": ("num_repeats", edit("dataset.toml", r"^num_repeats = .*", "num_repeats = 2")),
    "a second subset": (
        "datasets.0.subsets.1.image_dir",
        add("dataset.toml", '[[datasets.subsets]]\nimage_dir = "/elsewhere"'),
    ),
    "general options": ("flip_aug", edit("dataset.toml", r"\A", "[general]\nflip_aug = true\n\n")),
    "preset.toml changed": ("preset.", edit("preset.toml", r"^enable_conv = .*|^unet_target_module = \[.*", "")),
    "preset.toml added to": ("preset.lora_prefix", edit("preset.toml", r"\A", 'lora_prefix = "x"\n')),
    "preset.toml: a table by another name": (
        "preset.toml",
        edit("preset.toml", r"^\[module_algo_map\.FeedForward\]", '["module_algo_map.FeedForward"]'),
    ),
    "preset.toml gone": ("preset.toml", remove("preset.toml")),
    "accelerate.yaml: precision": (
        "accelerate.mixed_precision",
        edit("accelerate.yaml", "^mixed_precision: .*", 'mixed_precision: "fp16"'),
    ),
    "accelerate.yaml: processes": (
        "accelerate.num_processes",
        edit("accelerate.yaml", "^num_proc.*", "num_processes: 7"),
    ),
    "accelerate.yaml: a new key": ("accelerate.dynamo_backend", add("accelerate.yaml", "dynamo_backend: inductor")),
    "accelerate.yaml: no YAML": ("accelerate.yaml", add("accelerate.yaml", "\t: [")),
    "the lock's seed": ("run.lock.toml", edit_the_lock(r"^seed = \d+", "seed = 5")),
    "the lock's kept file": ("run.lock.toml", edit_the_lock(r"min_snr_gamma = 5", "min_snr_gamma = 6")),
    "an image fewer": ("images", drop_the_last_image),
    "an image of another shape": ("images", resize_an_image),
    "no captions": ("images", lambda stage: (stage.folder / "images" / "captions.arrow").unlink()),
    "a state of other options": ("options", state_of("faster")),
}
"""The key that names the change, and the change; none of these can be accepted."""

OFFERED: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "the base model": ("base_model", put("base-2/model.safetensors", "base/model.safetensors")),
    "another base model by its path": (
        "base_model",
        edit(
            "trainer.toml",
            r"^pretrained_model_name_or_path = \"(.*)/base/",
            r'pretrained_model_name_or_path = "\1/base-2/',
        ),
    ),
    "the VAE": ("vae", put("vae-2.safetensors", "vae.safetensors")),
    "no VAE of its own": ("vae", line_out("trainer.toml", "vae")),
    "a tokenizer": ("tokenizers", replace_a_tokenizer),
    "captions": ("dataset", caption_otherwise),
    "the pixels of an image": ("image_files", repaint),
    "an image file gone": ("image_files", lambda stage: (stage.folder / "images" / "0004" / "1004.png").unlink()),
    "how often it saves": (
        "save_every_n_steps",
        edit("trainer.toml", r"^save_every_n_steps = .*", "save_every_n_steps = 2"),
    ),
    "sample prompts": ("sample_prompts", add("trainer.toml", 'sample_prompts = "prompts.txt"')),
    "a state of a twin": ("other-run", state_of("twin")),
}
"""The key of `--allow`, and the change; each takes effect once accepted."""

TOLD: dict[str, tuple[str, Callable[[Stage], object]]] = {
    "the site": (
        "site.toml changed since the run was made",
        lambda stage: (stage.folder / "site.toml").write_text("[machine]\ngpus = 0\n"),
    ),
    "the template": (
        "mine.toml changed since the run was made",
        lambda stage: (stage.folder / "mine.toml").write_text("# other\n"),
    ),
    "loader workers": (
        "max_data_loader_n_workers was 0, is now 3; each attempt decides it",
        edit("trainer.toml", r"^max_data_loader_n_workers = .*", "max_data_loader_n_workers = 3"),
    ),
    "an attempt's record gone": (
        "is gone: what it trained may count twice for `kwrap verify`",
        lambda stage: shutil.rmtree(stage.run.attempts / "1"),
    ),
    "an attempt's file gone": (
        "attempt.json is gone: what it trained may count twice for `kwrap verify`",
        remove("attempts/1/attempt.json"),
    ),
    "an attempt's folder under another name": (
        "is gone: what it trained may count twice for `kwrap verify`",
        lambda stage: (stage.run.attempts / "1").rename(stage.run.attempts / "01"),
    ),
    "an attempt's processes": (
        "was changed: 2 processes, accumulation 2, from optimizer step 0 on; by its ledger it was 1 process",
        edit("attempts/1/attempt.json", '"processes": 1', '"processes": 2'),
    ),
    "an attempt's start": (
        "accumulation 2, from optimizer step 1 on; by its ledger it was 1 process, accumulation 2, from optimizer "
        "step 0 on",
        edit("attempts/1/attempt.json", '"start_optimizer_step": 0', '"start_optimizer_step": 1'),
    ),
    "the ledger gone": (
        "has no file of attempt 1: `kwrap verify` cannot prove what it trained",
        lambda stage: shutil.rmtree(stage.run.ledger),
    ),
    "accumulation": (
        "gradient_accumulation_steps was 2, is now 7; each attempt decides it",
        edit("trainer.toml", r"^gradient_accumulation_steps = .*", "gradient_accumulation_steps = 7"),
    ),
}
"""What is said, and the change; nothing of what is trained follows from these."""


def test_the_table_is_long_enough() -> None:
    """Versions, moved images, a swapped state and a state left behind have tests of their own below."""
    assert len(REFUSED) + len(OFFERED) + len(TOLD) + 4 >= 40


def test_an_untouched_run_is_resumed_without_a_word(stage: Stage) -> None:
    plan = plan_resume(stage.run, step=STEP)
    assert (plan.start_optimizer_step, plan.differences, plan.notes, plan.lineage) == (STEP, {}, (), None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_the_weights_is_refused_and_not_offered(stage: Stage, name: str) -> None:
    key, change = REFUSED[name]
    change(stage)
    with pytest.raises(DifferentRun) as refused:
        plan_resume(stage.run, step=STEP)
    named = [problem.where for problem in refused.value.problems]
    assert any(each == key or (key.endswith(".") and each.startswith(key)) for each in named), refused.value.message
    assert f"--allow {key}" not in refused.value.next_step
    assert "start a new run" in refused.value.next_step or key.endswith((".toml", ".yaml"))
    assert len(list_attempts(stage.run)) == 1, "nothing was begun"


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_would_have_no_effect_is_no_key(stage: Stage, name: str) -> None:
    key, change = REFUSED[name]
    change(stage)
    with pytest.raises((UsageError, DifferentRun)):
        plan_resume(stage.run, step=STEP, allow=[key])


@pytest.mark.parametrize("name", OFFERED)
def test_what_takes_effect_is_offered_and_recorded(stage: Stage, name: str) -> None:
    key, change = OFFERED[name]
    change(stage)
    with pytest.raises(DifferentRun) as refused:
        plan_resume(stage.run, step=STEP)
    assert [problem.where for problem in refused.value.problems] == [key], refused.value.message
    assert f"--allow {key}" in refused.value.next_step
    attempt, _ = begin_attempt(plan_resume(stage.run, step=STEP, allow=[key]))
    record = json.loads((attempt.folder / "attempt.json").read_text())
    assert list(record["accepted_differences"]) == [key]
    assert plan_resume(stage.run).allow == {key}, "accepted as it is, it holds for later attempts"


@pytest.mark.parametrize("name", TOLD)
def test_what_has_no_effect_is_told(stage: Stage, name: str) -> None:
    words, change = TOLD[name]
    change(stage)
    plan = plan_resume(stage.run, step=STEP)
    assert not plan.differences and any(words in note for note in plan.notes), plan.notes


@pytest.mark.parametrize("name", [name for name in TOLD if name.startswith("an attempt's")])
def test_verify_shows_that_an_attempt_s_record_is_another(stage: Stage, name: str) -> None:
    words, change = TOLD[name]
    change(stage)
    report = verify_run(stage.run)
    assert report.is_proved and any(words in each for each in report.changed_after), report.changed_after


def test_an_attempt_never_takes_the_number_of_one_in_the_ledger(stage: Stage) -> None:
    shutil.rmtree(stage.run.attempts)
    attempt, _ = begin_attempt(plan_resume(stage.run, step=STEP))
    assert attempt.number == 2


def test_a_state_under_the_name_of_another_step_is_not_taken(stage: Stage) -> None:
    swap_states(stage)
    with pytest.raises(KwrapError, match=f"it is the state of optimizer step {STEP + 1} under another name"):
        plan_resume(stage.run, step=STEP)


def test_a_state_of_a_line_left_behind_is_not_taken(stage: Stage) -> None:
    begin_attempt(plan_resume(stage.run, step=STEP - 1))
    away = next((stage.run.abandoned / "before-attempt-2" / "states").glob(f"*{STEP}"))
    away.rename(state_folder(stage.run.states, STEP))
    with pytest.raises(NoSuchState, match="written by attempt 1 on a line that was left behind at optimizer step 2"):
        plan_resume(stage.run, step=STEP)


def write_package(folder: Path, name: str, version: str) -> None:
    """What tells the version of a package, before the installed one on the import path."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_that_can_change_bits(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path, "click", "0.0.1")
    assert not plan_resume(stage.run, step=STEP).differences, "click computes nothing"
    lock = tomllib.loads(stage.run.lock_file.read_text())
    lock["machine"]["python"] = "3.9.1"
    stage.run.lock_file.write_text(toml_text(lock | {"digest": digest_lock(lock)}))
    with pytest.raises(DifferentRun, match=r"versions +Python was 3\.9, is now 3\.\d+") as older:
        plan_resume(stage.run, step=STEP)
    assert "--allow versions" in older.value.next_step
    write_package(tmp_path, "lycoris-lora", "0.0.1")
    with pytest.raises(DifferentRun, match=r"lycoris-lora was [\d.]+, is now 0\.0\.1") as refused:
        plan_resume(stage.run, step=STEP)
    assert "--allow versions" in refused.value.next_step
    begin_attempt(plan_resume(stage.run, step=STEP, allow=["versions"]))
    assert list(plan_resume(stage.run).differences) == ["versions"]
    write_package(tmp_path, "xformers", "9.9")
    with pytest.raises(DifferentRun, match=r"xformers was not installed, is now 9\.9"):
        plan_resume(stage.run)


def test_an_accepted_difference_that_became_another_is_asked_for_again(stage: Stage) -> None:
    OFFERED["the base model"][1](stage)
    begin_attempt(plan_resume(stage.run, step=STEP, allow=["base_model"]))
    tensors = load_file(stage.folder / "base" / "model.safetensors")
    tensors[min(tensors)] = tensors[min(tensors)] * 0
    (stage.folder / "base" / "model.safetensors").unlink()
    save_file(tensors, stage.folder / "base" / "model.safetensors")
    with pytest.raises(DifferentRun, match=r"model\.safetensors: the sha256 was"):
        plan_resume(stage.run)


def test_images_that_were_moved_are_the_same(stage: Stage) -> None:
    (stage.folder / "images").rename(stage.folder / "moved")
    edit("dataset.toml", r'^image_dir = "(.*)/images"', r'image_dir = "\1/moved"')(stage)
    plan = plan_resume(stage.run, step=STEP)
    assert not plan.differences and any("image_dir was" in note for note in plan.notes)


def test_a_run_that_was_moved_goes_on_at_its_new_place(stage: Stage) -> None:
    run = stage.run
    there = run.folder.with_name("elsewhere")
    run.folder.rename(there)
    plan = plan_resume(Run(there), step=STEP)
    assert not plan.differences and any(f"moved here from {run.folder}" in note for note in plan.notes)
    begin_attempt(plan)
    written = read_trainer(there / "trainer.toml")
    assert (written["output_dir"], written["output_name"]) == (str(there / "checkpoints"), "first")
    assert f"preset={there / 'preset.toml'}" in written["network_args"]
    assert not [note for note in plan_resume(Run(there), step=STEP).notes if "moved" in note]


def test_moved_images_are_proved_as_before(stage: Stage) -> None:
    (stage.folder / "images").rename(stage.folder / "moved")
    assert not verify_run(stage.run).order_checked
    edit("dataset.toml", r'^image_dir = "(.*)/images"', r'image_dir = "\1/moved"')(stage)
    report = verify_run(stage.run, deep_samples=2)
    assert report.is_proved and report.order_checked and report.deep_samples == 2


def test_other_captions_at_another_place_are_not_taken_for_the_run_s(stage: Stage) -> None:
    shutil.copytree(stage.folder / "images", stage.folder / "others")
    (stage.folder / "images").rename(stage.folder / "kept")
    caption_otherwise(stage)
    (stage.folder / "images").rename(stage.folder / "others-2")
    (stage.folder / "kept").rename(stage.folder / "images")
    edit("dataset.toml", r'^image_dir = "(.*)/images"', r'image_dir = "\1/others-2"')(stage)
    report = verify_run(stage.run)
    assert report.is_proved and report.order_checked, "the captions of the lock are still at their place"
    assert any(change.startswith("dataset: ") for change in report.changed_after)


def test_rows_in_another_order_are_changed_captions_and_no_fault_of_the_run(stage: Stage) -> None:
    """captions.arrow written anew by other software, which kept the digest in its metadata."""
    path = stage.folder / "images" / "captions.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table.take(list(range(len(table)))[::-1]))
    report = verify_run(stage.run, deep_samples=2)
    assert report.is_proved and not report.order_checked and not report.deep_samples, report.faults
    assert any("captions.arrow" in change for change in report.changed_after), report.changed_after


def test_a_run_of_kwrap_0_1_is_resumed_and_proved(stage: Stage) -> None:
    networks = read_networks(stage.run)
    old = make_older(stage.run)
    assert (old.lock.format, old.lock.run_id, old.lock.options_digest) == (1, "", "")
    report = verify_run(old)
    assert report.is_proved and not report.changed_after
    plan = plan_resume(old, step=STEP)
    assert not plan.differences and any("made by kwrap 0.1" in note for note in plan.notes)
    done = kwrap("resume", old.folder, "--step", STEP)
    assert done.returncode == 0, done.stdout + done.stderr
    report = verify_run(stage.run)
    assert report.is_proved and report.is_finished and report.attempts == 2 and report.compared
    looked_at = {check.name: check.is_looked_at for check in report.checks}
    assert looked_at == {
        "order": True,
        "losses": True,
        "options": False,
        "skipped steps": False,
        "rates": False,
        "networks": True,
    }
    assert any("made by kwrap 0.1" in note for note in report.notes)
    assert read_networks(stage.run) == networks


def read_networks(run: Run) -> dict[str, dict[str, bytes]]:
    """The bytes of every tensor of every checkpoint; headers hold times."""
    files = run.checkpoints.glob("*.safetensors")
    return {file.name: {name: array.tobytes() for name, array in load_file(file).items()} for file in files}


@pytest.mark.parametrize("name", ["min_snr_gamma", "noise_offset", "unet_lr", "resolution"])
def test_a_changed_value_of_a_run_of_kwrap_0_1_is_refused_as_before(stage: Stage, name: str) -> None:
    make_older(stage.run)
    file = "dataset.toml" if name == "resolution" else "trainer.toml"
    edit(file, rf"^{name} = .*", f"{name} = [96, 96]" if name == "resolution" else f"{name} = 0.25")(stage)
    with pytest.raises(DifferentRun, match=f"{name} +was") as refused:
        plan_resume(stage.run, step=STEP)
    assert "run.lock.toml, [values] and [dataset]" in refused.value.next_step, "such a lock has no [files]"
    assert any(change.startswith(f"{name}: was") for change in verify_run(stage.run).changed_after)


def test_no_state_of_kwrap_0_1_is_taken_for_one_of_today(stage: Stage) -> None:
    """Nor the other way round: a lock whose id was taken out belongs to no state of its own."""
    make_older(stage.other("twin"))
    state_of("twin")(stage)
    with pytest.raises(DifferentRun, match=r"was written by a run of kwrap 0\.1, which has no id") as refused:
        plan_resume(stage.run, step=STEP)
    assert [problem.where for problem in refused.value.problems] == ["other-run"]
    make_older(stage.run)
    state_of("faster")(stage)
    with pytest.raises(DifferentRun, match="other-run"):
        plan_resume(stage.run, step=STEP)


@pytest.mark.parametrize("name", ["the base model", "the VAE", "a tokenizer", "captions", "the pixels of an image"])
def test_an_accepted_difference_is_seen_in_the_losses(stage: Stage, name: str) -> None:
    key, change = OFFERED[name]
    change(stage)
    done = kwrap("resume", stage.run.folder, "--step", STEP, "--allow", key)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"accepted: {key}" in done.stderr
    losses: dict[int, dict[int, float]] = {1: {}, 2: {}}
    for line in map(json.loads, stage.run.metrics.read_text().splitlines()):
        losses[line["attempt"]][line["optimizer_step"]] = line["loss"]
    assert any(losses[1][step] != loss for step, loss in losses[2].items())
    verified = kwrap("verify", stage.run.folder)
    assert key in verified.stdout + verified.stderr


def test_a_run_begun_from_the_state_of_another_says_so(stage: Stage) -> None:
    state_of("twin")(stage)
    twin = stage.other("twin").lock.run_id
    done = kwrap("resume", stage.run.folder, "--step", STEP, "--allow", "other-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a state of another run" in done.stderr
    lineage = list_attempts(stage.run)[-1].lineage
    assert lineage is not None and lineage["run_id"] == twin and lineage["optimizer_step"] == STEP
    verified = kwrap("verify", stage.run.folder)
    assert "another run" in verified.stdout + verified.stderr


def test_each_state_names_its_run_and_its_options(stage: Stage) -> None:
    prints = [read_manifest(state_folder(stage.other(name).states, STEP)).fingerprint for name in ("twin", "faster")]
    own = read_manifest(state_folder(stage.run.states, STEP)).fingerprint
    assert own.run_id == stage.run.lock.run_id and len({own.run_id, *(each.run_id for each in prints)}) == 3
    assert prints[0].options_digest == own.options_digest != prints[1].options_digest


@pytest.mark.parametrize("key", ["unet_lr", "max_train_steps", "network_args.factor", "resolution", "seed"])
def test_a_finished_run_does_not_pretend_to_train(stage: Stage, key: str) -> None:
    done = kwrap("resume", stage.run.folder, "--allow", key)
    assert done.returncode == 2
    words = "a run is made longer by a command" if key == "max_train_steps" else "cannot change within a run"
    assert f"--allow {key}: {words}" in done.stderr
    assert len(list_attempts(stage.run)) == 1


def test_an_exchanged_network_is_told_by_inspect_and_not_published(stage: Stage) -> None:
    network = stage.run.checkpoints / "first.safetensors"
    assert "as run first wrote it" in kwrap("inspect", network).stdout
    assert "not compared" in kwrap("inspect", network, "--no-hash").stdout
    step = network.with_name(f"first-step{STEP + 1:08d}.safetensors")
    assert json.loads(kwrap("inspect", step, "--json").stdout)["of_run"]["is_as_written"] is True
    shutil.copy(step, network)
    told = json.loads(kwrap("inspect", network, "--json").stdout)
    assert told["of_run"]["is_as_written"] is False and told["of_run"]["written_sha256"] != told["sha256"]
    done = kwrap("publish", stage.run.folder, "--out", stage.folder / "out", "--no-bake")
    assert done.returncode == 1 and "is not the network that the run wrote" in done.stderr, done.stderr
    assert not (stage.folder / "out").exists()
    elsewhere = stage.folder / "elsewhere.safetensors"
    shutil.copy(network, elsewhere)
    assert json.loads(kwrap("inspect", elsewhere, "--json").stdout)["of_run"] is None
    (list_attempts(stage.run)[0].folder / "networks.json").unlink()
    assert "unknown: run first has no sha256" in kwrap("inspect", network).stdout


def test_pictures_are_drawn_with_the_vae_that_it_trains_with(stage: Stage) -> None:
    (model,) = models_of_run(stage.run, None)
    assert model.vae is not None and model.vae.samefile(stage.folder / "vae.safetensors")
