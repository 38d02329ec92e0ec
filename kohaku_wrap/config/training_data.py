"""What a training will read of its images: the rows in their order, and digests of them that do not name a place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.config.run_files import flatten_dataset, merge_subsets
from kohaku_wrap.config.trainer_rows import (
    STAT_THREADS,
    check_trainer_texts,
    digest_of,
    find_caption_extension,
    read_trainer_rows,
)
from kohaku_wrap.config.validation import settle_held_out
from kohaku_wrap.dataset.own.notes import note_whole
from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.formats.caption_rows import (
    OWN_STYLE,
    ImageSizes,
    NoImages,
    open_captions,
    read_folder_sizes,
    read_subsets,
)
from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.formats.schema_notes import read_notes
from kohaku_wrap.wording import name_first

STAT_CHUNK = 512

MOST_LENGTHS = 65_536
"""Image files whose length is looked at, spread evenly: asking a network file system for millions takes minutes."""


PUT_BACK = "Put them back, or make the folder again by `kwrap extract` or `kwrap import`"


class ImagesGone(KwrapError):
    """Image files of the dataset are not there."""


def read_training_sizes(effective: Effective, images: Path) -> ImageSizes:
    """The sizes of the images that this template's dataset would train; those held out are in no epoch.

    Raises NoImages, TooManyHeldOut.
    """
    if effective.get("kwrap.data") != "sd-scripts":
        return leave_out(read_folder_sizes(images), settle_held_out(effective, images), images)
    return read_trainer_rows(images, flatten_dataset(compose_dataset(effective, images))).as_sizes()


def leave_out(sizes: ImageSizes, held_out: HeldOut | None, images: Path) -> ImageSizes:
    """The same with no repeat of the posts that are held out."""
    if held_out is None:
        return sizes
    ids = open_captions(images).read_all()["id"].to_numpy()
    repeats = np.where(held_out.mark(ids), 0, sizes.repeats)
    return replace(sizes, repeats=repeats, measured=np.isin(ids, held_out.posts))


def compose_dataset(effective: Effective, images: Path) -> dict[str, Any]:
    """dataset.toml: one dataset; a subset for each of an imported folder, otherwise the folder is the only one.

    Raises NoImages where it cannot be said which captions are meant.
    """
    dataset: dict[str, Any] = {"batch_size": shape_batch(effective).batch_per_gpu}
    subset: dict[str, Any] = {"image_dir": str(images)}
    for name, value in effective.subtable("dataset_options").items():
        level = effective.table.dataset_options[name].level
        (dataset if level == "dataset" else subset)[name] = value
    found = read_subsets(images)
    if effective.get("kwrap.data") == "sd-scripts" and not found and "caption_extension" not in subset:
        subset |= {"caption_extension": extension} if (extension := find_caption_extension(images)) else {}
    subsets = [
        {
            **subset,
            **({"image_dir": str(images / each.name)} if len(found) > 1 else {}),
            **each.options,
            "num_repeats": each.repeats * subset.get("num_repeats", 1),
        }
        for each in found
    ]
    return {"datasets": [{**dataset, "subsets": subsets or [subset]}]}


def check_texts(effective: Effective) -> list[Problem]:
    """What sd-scripts' own dataset would end at in the captions of the site's images; none where they are not there."""
    if effective.site is None or effective.get("kwrap.data") != "sd-scripts" or not effective.get("effective_batch"):
        return []
    images = effective.site.paths.images
    try:
        if images.is_dir():
            check_trainer_texts(images, flatten_dataset(compose_dataset(effective, images)))
    except NoImages as fault:
        return [Problem("paths.images", f"{fault.message}. {fault.next_step}")]
    return []


def note_whole_captions(effective: Effective) -> list[str]:
    """Imported captions that the template would shuffle or drop tags of as a whole, a trigger word with them."""
    if effective.site is None or not (images := effective.site.paths.images).is_dir():
        return []
    try:
        reader = open_captions(images)
    except NoImages:
        return []
    if read_notes(reader.schema).get("style") != OWN_STYLE:
        return []
    table, captions_of = reader.read_all(), {}
    subsets = merge_subsets(compose_dataset(effective, images))
    for place, (options, subset) in enumerate(zip(subsets, read_subsets(images), strict=True)):
        changes = options.get("shuffle_caption") or options.get("caption_tag_dropout_rate")
        if changes and not options.get("keep_tokens"):
            separator = options.get("keep_tokens_separator")
            captions = table["caption"].filter(pc.equal(table["subset"], place)).to_pylist()
            captions_of[subset.name] = [each for each in captions if not separator or separator not in each]
    return note_whole(captions_of)


def describe_data(data: str, images: Path, dataset: Mapping[str, Any], digest: str = "") -> dict[str, str]:
    """The digests of a lock's [inputs] over what `dataset`'s options have the trainer read. Raises NoImages.

    `digest`: of the captions that a run was made with, which a later import may have kept under another name.

    `captions_digest` is over everything but pixels, `rows_digest` over files and sizes, from which the order follows,
    `image_files_digest` over the length in bytes of image files, of MOST_LENGTHS of them where there are more.
    """
    if data == "sd-scripts":
        rows = read_trainer_rows(images, dataset)
        pairs = zip(rows.files, rows.sizes.tolist(), strict=True)
        return {
            "captions_digest": rows.digest,
            "rows_digest": digest_of(json.dumps(pair, ensure_ascii=False).encode() + b"\n" for pair in pairs),
            "image_files_digest": digest_lengths(images, [rows.files[at] for at in spread_evenly(len(rows.files))]),
        }
    table = open_captions(images, digest).read_all()
    names = [name for name in ("id", "width", "height", "repeats", "subset") if name in table.column_names]
    numbers = [table[name].to_numpy() for name in names]
    return {
        "captions_digest": str(read_notes(table.schema).get("digest", "")),
        "rows_digest": digest_of(np.ascontiguousarray(column.astype("<i8")).tobytes() for column in numbers),
        "image_files_digest": digest_lengths(images, table["file"].take(spread_evenly(len(table))).to_pylist()),
    }


def find_absent(effective: Effective, images: Path) -> tuple[str, bool]:
    """How many of the images that a training opens are not there, for people, and whether all are gone; "" for none.

    Of more than MOST_LENGTHS files as many are looked for. Where latents are cached none is opened. Raises NoImages.
    """
    if effective.get("cache.latents"):
        return "", False
    if effective.get("kwrap.data") == "sd-scripts":
        files: Any = read_trainer_rows(images, flatten_dataset(compose_dataset(effective, images))).files
        looked_for = [files[at] for at in spread_evenly(len(files))]
    else:
        files = open_captions(images).read_all()["file"]
        looked_for = files.take(spread_evenly(len(files))).to_pylist()
    gone = [looked_for[at] for at in np.flatnonzero(read_lengths(images, looked_for) < 0).tolist()]
    if not gone:
        return "", False
    of_all = "" if len(looked_for) == len(files) else f" that were looked for, of {len(files):,},"
    return describe_gone(images, gone, len(looked_for), of_all), len(gone) == len(looked_for)


def describe_gone(images: Path, gone: Sequence[str], looked_for: int, of_all: str = "") -> str:
    """How many image files are not there, with the first names."""
    first = images / gone[0]
    target = f"; the first links to {first.readlink()}" if first.is_symlink() else ""
    return f"{images}: {len(gone):,} of {looked_for:,} image files{of_all} are not there: {name_first(gone)}{target}"


def spread_evenly(count: int) -> Int64Array:
    """Which of `count` files to look at: all, or MOST_LENGTHS of them."""
    chosen = min(count, MOST_LENGTHS)
    return np.arange(chosen, dtype=np.int64) * count // max(chosen, 1)


def digest_lengths(folder: Path, files: Sequence[str]) -> str:
    """The sha256 over the length in bytes of each file as little-endian 64-bit numbers; a missing one counts as -1."""
    return digest_of(iter([read_lengths(folder, files).tobytes()]))


def read_lengths(folder: Path, files: Sequence[str]) -> Int64Array:
    """(files,) the length of each in bytes; -1 for one that is not there."""
    chunks = [files[start : start + STAT_CHUNK] for start in range(0, len(files), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = list(threads.map(lambda chunk: lengths_of(folder, chunk), chunks))
    return np.concatenate(found) if found else np.empty(0, dtype="<i8")


def lengths_of(folder: Path, files: Sequence[str]) -> Int64Array:
    """(files,) likewise, one after the other."""
    lengths = np.empty(len(files), dtype="<i8")
    for index, file in enumerate(files):
        try:
            lengths[index] = (folder / file).stat().st_size
        except OSError:
            lengths[index] = -1
    return lengths
