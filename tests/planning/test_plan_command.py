"""`kwrap plan` and the network's counts, by the real worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import toml
from click.testing import CliRunner

from kohaku_wrap.cli.plan import command
from kohaku_wrap.cli.template import command as template_command
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.config.templates import find_preset
from kohaku_wrap.planning import training_plan
from kohaku_wrap.planning.module_counts import ModuleCounts
from kohaku_wrap.planning.sizes import total_of, weigh_host_memory, weigh_training
from kohaku_wrap.planning.step_plan import plan_steps, suppose_sizes
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import RECORD
from kohaku_wrap.training.records.metrics import NoMeasurement, read_step_seconds

MakeSite = Callable[..., Site]
EPSILON_BASE = (2_567_463_684, 817_720_320, 83_653_863)


@pytest.mark.slow
def test_epsilon_as_published(make_site: MakeSite, home: Path) -> None:
    site = make_site()
    arguments = ["epsilon", "--site", str(site.path), "--images", "5210319", "--seconds-per-step", "49.5", "--json"]
    result = CliRunner().invoke(command, arguments)
    document = json.loads(result.stdout)
    assert document["images"] == 5_210_319
    assert (document["batch_per_gpu"], document["accumulation"], document["processes"]) == (4, 16, 4)
    assert document["micro_batches_per_epoch"] == 325_645
    assert document["optimizer_steps_per_epoch"] == document["total_optimizer_steps"] == 20_353
    assert (document["unet_modules"], document["text_encoder_modules"]) == (1050, 264)
    assert document["parameters"] == 384_645_360
    assert 769_000_000 < document["checkpoint_bytes"] < 800_000_000
    assert 11.5 < document["eta_seconds"] / 86_400 < 12.5
    assert document["warmup_optimizer_steps"] == 1000
    assert document["warmup_optimizer_steps_plain_sd_scripts"] == 250
    assert sum(part["size_bytes"] for part in document["gpu_memory"]) == document["gpu_memory_bytes"] < 24 * 2**30
    # The count is kept, and a pattern that fits nothing is told.
    assert len(list((home / "counts").glob("*.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["lokr dora_wd", "full"])
def test_a_network_of_low_rank_is_counted(algo: str) -> None:
    from kohaku_wrap.planning.module_counts import count_network

    name, *more = algo.split()
    settings = [f"network_args.algo={name}", "network_dim=4", "network_args.conv_dim=4"]
    counts = count_network(
        resolve_template("epsilon", None, [*settings, *(f"network_args.{key}=true" for key in more)])
    )
    assert counts.unet_modules > 700 and counts.unet_parameters > counts.unet_modules


@pytest.mark.slow
def test_pattern_without_a_module_is_told_by_check(tmp_path: Path) -> None:
    template = tmp_path / "own.toml"
    preset = load_toml(find_preset("small-24gib"))
    preset["unet_target_module"].append("Transformer3DModel")
    preset["unet_target_name"].append(".*time_embd.+")
    preset["module_algo_map"]["CrossAttentions"] = {"algo": "lokr", "factor": 4}
    template.write_text(toml.dumps({"extends": "epsilon", "preset": preset}))
    result = CliRunner().invoke(template_command, ["check", str(template), "--json"])
    assert result.exit_code == 1
    # The small preset's own patterns all match.
    found = json.loads(result.stdout)["problems"]
    assert {(problem["where"], problem["what"].split("'")[1]) for problem in found} == {
        ("preset.unet_target_module", "Transformer3DModel"),
        ("preset.unet_target_name", ".*time_embd.+"),
        ("preset.module_algo_map", "CrossAttentions"),
    }
    assert all(str(template) in problem["layer"] for problem in found)


def test_plan_of_a_folder(
    make_site: MakeSite, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2')
    write_captions(site.paths.images, [(128, 128)] * 21 + [(64, 256)] * 6)
    result = CliRunner().invoke(command, ["demo", "--site", str(site.path), "--no-modules", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["sizes_exact"] is True
    assert (
        document["buckets"]
        == [
            {"width": 64, "height": 224, "images": 6, "batches": 3},
            {"width": 128, "height": 128, "images": 21, "batches": 11},
        ]
        or sum(bucket["images"] for bucket in document["buckets"]) == 27
    )
    assert (document["batches"], document["micro_batches_per_epoch"]) == (14, 14)
    assert (document["optimizer_steps_per_epoch"], document["total_optimizer_steps"]) == (2, 4)
    assert document["fills_per_epoch"] == 2
    people = CliRunner().invoke(command, ["demo", "--site", str(site.path), "--no-modules"])
    assert "kwrap train demo" in people.output
    assert f"note: {site.paths.base_model}: no such file; fix paths.base_model in {site.path}" in people.output


def test_the_same_network_on_two_unets_is_shown_once(
    make_site: MakeSite,
    write_captions: Callable[[Path, Sequence[tuple[int, int]]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2')
    write_captions(site.paths.images, [(128, 128)] * 4)
    one = ModuleCounts("diffusers", 5, 2, 40, 20, {}, 7, (), 1, 1, 1)
    found = [one, replace(one, counted_on="sd-scripts")]
    monkeypatch.setattr("kohaku_wrap.planning.training_plan.count_network_everywhere", lambda effective: found)
    shown = CliRunner().invoke(command, ["demo", "--site", str(site.path)]).output
    assert "5 UNet + 2 text encoder modules (the UNet of diffusers and of sd-scripts)\nparameters" in shown
    found[1] = replace(found[1], unet_modules=6)
    shown = CliRunner().invoke(command, ["demo", "--site", str(site.path)]).output
    assert "(the UNet of diffusers)\n" in shown and "6 UNet + 2" in shown


def test_saves_beyond_the_run_are_noted(
    make_site: MakeSite, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2')
    write_captions(site.paths.images, [(128, 128)] * 4)
    result = CliRunner().invoke(command, ["demo", "--site", str(site.path), "--no-modules", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert not document["problems"]
    assert any("save_every_n_steps" in note for note in document["notes"]), document["notes"]


def test_what_the_builtin_engine_lacks_is_refused_by_plan_and_check(make_site: MakeSite) -> None:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2', 'mixed_precision = "fp16"')
    planned = CliRunner().invoke(command, ["demo", "--site", str(site.path), "--images", "8", "--no-modules", "--json"])
    [problem] = json.loads(planned.stdout)["problems"]
    assert problem["where"] == "mixed_precision" and "needs a GPU" in problem["what"]
    assert problem["layer"].startswith("site")
    checked = CliRunner().invoke(
        template_command, ["check", "demo", "--site", str(site.path), "--no-modules", "--json"]
    )
    assert checked.exit_code == 1
    assert "mixed_precision" in {each["where"] for each in json.loads(checked.stdout)["problems"]}


def test_why_a_network_is_not_counted_is_said(make_site: MakeSite) -> None:
    site = make_site('engine = "sd-scripts"\ngpus = 1\nbatch_per_gpu = 2')
    settings = ["network_module=networks.lora", "network_dim=8", "network_alpha=4"]
    effective = resolve_template("epsilon", site, settings)
    plan = training_plan.plan_training(effective, suppose_sizes(256, effective))
    assert plan.not_counted == (
        "modules, parameters and sizes of networks.lora are not known: only those of lycoris.kohya are counted"
    )


def test_a_missing_site_file_is_answered_with_one_to_write(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["demo", "--site", str(tmp_path / "site.toml")])
    before, _, rest = done.exception.next_step.partition("\n\n")  # type: ignore[union-attr]
    example, _, after = rest.rpartition("\n\n")
    assert before.endswith("Write one:") and after.startswith("docs/guide.md says how to get what it names.")
    (tmp_path / "site.toml").write_text(example, encoding="utf-8")
    site = load_site(tmp_path / "site.toml")
    assert site.machine.gpus == 1 and site.paths.images == tmp_path / "images"
    guide = Path(__file__).parents[2] / "docs" / "guide.md"
    assert example in guide.read_text(encoding="utf-8")


def test_copied_pages_count_and_memory_is_refused(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site("gpus = 4\nbatch_per_gpu = 4\nworkers = 8")
    totals = {}
    for data in ("kwrap", "sd-scripts"):
        effective = resolve_template("epsilon", site, [f"kwrap.data={data}"])
        images = suppose_sizes(5_210_319, effective)
        plan = plan_steps(effective, images)
        parts = weigh_host_memory(effective, plan, images, sum(EPSILON_BASE), 1)
        totals[data] = total_of(parts)
    assert totals["sd-scripts"] - totals["kwrap"] > 170 * 10**9
    monkeypatch.setattr(training_plan, "machine_memory_bytes", lambda: 10**9)
    sizes = weigh_training(effective, plan, images, 384_645_360, 3686, EPSILON_BASE)
    [problem] = training_plan.check_memory(sizes)
    assert "dataset pages copied by loader workers" in problem.what


def test_gradients_count_twice_with_several_processes(make_site: MakeSite) -> None:
    """DDP's buckets lie beside them, ddp_gradient_as_bucket_view or not: its forward is never called."""
    site = make_site("gpus = 4\nbatch_per_gpu = 4\nworkers = 8")
    alone = make_site("gpus = 1\nbatch_per_gpu = 4\nworkers = 8")
    gradients = {}
    for name, where, view in (("four", site, "true"), ("four, no view", site, "false"), ("one", alone, "true")):
        effective = resolve_template("epsilon", where, [f"ddp_gradient_as_bucket_view={view}"])
        images = suppose_sizes(5_210_319, effective)
        sizes = weigh_training(effective, plan_steps(effective, images), images, 384_645_360, 3686, EPSILON_BASE)
        gradients[name] = next(part.size_bytes for part in sizes.gpu_memory if part.name.startswith("gradients"))
    assert gradients == {"four": 2 * 4 * 384_645_360, "four, no view": 2 * 4 * 384_645_360, "one": 4 * 384_645_360}


