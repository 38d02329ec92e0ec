"""Shards and index of cached latents: what is written is what is read, and what changed on the disk is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from kohaku_wrap.training.data.latent_index import (
    COPY_FILE,
    INDEX_FILE,
    SHARD_IMAGES,
    BadIndex,
    Index,
    Wanted,
    extend_index,
)
from kohaku_wrap.training.data.latent_rules import make_rule
from kohaku_wrap.training.data.latent_shards import (
    DamagedLatents,
    ShardShape,
    check_shard,
    read_record,
    stamp_of,
    write_shard,
)
from kohaku_wrap.training.data.latent_store import LatentStore, NoLatents, Rule
from kohaku_wrap.training.starting.caching import find_damaged

RULE = make_rule({"keep": "moments", "precision": "fp32"}, {}, [{"resolution": 64}], "0" * 64, 7)


def wanted(ids: list[int], size: tuple[int, int] = (64, 32)) -> Wanted:
    return Wanted(np.array(ids), np.tile(np.array(size, np.int32), (len(ids), 1)), np.array(ids) * 10)


def record_of(shape: ShardShape, image_id: int) -> np.ndarray:
    return np.random.default_rng(image_id).normal(size=(shape.variants, *shape.record_shape)).astype(np.float32)


def make(folder: Path, rule: Rule, index: Index) -> None:
    """Every shard that is not there, of random numbers that follow from the ids."""
    for shape in index.shapes:
        if read_record(folder, shape) is None:
            ids = index.ids[index.shards == shape.number]
            write_shard(folder, shape, ids, (record_of(shape, each) for each in ids.tolist()), rule.fingerprint, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path, RULE, extend_index(tmp_path, RULE, wanted([3, 5, 9])))
    return tmp_path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("flips", [False, True])
def test_each_record_is_read_as_it_was_written(tmp_path: Path, precision: str, flips: bool) -> None:
    rule = dataclasses.replace(RULE, precision=precision, flips=flips)
    index = extend_index(tmp_path, rule, wanted([3, 5, 9]))
    make(tmp_path, rule, index)
    [shape] = index.shapes
    images = [(9, flips), (3, False), (5, flips)]
    batch = LatentStore(tmp_path, rule).read_batch(images)
    stored = np.float16 if precision == "fp16" else np.float32
    assert batch.dtype == stored
    for found, (image_id, is_flipped) in zip(batch, images, strict=True):
        assert np.array_equal(found, record_of(shape, image_id)[int(is_flipped)].astype(stored))
    tensors = load_file(shape.file_in(tmp_path))
    assert tensors["ids"].tolist() == [3, 5, 9]
    assert tensors["latents"].shape == (3, 1 + flips, 8, 4, 8)


def test_shards_hold_a_thousand_images_of_one_size_in_the_order_of_ids(tmp_path: Path) -> None:
    ids = np.arange(2 * SHARD_IMAGES + 7) * 3
    sizes = np.where((ids % 2 == 0)[:, None], (64, 64), (32, 96)).astype(np.int32)
    index = extend_index(tmp_path, RULE, Wanted(ids, sizes, ids))
    assert [(shape.width, shape.height, shape.count) for shape in index.shapes] == [
        (32, 96, SHARD_IMAGES),
        (32, 96, 3),
        (64, 64, SHARD_IMAGES),
        (64, 64, 4),
    ]
    for number in range(4):
        assert index.slots[index.shards == number].tolist() == list(range(index.shapes[number].count))


def test_new_images_get_new_shards_and_the_others_stay(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("0*")}
    index = extend_index(folder, RULE, wanted([2, 3, 5, 7, 9]))
    make(folder, RULE, index)
    assert [shape.count for shape in index.shapes] == [3, 2]
    assert {name: (folder / name).read_bytes() for name in before} == before
    store = LatentStore(folder, RULE)
    store.require(np.array([2, 3, 5, 7, 9]))
    assert np.array_equal(store.read_batch([(7, False)])[0], record_of(index.shapes[1], 7)[0])


def test_an_image_whose_file_changed_gets_a_new_place(folder: Path) -> None:
    changed = dataclasses.replace(wanted([3, 5, 9]), lengths=np.array([30, 51, 90]))
    index = extend_index(folder, RULE, changed)
    assert [shape.count for shape in index.shapes] == [3, 1]
    assert index.shards[index.find(np.array([3, 5, 9]))].tolist() == [0, 1, 0]


def test_the_same_images_write_no_index_anew(folder: Path) -> None:
    written = (folder / "index.arrow").stat().st_mtime_ns
    extend_index(folder, RULE, wanted([5, 9]))
    assert (folder / "index.arrow").stat().st_mtime_ns == written


@pytest.mark.parametrize("place", ["ids", "latents", "crc32"])
def test_a_flipped_bit_is_found_when_it_is_read_and_when_it_is_checked(folder: Path, place: str) -> None:
    [shape] = Index.open(folder, RULE).shapes
    path = shape.file_in(folder)
    data = bytearray(path.read_bytes())
    data_start = 8 + int.from_bytes(data[:8], "little")
    data[data_start + shape.lay_out()[place].begin] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedLatents, match=f"{shape.name}.safetensors: damaged"):
        LatentStore(folder, RULE).read_batch([(3, False)])
    assert "sha256" in check_shard(folder, shape)


def test_a_whole_check_finds_what_left_no_trace_in_the_times_of_a_file(folder: Path) -> None:
    [shape] = Index.open(folder, RULE).shapes
    record = json.loads(shape.record_in(folder).read_text())
    data = bytearray(shape.file_in(folder).read_bytes())
    data[-1] ^= 1
    shape.file_in(folder).write_bytes(data)
    shape.record_in(folder).write_text(json.dumps({**record, "checked": stamp_of(shape.file_in(folder))}))
    assert check_shard(folder, shape) == ""
    assert "sha256" in check_shard(folder, shape, thorough=True)
    cache: Any = SimpleNamespace(folder=folder, shards=(shape,), index=Index.open(folder, RULE))
    for remove in (False, True):
        [(found, fault)] = find_damaged(cache, True, lambda done, total: None, remove)
        assert found is shape and "sha256" in fault
        assert (read_record(folder, shape) is None) == remove


@pytest.mark.parametrize("ids", [[3, 6, 9], [3, 9]])
def test_a_shard_of_another_folder_is_found_by_a_whole_check(folder: Path, ids: list[int]) -> None:
    """As where a folder was copied while it grew, and others of its images were cached in the copy."""
    [shape], other = Index.open(folder, RULE).shapes, folder / "other"
    make(other, RULE, extend_index(other, RULE, wanted(ids)))
    for path in other.glob("0*"):
        path.replace(folder / path.name)
    with pytest.raises(DamagedLatents):
        LatentStore(folder, RULE).read_batch([(5, False)])
    cache: Any = SimpleNamespace(folder=folder, shards=(shape,), index=Index.open(folder, RULE))
    [(found, fault)] = find_damaged(cache, True, lambda done, total: None, remove=True)
    assert found is shape and fault
    make(folder, RULE, cache.index)
    assert list(find_damaged(cache, True, lambda done, total: None, remove=True)) == []


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_shard_is_named(folder: Path, length: int) -> None:
    [shape] = Index.open(folder, RULE).shapes
    path = shape.file_in(folder)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedLatents, match=shape.name):
        LatentStore(folder, RULE).read_batch([(3, False)])


def test_what_lacks_a_shard_or_its_record_is_said_before_a_training(folder: Path) -> None:
    store = LatentStore(folder, RULE)
    digest = store.require(np.array([3, 9]))
    assert len(digest) == 64
    with pytest.raises(NoLatents, match="1 of 2 images"):
        store.require(np.array([3, 4]))
    store.index.shapes[0].record_in(folder).unlink()
    with pytest.raises(NoLatents, match="1 of 1 shards"):
        store.require(np.array([3]))


def test_an_index_of_another_rule_or_of_noise_is_refused(folder: Path) -> None:
    with pytest.raises(BadIndex, match="fingerprint"):
        Index.open(folder, dataclasses.replace(RULE, precision="fp16"))
    for name in (INDEX_FILE, COPY_FILE):
        (folder / name).write_bytes(b"noise")
    with pytest.raises(BadIndex, match="not an index"):
        Index.open(folder, RULE)


def test_every_part_of_a_rule_has_a_folder_of_its_own() -> None:
    others: list[dict[str, Any]] = [
        {"vae_sha256": "1" * 64},
        {"vae_precision": "bf16"},
        {"keep": "sample"},
        {"precision": "fp16"},
        {"seed": 8},
        {"flips": True},
        {"sizes": {**RULE.sizes, "resolution": (96, 96)}},
        {"interpolations": ("area",)},
    ]
    assert {each for rule in others for each in rule} == {field.name for field in dataclasses.fields(Rule)}
    folders = {dataclasses.replace(RULE, **each).folder_in(Path()) for each in others}
    assert len(folders | {RULE.folder_in(Path())}) == len(others) + 1


def test_a_flipped_bit_of_an_index_is_found_wherever_it_is(folder: Path) -> None:
    whole, path = Index.open(folder, RULE), folder / INDEX_FILE
    data, found = path.read_bytes(), 0
    for place in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            index = Index.read(path, RULE)
        except BadIndex:
            found += 1
        else:
            # Between the columns nothing is said.
            assert index.shapes == whole.shapes
            assert all(np.array_equal(*pair) for pair in zip(index.columns, whole.columns, strict=True))
    assert found > len(data) / 5 / 3


def test_a_damaged_index_is_read_from_its_copy_and_written_again(folder: Path) -> None:
    path = folder / INDEX_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    store = LatentStore(folder, RULE)
    assert np.array_equal(store.read_batch([(5, False)])[0], record_of(store.index.shapes[0], 5)[0])
    assert path.read_bytes() != data
    extend_index(folder, RULE, wanted([3, 5, 9]))
    assert path.read_bytes() == data
    path.unlink()
    half = folder / f".{INDEX_FILE}.7.part"
    half.write_bytes(data[:50])
    assert Index.open(folder, RULE).ids.tolist() == [3, 5, 9]
    extend_index(folder, RULE, wanted([3, 5, 9]))
    assert path.read_bytes() == data and not half.exists()


def test_an_index_of_an_earlier_kwrap_has_no_checksum_and_no_copy(folder: Path) -> None:
    (folder / COPY_FILE).unlink()
    with pa.ipc.open_file(str(folder / INDEX_FILE)) as reader:
        table = reader.read_all()
    about = json.loads(table.schema.metadata[b"kwrap"])
    del about["crc32"]
    schema = table.schema.with_metadata({b"kwrap": json.dumps(about).encode()})
    with pa.ipc.new_file(str(folder / INDEX_FILE), schema) as writer:
        writer.write_table(table.cast(schema))
    assert Index.open(folder, RULE).ids.tolist() == [3, 5, 9]
