"""Step counts: the published ones, those of the order that trains, and those of an independent count."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.config.effective import BadBatch, shape_batch
from kohaku_wrap.config.layers import load_layers, resolve_template
from kohaku_wrap.config.site import Site
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.selection_file import BadSelection
from kohaku_wrap.formats.caption_rows import ImageSizes, NoImages, read_captions_metadata, read_folder_sizes
from kohaku_wrap.metadata.posts import POST_SCHEMA
from kohaku_wrap.planning.step_plan import (
    count_steps,
    note_other_dataset,
    plan_steps,
    read_selection_sizes,
    suppose_sizes,
)
from kohaku_wrap.steps import Bucket
from kohaku_wrap.training.data.order import BatchOrder

MakeSite = Callable[..., Site]
OPTIONS = BucketOptions((128, 128), enable_bucket=True, min_bucket_reso=64, max_bucket_reso=256, bucket_reso_steps=32)


def test_published_epsilon(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site())
    plan = plan_steps(effective, suppose_sizes(5_210_319, effective))
    assert (plan.batch_size, plan.accumulation, plan.processes) == (4, 16, 4)
    # 20,354 was published: the partial batches of real buckets make one step more.
    assert 20_353 <= plan.total_optimizer_steps <= 20_354
    assert plan.total_optimizer_steps * 49.5 / 86_400 == pytest.approx(11.7, abs=0.05)


def test_published_step_count_with_many_buckets(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site())
    generator = np.random.default_rng(0)
    kinds = generator.integers(500, 3000, size=(4000, 2))
    chosen = kinds[generator.integers(0, len(kinds), size=5_210_319)]
    plan = plan_steps(effective, ImageSizes(chosen[:, 0], chosen[:, 1], "generated"))
    assert len(plan.buckets) > 20
    assert plan.total_optimizer_steps in (20_353, 20_354)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(40, 900), st.integers(40, 900)), min_size=1, max_size=120),
    batch_size=st.integers(1, 5),
    processes=st.integers(1, 5),
    accumulation=st.integers(1, 6),
    epochs=st.integers(1, 3),
    num_repeats=st.integers(1, 3),
)
def test_counts_are_those_of_the_order_that_trains(
    sizes: list[tuple[int, int]], batch_size: int, processes: int, accumulation: int, epochs: int, num_repeats: int
) -> None:
    widths, heights = np.array(sizes).T
    plan = count_steps(
        widths, heights, OPTIONS, batch_size, processes, accumulation, epochs=epochs, repeats=num_repeats
    )
    buckets = np.repeat(assign_buckets(widths, heights, OPTIONS).bucket_of_image, num_repeats)
    order = BatchOrder(buckets, batch_size, seed=1, group=plan.group)
    assert plan.images == len(buckets)
    assert plan.batches == order.batches
    assert plan.optimizer_steps_per_epoch == order.count.optimizer_steps_per_epoch
    assert plan.optimizer_steps_per_epoch * plan.group == len(order.epoch(0))
    assert plan.fills_per_epoch == sum(order.epoch(0).is_fill(position) for position in range(len(order.epoch(0))))
    assert plan.total_optimizer_steps == epochs * order.count.optimizer_steps_per_epoch
    # As sd-scripts computes it, with its own divisions.
    assert plan.micro_batches_per_epoch == math.ceil(plan.batches / processes)
    assert plan.optimizer_steps_per_epoch == math.ceil(plan.batches / processes / accumulation)


SIZES = [128] * 7 + [64] * 4 + [256] * 3, [128] * 7 + [256] * 4 + [64] * 3


def test_a_plan_by_hand() -> None:
    plan = count_steps(*SIZES, OPTIONS, 2, 3, 2, epochs=2)
    assert plan.buckets == (Bucket(64, 256, 4, 2), Bucket(128, 128, 7, 4), Bucket(256, 64, 3, 2))
    assert (plan.images, plan.batches, plan.micro_batches_per_epoch) == (14, 8, 3)
    assert (plan.optimizer_steps_per_epoch, plan.epochs, plan.total_optimizer_steps) == (2, 2, 4)
    assert (plan.batch_size, plan.processes, plan.accumulation) == (2, 3, 2)
    assert (plan.group, plan.effective_batch, plan.fills_per_epoch) == (6, 12, 4)
    assert (plan.bucket_fill, plan.images_per_optimizer_step) == (14 / 16, 7.0)
    repeated = count_steps(*SIZES, OPTIONS, 2, 3, 2, max_steps=4, repeats=2)
    assert [bucket.batches for bucket in repeated.buckets] == [4, 7, 3]
    assert (repeated.micro_batches_per_epoch, repeated.optimizer_steps_per_epoch) == (5, 3)
    assert (repeated.epochs, repeated.total_optimizer_steps) == (2, 4)
    assert count_steps(*SIZES, OPTIONS, 2, 3, 2).total_optimizer_steps == 0


@pytest.mark.parametrize("value", [Bucket(1, 1, 1, 1), count_steps(*SIZES, OPTIONS, 1, 1, 1, epochs=1)])
def test_plans_do_not_change(value: object) -> None:
    for name in ("images", "batches"):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 7)
    with pytest.raises(FrozenInstanceError):
        ImageSizes(np.ones(1, np.int64), np.ones(1, np.int64), "made").exact = False  # type: ignore[misc]


def test_supposed_sizes_are_the_templates_own(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site())
    sizes = suppose_sizes(3, effective)
    width, height = BucketOptions.from_dataset_options(
        effective.subtable("dataset_options", with_defaults=True)
    ).resolution
    assert (sizes.widths.tolist(), sizes.heights.tolist(), sizes.exact) == ([width] * 3, [height] * 3, False)
    assert sizes.caption_bytes is None


def test_repeats_and_steps_come_from_the_template(tmp_path: Path, make_site: MakeSite) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'extends = "epsilon"\neffective_batch = 16\nmax_train_steps = 9\n[dataset_options]\nnum_repeats = 3\n'
    )
    effective, _ = load_layers(str(own), make_site())
    plan = plan_steps(effective, suppose_sizes(10, effective))
    assert (plan.images, plan.batches, plan.total_optimizer_steps) == (30, 8, 9)
    effective = resolve_template("epsilon", make_site())
    assert plan_steps(effective, suppose_sizes(10, effective)).images == 10
    own.write_text("effective_batch = 16\nmax_train_steps = 9\n[dataset_options]\nresolution = [1024, 768]\n")
    effective, _ = load_layers(str(own), make_site())
    assert plan_steps(effective, suppose_sizes(10, effective)).images == 10


def template_of(dataset: str, data: str = "kwrap") -> Any:
    return SimpleNamespace(get={"kwrap.dataset": dataset, "kwrap.data": data}.get)


def test_captions_of_another_dataset_are_told(
    tmp_path: Path, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    write_captions(tmp_path, [(128, 128)])  # of the dataset "demo"
    for named, told in (("demo", False), ("folder/demo.toml", False), ("epsilon", True), ("a", True), ("", False)):
        found = note_other_dataset(template_of(named), tmp_path)
        assert bool(found) is told
        assert not told or ("the dataset demo" in found[0] and named in found[0])
    assert note_other_dataset(template_of("epsilon", "sd-scripts"), tmp_path) == [], (
        "the trainer reads captions of its own"
    )
    with pa.OSFile(str(tmp_path / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
        pass
    assert read_captions_metadata(tmp_path) == {}
    assert note_other_dataset(template_of("demo"), tmp_path) == []
    about = json.dumps({"dataset": "mine", "style": "own"})
    with pa.OSFile(str(tmp_path / "captions.arrow"), "wb") as sink:
        pa.ipc.new_file(sink, pa.schema([], {"kwrap": about})).close()
    [note] = note_other_dataset(template_of("demo"), tmp_path)
    assert note.endswith('write dataset = "mine" under its [kwrap]'), "imported captions are made by no dataset"
    assert note_other_dataset(template_of("epsilon"), tmp_path / "no-images") == []


def test_a_folder_without_an_image(
    tmp_path: Path, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]
) -> None:
    write_captions(tmp_path, [])
    with pytest.raises(NoImages, match="lists no image"):
        read_folder_sizes(tmp_path)
    write_captions(tmp_path, [(128, 64)] * 3)
    sizes = read_folder_sizes(tmp_path)
    assert str(tmp_path) in sizes.source and sizes.caption_bytes and sizes.caption_bytes >= 3 * 22


def test_sizes_that_would_fit_go_up_to_four_times(make_site: MakeSite) -> None:
    effective, _ = load_layers("epsilon", make_site("gpus = 4\nbatch_per_gpu = 3"), ["effective_batch=520"])
    with pytest.raises(BadBatch, match="effective_batch = 520") as fault:
        shape_batch(effective)  # 13 would fit too
    assert "batch_per_gpu may be 1, 2, 5, 10." in fault.value.next_step


def test_sizes_below_zero_are_refused_and_many_without_one_counted(tmp_path: Path) -> None:
    path = tmp_path / "sel.parquet"
    columns = {field.name: pa.array([0, 1, 2, 3, 0]).cast(field.type) for field in POST_SCHEMA}
    pq.write_table(pa.table(columns, schema=POST_SCHEMA), path)
    sizes = read_selection_sizes(path)
    assert sizes.widths.tolist() == [1, 2, 3] and "; 2 without a size left out" in sizes.source
    for name in ("image_width", "image_height"):
        below = columns | {name: pa.array([-1, 1, 2, 3, 4], columns[name].type)}
        pq.write_table(pa.table(below, schema=POST_SCHEMA), path)
        with pytest.raises(BadSelection, match=name):
            read_selection_sizes(path)


def test_a_batch_needs_a_site_and_a_number(make_site: MakeSite) -> None:
    effective, _ = load_layers("epsilon")
    with pytest.raises(BadBatch, match="depends on the site"):
        shape_batch(effective)
    whole, _ = load_layers("epsilon", make_site())
    bare = SimpleNamespace(batch=None, site=whole.site, name="bare", get=lambda name: None)
    with pytest.raises(BadBatch, match="bare states no effective_batch"):
        shape_batch(bare)  # type: ignore[arg-type]


def test_steps_instead_of_epochs() -> None:
    plan = count_steps([128] * 10, [128] * 10, OPTIONS, 2, 1, 2, max_steps=7)
    assert (plan.optimizer_steps_per_epoch, plan.total_optimizer_steps, plan.epochs) == (3, 7, 3)
    assert count_steps([128] * 10, [128] * 10, OPTIONS, 2, 1, 2, max_steps=6).epochs == 2


def test_no_images() -> None:
    with pytest.raises(NoImages):
        count_steps([], [], OPTIONS, 2, 1, 2, epochs=1)


def test_sizes_of_the_folder(tmp_path: Path, write_captions: Callable[[Path, Sequence[tuple[int, int]]], None]) -> None:
    write_captions(tmp_path / "images", [(128, 128), (64, 256)])
    sizes = read_folder_sizes(tmp_path / "images")
    assert sizes.widths.tolist() == [128, 64]
    assert sizes.heights.tolist() == [128, 256]
    assert sizes.exact
    assert read_captions_metadata(tmp_path / "images")["digest"] == "d" * 64


def test_missing_and_damaged_sizes_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoImages, match=r"captions\.arrow: not there") as missing:
        read_folder_sizes(tmp_path)
    assert "kwrap caption" in missing.value.next_step
    (tmp_path / "captions.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(NoImages, match="not a captions file"):
        read_folder_sizes(tmp_path)
    with pytest.raises(BadSelection, match="no such file"):
        read_selection_sizes(tmp_path / "none.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(BadSelection, match="no column rating"):
        read_selection_sizes(tmp_path / "other.parquet")


def test_posts_without_a_size_are_left_out_and_told(tmp_path: Path) -> None:
    columns = {field.name: pa.array([0, 1, 2]).cast(field.type) for field in POST_SCHEMA}
    path = tmp_path / "sel.parquet"
    pq.write_table(pa.table(columns, schema=POST_SCHEMA), path)
    sizes = read_selection_sizes(path)
    assert sizes.widths.tolist() == sizes.heights.tolist() == [1, 2]
    assert "1 without a size left out" in sizes.source and not sizes.exact
    for name, other in (("image_width", "image_height"), ("image_height", "image_width")):
        one_side = columns | {
            name: pa.array([0, 0, 2], columns[name].type),
            other: pa.array([5, 5, 1], columns[other].type),
        }
        pq.write_table(pa.table(one_side, schema=POST_SCHEMA), path)
        assert "2 without a size left out" in read_selection_sizes(path).source
    pq.write_table(pa.table(columns, schema=POST_SCHEMA).slice(1), path)
    assert "left out" not in read_selection_sizes(path).source
    pq.write_table(pa.table(columns, schema=POST_SCHEMA).slice(0, 1), path)
    with pytest.raises(NoImages, match="gives no sizes"):
        read_selection_sizes(path)


def test_batch_that_does_not_divide_names_what_would(make_site: MakeSite) -> None:
    effective, _ = load_layers("epsilon", make_site("gpus = 3\nbatch_per_gpu = 4"))
    with pytest.raises(BadBatch, match="no multiple of 12: 3 processes with 4 images each") as fault:
        shape_batch(effective)
    assert "change gpus or effective_batch" in fault.value.next_step
    effective, _ = load_layers("epsilon", make_site("gpus = 4\nbatch_per_gpu = 3"))
    with pytest.raises(BadBatch) as fault:
        shape_batch(effective)
    assert "batch_per_gpu may be 1, 2, 4, 8" in fault.value.next_step