def test_disk_under_the_retention_policy(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site())
    images = suppose_sizes(5_210_319, effective)
    sizes = weigh_training(effective, plan_steps(effective, images), images, 384_645_360, 3686, EPSILON_BASE)
    # Saves at 1700, 3400, … 18700 and the end; states at 6800 and 13600 stay besides the newest three.
    assert [part.name for part in sizes.disk[:2]] == ["12 checkpoints", "5 states kept, 1 being written"]
    assert sizes.disk[0].size_bytes == 12 * sizes.checkpoint_bytes
    assert sizes.disk[1].size_bytes == 6 * sizes.state_bytes
    few = suppose_sizes(256, effective)
    sizes = weigh_training(effective, plan_steps(effective, few), few, 384_645_360, 3686, EPSILON_BASE)
    assert [part.name for part in sizes.disk[:2]] == ["1 checkpoint", "1 state kept, 1 being written"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (("save_every_n_epochs=1",), ["20 checkpoints", "3 states kept, 1 being written"]),
        (("save_every_n_epochs=5", "save_last_n_epochs=2"), ["3 checkpoints", "3 states kept, 1 being written"]),
        (("save_every_n_epochs=5", "save_every_n_steps=50"), ["7 checkpoints", "3 states kept, 1 being written"]),
        (("save_every_n_epochs=9", "states.keep=9"), ["3 checkpoints", "3 states kept, 1 being written"]),
        (("save_state=false",), ["1 checkpoint", "0 states kept, 0 being written"]),
        (("save_state=false", "save_state_on_train_end=true"), ["1 checkpoint", "1 state kept, 1 being written"]),
    ],
)
def test_disk_counts_what_is_saved_after_epochs(
    make_site: MakeSite, settings: tuple[str, ...], names: list[str]
) -> None:
    """Twenty epochs of ten optimizer steps."""
    effective = resolve_template("own-images", make_site("batch_per_gpu = 2"), ("save_every_n_steps=900", *settings))
    images = suppose_sizes(40, effective)
    plan = plan_steps(effective, images)
    assert (plan.total_optimizer_steps, plan.group) == (200, 2)
    sizes = weigh_training(effective, plan, images, 384_645_360, 3686, EPSILON_BASE)
    assert [part.name for part in sizes.disk[:2]] == names
    assert sizes.disk[2].size_bytes == 200 * (400 + 3 * RECORD.itemsize)


def test_captions_of_another_dataset_are_noted(
    make_site: MakeSite, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2')
    write_captions(site.paths.images, [(128, 128)] * 21)
    arguments = ["demo", "--site", str(site.path), "--no-modules", "--json"]
    notes = {
        dataset: json.loads(CliRunner().invoke(command, [*arguments, "--set", f"kwrap.dataset={dataset}"]).stdout)[
            "notes"
        ]
        for dataset in ("demo", "delta")
    }
    assert not any("the template names" in note for note in notes["demo"])
    [note] = [note for note in notes["delta"] if "the template names" in note]
    assert note == (
        "the captions are of the dataset demo, the template names delta: "
        'write dataset = "demo" under its [kwrap], or caption with --dataset delta'
    )


def test_measured_step_time(tmp_path: Path) -> None:
    with pytest.raises(NoMeasurement):
        read_step_seconds(Run(tmp_path))
    lines = [{"optimizer_step": step, "seconds": seconds} for step, seconds in enumerate([90.0, 49.0, 50.0, 51.0])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    assert read_step_seconds(Run(tmp_path)) == 50.5
