"""What a resolved template says of its values: which hold, who set them, and the batch that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from kohaku_wrap.config.effective import BadBatch, BatchShape, Effective, shape_batch
from kohaku_wrap.config.layers import load_layers
from kohaku_wrap.config.reading import Entry
from kohaku_wrap.config.site import Site
from kohaku_wrap.trainer.options import load_recorded_table

MakeSite = Callable[..., Site]


def effective(**entries: object) -> Effective:
    """A template of these values, `__` for the dot of a table, over two defaults."""
    named = {key.replace("__", "."): Entry(value, "template", "a.toml") for key, value in entries.items()}
    defaults = {"seed": 7, "unet_lr": None, "dataset_options.flip_aug": False}
    return Effective("a", Path("a.toml"), "", (), named, {}, load_recorded_table(), defaults=defaults)


def test_a_value_is_that_of_a_layer_else_the_default() -> None:
    found = effective(unet_lr=0, optimizer_args__eps=1, preset="mine")
    assert (found.get("unet_lr"), found.get("unet_lr", 5)) == (0, 0)
    assert (found.get("seed"), found.get("seed", 5)) == (7, 7)
    assert (found.get("nothing"), found.get("nothing", 5)) == (None, 5)
    assert effective().get("unet_lr", 5) == 5, "an unset default is none"
    assert found.values == {
        "seed": 7,
        "unet_lr": 0,
        "dataset_options.flip_aug": False,
        "optimizer_args.eps": 1,
        "preset": "mine",
    }
    assert found.is_set("unet_lr") and not found.is_set("seed")
    assert found.options == {"unet_lr": 0}, "only what is the trainer's"


def test_tables_are_cut_out_with_or_without_defaults() -> None:
    found = effective(optimizer_args__eps=1, optimizer_args_2=3, dataset_options__shuffle_caption=True)
    assert found.subtable("optimizer_args") == {"eps": 1}
    assert found.subtable("dataset_options") == {"shuffle_caption": True}
    assert found.subtable("dataset_options", with_defaults=True) == {"shuffle_caption": True, "flip_aug": False}


def test_faults_name_the_layer_of_their_key() -> None:
    found = effective(unet_lr=0, preset="mine")
    origins = [problem.layer for problem in found.blame([("unet_lr", "x"), ("preset.any.key", "y"), ("seed", "z")])]
    assert origins == ["template a.toml", "template a.toml", "default"]
    assert effective().origin("preset.any.key") == "default"


@pytest.mark.parametrize(
    ("machine", "wanted", "accumulation"),
    [
        ("gpus = 2\nbatch_per_gpu = 4", 24, 3),
        ("gpus = 2\nbatch_per_gpu = 4", 8, 1),
        ("gpus = 2\nbatch_per_gpu = 4", 4, None),
        ("gpus = 2\nbatch_per_gpu = 4", 20, None),
        ("gpus = 0\nbatch_per_gpu = 4", 4, 1),
    ],
)
def test_the_batch_is_what_divides(make_site: MakeSite, machine: str, wanted: int, accumulation: int | None) -> None:
    site = make_site(machine)
    found = dataclasses.replace(effective(effective_batch=wanted), site=site)
    processes = site.machine.processes
    assert found.engine == site.machine.engine and effective().engine == "sd-scripts"
    if accumulation is None:
        assert found.batch is None
        with pytest.raises(BadBatch, match=f"effective_batch = {wanted} "):
            shape_batch(found)
    else:
        assert found.batch == shape_batch(found) == BatchShape(wanted, 4, processes, accumulation)


def test_no_batch_without_a_site_or_a_number(make_site: MakeSite) -> None:
    assert effective(effective_batch=8).batch is None
    assert dataclasses.replace(effective(), site=make_site()).batch is None
    whole, _ = load_layers("demo", make_site("gpus = 1\nbatch_per_gpu = 1"))
    assert whole.engine == "sd-scripts" and whole.batch is not None


def test_sizes_that_would_fit_are_named_to_just_below_four_times(make_site: MakeSite) -> None:
    found = dataclasses.replace(effective(effective_batch=44), site=make_site("gpus = 4\nbatch_per_gpu = 3"))
    with pytest.raises(BadBatch) as fault:
        shape_batch(found)
    assert fault.value.next_step.endswith("batch_per_gpu may be 1, 11.")


def test_a_resolved_template_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        effective().name = "other"  # type: ignore[misc]
