"""`kwrap plan` on the pictures of `[samples]`: how many, on what, and what they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kohaku_wrap.cli.plan import command
from kohaku_wrap.config.checks import describe_notes
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.samples import note_shared_gpu
from kohaku_wrap.config.site import Site
from kohaku_wrap.planning.pictures import plan_pictures, weigh_drawing
from kohaku_wrap.planning.sizes import CUDA_CONTEXT_BYTES, PROCESS_BYTES
from kohaku_wrap.planning.step_plan import plan_steps, suppose_sizes

MakeSite = Callable[..., Site]
ON_CPU = 'engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2'
ENDLESS = ("max_train_epochs=0", "max_train_steps=4000000000")
ON_CPU_TOO = ON_CPU + '\nsample_device = "{}"'
TWO_GPUS = 'engine = "sd-scripts"\ngpus = 2\nbatch_per_gpu = 2\nsample_device = "{}"'


@pytest.fixture
def plan(make_site: MakeSite) -> Callable[..., Any]:
    """The pictures of the demo's template over 200 supposed images, 25 steps of 8 an epoch."""

    def make(machine: str, *settings: str, measured: float | None = None) -> Any:
        effective = resolve_template("demo", make_site(machine), ["effective_batch=8", "max_train_epochs=2", *settings])
        return plan_pictures(effective, plan_steps(effective, suppose_sizes(200, effective)), 1_000, measured)

    return make


@pytest.mark.parametrize(
    "settings,networks",
    [
        (("samples.every=10", "save_every_n_steps=10"), 5),
        (("samples.every=20", "save_every_n_steps=10"), 3),
        (("samples.by=kwrap", "save_every_n_steps=7"), 8),
        (("samples.by=kwrap", "save_every_n_steps=90", "save_every_n_epochs=1"), 2),
        (("samples.by=kwrap", "save_every_n_steps=90"), 1),
        ((*ENDLESS, "samples.every=14", "save_every_n_steps=7"), 285_714_286),
    ],
)
def test_kwrap_draws_of_each_network_that_every_divides_and_of_the_last(
    plan: Callable[..., Any], settings: tuple[str, ...], networks: int
) -> None:
    found = plan(ON_CPU, *settings, "samples.prompts=['a', 'b', 'c']", "samples.width=64", measured=1e-6)
    assert (found.networks, found.prompts, found.pictures) == (networks, 3, 3 * networks)
    assert found.device == "cpu" and found.is_beside and found.memory[0].size_bytes == 4_000
    assert found.seconds == pytest.approx(1e-6 * 64 * 128 * found.steps * found.pictures)
    assert found.disk_bytes > 3 * 64 * 128 * found.pictures


@pytest.mark.parametrize(
    "settings,networks",
    [
        (("samples.every=10",), 5),
        (("samples.every=30", "sample_at_first=true", 'samples.prompts=["a"]'), 2),
        (("sample_every_n_epochs=1", 'samples.prompts=["a"]'), 2),
        (("sample_every_n_epochs=1", "samples.every=10"), 2),
        ((*ENDLESS, "samples.every=1"), 4_000_000_000),
    ],
)
def test_the_trainer_draws_when_its_options_say(
    plan: Callable[..., Any], settings: tuple[str, ...], networks: int
) -> None:
    found = plan(TWO_GPUS.format("after"), *settings)
    assert (found.networks, found.by, found.memory, found.seconds) == (networks, "trainer", (), None)


def test_steps_beside_epochs_are_noted_as_the_trainer_ignores_them(make_site: MakeSite) -> None:
    settings = ["samples.every=10", "sample_every_n_epochs=1"]
    effective = resolve_template("demo", make_site(TWO_GPUS.format("after")), settings)
    said = "samples.every does nothing beside sample_every_n_epochs (--set): sd-scripts draws after epochs then."
    assert said in describe_notes(effective)
    for others in (settings[:1], [*settings[:1], "samples.by=trainer"]):
        notes = describe_notes(resolve_template("demo", make_site(TWO_GPUS.format("after")), others))
        assert not any("does nothing beside" in note for note in notes)


def test_no_pictures_take_nothing(plan: Callable[..., Any]) -> None:
    assert plan(ON_CPU) is None


@pytest.mark.parametrize("device,is_shared", [("cuda:0", True), ("cuda:1", True), ("cuda:2", False), ("after", False)])
def test_a_gpu_that_trains_too_is_told(make_site: MakeSite, device: str, is_shared: bool) -> None:
    site = make_site(TWO_GPUS.format(device))
    notes = note_shared_gpu(resolve_template("demo", site, ["samples.by=kwrap"]))
    assert bool(notes) == is_shared and all(device in note and str(site.path) in note for note in notes)
    assert not note_shared_gpu(resolve_template("demo", site, ["samples.every=4"]))


@pytest.mark.parametrize(
    "machine,device,is_on_gpu", [(ON_CPU_TOO, "cuda:0", True), (ON_CPU_TOO, "after", False), (TWO_GPUS, "after", True)]
)
def test_memory_to_draw_is_that_of_the_device(
    plan: Callable[..., Any], machine: str, device: str, is_on_gpu: bool
) -> None:
    found = plan(machine.format(device), "samples.by=kwrap")
    assert found.device == device and found.memory == weigh_drawing(1_000, on_gpu=is_on_gpu)


def test_who_draws_is_weighed_by_where_it_draws() -> None:
    on_gpu, on_cpu = (weigh_drawing(1000, on_gpu=is_there) for is_there in (True, False))
    assert [part.size_bytes for part in on_gpu] == [2000, CUDA_CONTEXT_BYTES]
    assert [part.size_bytes for part in on_cpu] == [4000, PROCESS_BYTES]
    assert weigh_drawing(0, on_gpu=True) == ()


def test_plan_prints_them(
    make_site: MakeSite, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    site = make_site(TWO_GPUS.format("cuda:1"))
    write_captions(site.paths.images, [(128, 128)] * 64)
    words = ["demo", "--site", str(site.path), "--no-modules", "--set", "samples.by=kwrap"]
    document = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)
    assert document["pictures"]["pictures"] == document["pictures"]["networks"] * document["pictures"]["prompts"] > 0
    assert document["pictures"]["seconds"] is None and document["pictures"]["is_beside"]
    assert any("cuda:1" in note for note in document["notes"])
    people = CliRunner().invoke(command, words)
    assert "time to draw" in people.output and "unknown" in people.output and "cuda:1" in people.output
