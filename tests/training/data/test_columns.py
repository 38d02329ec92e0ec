"""The columns dataset: batches by key alone, the caller's generators untouched, faults named."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import DATASET_OPTIONS, World

from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import NoImages, read_folder_sizes
from kohaku_wrap.planning.step_plan import count_steps
from kohaku_wrap.steps import StepPlan
from kohaku_wrap.training.data.columns import ColumnsDataset, content_digest
from kohaku_wrap.training.data.images import UnreadableImage
from kohaku_wrap.training.data.items import BatchKey, ItemOptions, read_dataset_options
from kohaku_wrap.training.data.loader import iterate_examples, make_loader
from kohaku_wrap.training.data.sampler import PositionSampler


def open_dataset(images: Path, options: Mapping[str, Any] | None = None, **arguments: Any) -> ColumnsDataset:
    chosen = ItemOptions.from_dataset_options({**DATASET_OPTIONS, **(options or {})})
    return ColumnsDataset(Columns.open(images), chosen, 2, arguments.pop("seed", 5), 2, None, **arguments)


def plan_of(world: World, num_repeats: int) -> StepPlan:
    sizes = read_folder_sizes(world.images)
    options = BucketOptions.from_dataset_options(DATASET_OPTIONS)
    return count_steps(sizes.widths, sizes.heights, options, 2, 1, 2, epochs=1, repeats=num_repeats)


def keys_of(dataset: ColumnsDataset, epoch: int) -> list[BatchKey]:
    sampler = PositionSampler(dataset.order, epoch)
    return list(sampler)


def facts(example: dict[str, Any]) -> tuple[Any, ...]:
    sizes = [example[name].tolist() for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")]
    return example["kwrap"], example["captions"], sizes, example["images"].sum().item()


def test_a_batch_is_a_function_of_its_key(world: World) -> None:
    one, other = open_dataset(world.images), open_dataset(world.images)
    keys = keys_of(one, 0) + keys_of(one, 1)
    forwards = {key: facts(one[key]) for key in keys}
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    backwards = {key: facts(other[key]) for key in reversed(keys)}
    assert forwards == backwards


def test_epochs_and_seeds_differ(world: World) -> None:
    dataset, other = open_dataset(world.images), open_dataset(world.images, seed=6)
    texts = [
        sorted(text for key in keys_of(each, epoch) for text in each[key]["captions"])
        for each, epoch in ((dataset, 0), (dataset, 1), (other, 0))
    ]
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


def generator_states() -> tuple[Any, ...]:
    """Of Python, numpy and torch."""
    numbers = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return random.getstate(), numbers, torch.get_rng_state().tolist()


def test_the_callers_generators_are_left_alone(world: World) -> None:
    dataset = open_dataset(world.images, {"random_crop": True, "flip_aug": True})
    states = generator_states()
    for key in keys_of(dataset, 0):
        dataset[key]
    assert states == generator_states()


def test_loader_workers_change_nothing(world: World) -> None:
    dataset = open_dataset(world.images)
    found = []
    for workers in (0, 2):
        sampler = PositionSampler(dataset.order)
        loader = make_loader(dataset, sampler, workers, persistent=False, seed=5)
        moved = torch.get_rng_state()
        examples = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            examples += [facts(example) for example in iterate_examples(loader)]
        assert torch.equal(torch.get_rng_state(), moved)
        found.append(examples)
    assert found[0] == found[1]
    assert len(found[0]) == 2 * dataset.order.positions_per_epoch


def test_a_batch_has_one_shape_within_its_range(world: World) -> None:
    dataset = open_dataset(world.images)
    shapes = set()
    for key in keys_of(dataset, 0):
        example = dataset[key]
        shapes.add(tuple(example["images"].shape[2:]))
        assert example["images"].dtype == torch.float32
        assert example["images"].min() >= -1
        assert example["images"].max() <= 1
        assert [tuple(row) for row in example["target_sizes_hw"].tolist()] == [
            tuple(example["images"].shape[2:])
        ] * len(example["captions"])
    assert len(shapes) >= 2


def test_nothing_is_loaded_before_the_start(world: World) -> None:
    dataset = open_dataset(world.images, start=(1, 2))
    for key in PositionSampler(dataset.order, 1, 2):
        dataset[key]
    assert dataset.images_loaded_too_early == 0
    dataset[keys_of(dataset, 0)[0]]
    assert dataset.images_loaded_too_early > 0


def damaged_copy(world: World, folder: Path) -> tuple[Path, Path]:
    images = folder / "images"
    shutil.copytree(world.images, images)
    bad = images / "0004" / "1004.png"
    bad.write_bytes(bad.read_bytes()[:60])
    return images, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(world: World, tmp_path: Path, workers: int) -> None:
    images, bad = damaged_copy(world, tmp_path)
    dataset = open_dataset(images)
    loader = make_loader(dataset, PositionSampler(dataset.order), workers, persistent=False, seed=5)
    with pytest.raises(UnreadableImage, match=str(bad)):
        list(iterate_examples(loader))


def test_a_substitute_depends_on_the_position_alone_and_is_flagged(world: World, tmp_path: Path) -> None:
    images, _ = damaged_copy(world, tmp_path)
    runs = []
    for order in (1, -1):
        dataset = open_dataset(images, substitute_bad_images=True)
        keys = keys_of(dataset, 0)[::order]
        runs.append({key: facts(dataset[key]) for key in keys})
    assert runs[0] == runs[1]
    flagged = [facts[0] for facts in runs[0].values() if facts[0]["substituted"]]
    assert flagged
    assert all(1004 in each["image_ids"] for each in flagged)


def test_another_size_than_the_captions_say_is_refused(world: World, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(world.images, images)
    shutil.copy(images / "0001" / "1001.png", images / "0002" / "1002.png")
    dataset = open_dataset(images)
    with pytest.raises(UnreadableImage, match="150x140, the captions say 96x170"):
        for key in keys_of(dataset, 0):
            dataset[key]


def test_content_digests_tell_captions_crops_and_time_steps_apart(world: World) -> None:
    plain, cropped = open_dataset(world.images), open_dataset(world.images, {"random_crop": True})
    key = keys_of(plain, 0)[0]
    content = plain[key]["kwrap"]["content"]
    assert content != cropped[key]["kwrap"]["content"]
    assert content_digest(content, [1, 2]) != content_digest(content, [2, 1])
    assert 0 <= content_digest(content, [1, 2]) < 2**64


def test_every_option_it_does_not_have_is_named_at_once() -> None:
    with pytest.raises(ProblemsFound) as found:
        ItemOptions.from_dataset_options(
            {**DATASET_OPTIONS, "color_aug": True, "alpha_mask": True, "resize_interpolation": "magic", "colour": 1}
        )
    assert {problem.where for problem in found.value.problems} >= {
        "color_aug", "alpha_mask", "resize_interpolation", "colour",
    }  # fmt: skip


def test_defaults_of_sd_scripts_are_no_fault() -> None:
    ItemOptions.from_dataset_options({**DATASET_OPTIONS, "color_aug": False, "num_repeats": 1, "is_reg": False})


@pytest.mark.parametrize("repeats", [0, 1.5, "2"])
def test_a_number_of_repeats_that_is_none_is_refused(repeats: Any) -> None:
    with pytest.raises(ProblemsFound, match="not a whole number"):
        ItemOptions.from_dataset_options({**DATASET_OPTIONS, "num_repeats": repeats})


def test_repeats_are_trained_as_often_as_planned_each_with_its_own_draws(world: World) -> None:
    once, thrice = open_dataset(world.images), open_dataset(world.images, {"num_repeats": 3})
    items = [item for key in range(len(thrice)) for item in thrice.draw_batch(BatchKey(0, 0, key, False))]
    assert Counter(item.row for item in items) == dict.fromkeys(range(len(once.columns)), 3)
    shapes = {thrice.resolution_of(item.row) for item in thrice.draw_batch(keys_of(thrice, 0)[0])}
    assert len(shapes) == 1
    captions = {row: {item.caption for item in items if item.row == row} for row in range(len(once.columns))}
    assert all(len(texts) == 3 for texts in captions.values())
    assert all(once.draw_item(row, 0).caption in texts for row, texts in captions.items()), "the first is that of one"
    sizes = plan_of(world, 3)
    assert (len(thrice), len(items)) == (sizes.batches, sizes.images)


def test_a_dataset_file_of_several_parts_is_refused() -> None:
    with pytest.raises(ProblemsFound, match="2 datasets"):
        read_dataset_options({"datasets": [{}, {}]})
    document = {"general": {"a": 1}, "datasets": [{"b": 2, "subsets": [{"a": 3, "image_dir": "x"}]}]}
    assert read_dataset_options(document) == {"a": 3, "b": 2, "image_dir": "x"}


def test_what_is_not_a_captions_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoImages, match="not there"):
        Columns.open(tmp_path)
    (tmp_path / "captions.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(NoImages, match="not a captions file"):
        Columns.open(tmp_path)


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    "options",
    [{}, {"random_crop": True, "flip_aug": True}, {"bucket_no_upscale": True}, {"resize_interpolation": "bicubic"}],
    ids=["plain", "random", "no-upscale", "bicubic"],
)
def test_sd_scripts_makes_the_same_items(world: World, sd_scripts: Any, options: dict[str, Any]) -> None:
    """Its own dataset, one image a batch, seeded as kwrap seeds an item: pixels, crops, sizes and captions."""
    from kohaku_wrap.training.data.items import item_generator

    dataset = open_dataset(world.images, options)
    chosen = {**DATASET_OPTIONS, **options}
    theirs = make_their_dataset(world, sd_scripts, chosen)
    for row in range(len(dataset.columns)):
        path = str(dataset.columns.path_of(row))
        item = dataset.draw_item(row, 1)
        random.setstate(item_generator(5, 1, item.image_id).getstate())
        example = theirs[next(index for index, each in enumerate(their_order(theirs)) if each == path)]
        assert torch.equal(example["images"][0], dataset.load_image(item))
        assert example["captions"] == [item.caption]
        sizes = dataset.size_conditions([item])
        assert {name: example[name].tolist() for name in sizes} == {name: sizes[name].tolist() for name in sizes}


def their_order(dataset: Any) -> list[str]:
    buckets = dataset.bucket_manager.buckets
    keys = [buckets[index.bucket_index][index.batch_index] for index in dataset.buckets_indices]
    return [dataset.image_data[key].absolute_path for key in keys]


def make_their_dataset(world: World, sd_scripts: Any, options: dict[str, Any]) -> Any:
    from library import config_util

    columns = Columns.open(world.images)
    for row in range(len(columns)):
        columns.path_of(row).with_suffix(".txt").write_text(columns.caption_of(row), encoding="utf-8")
    subsets = [{"image_dir": str(path.parent), "caption_extension": ".txt"} for path in world.images.glob("*/*.png")]
    # Without the parser, its schema leaves a tuple as the default here.
    config = {"general": {"caption_separator": ",", **options}, "datasets": [{"batch_size": 1, "subsets": subsets}]}
    from types import SimpleNamespace

    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(config, SimpleNamespace())
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    dataset = group.datasets[0]
    dataset.current_epoch = 2
    dataset.tokenize_strategy = SimpleNamespace(tokenize=lambda text: [torch.zeros(1, 1, 77)])
    dataset.text_encoder_output_caching_strategy = None
    return dataset


@pytest.mark.sd_scripts
def test_the_trainers_own_dataset_names_the_image_too(sd_scripts: Any, tmp_path: Path) -> None:
    from kohaku_wrap.training.engines.sd_scripts.dataset import name_unreadable

    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    load = name_unreadable(sd_scripts.train_util.load_image)
    for name in ("cut.png", "gone.png"):
        with pytest.raises(UnreadableImage, match=rf"{name}: the image cannot be read") as unreadable:
            load(str(tmp_path / name), False)
        assert "--allow" not in unreadable.value.next_step
