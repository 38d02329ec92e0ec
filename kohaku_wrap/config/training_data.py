"""What a training will read of its images: the rows in their order, and digests of them that do not name a place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.config.run_files import flatten_dataset, merge_subsets
from kohaku_wrap.config.validation import settle_held_out
from kohaku_wrap.dataset.own.report import note_whole
from kohaku_wrap.errors import refusing
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.formats.caption_rows import (
    OWN_STYLE,
    ImageSizes,
    NoImages,
    open_captions,
    read_about,
    read_folder_sizes,
    read_subsets,
)
from kohaku_wrap.formats.held_out import HeldOut

CACHE_FILE = "metadata_cache.json"
"""What sd-scripts reads in place of a folder's files where `cache_info` is set."""

SMALL_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")

IMAGE_ENDINGS = (*SMALL_ENDINGS, *(ending.upper() for ending in SMALL_ENDINGS))
"""Of the files that sd-scripts takes for images."""

DEFAULT_CAPTION_EXTENSION = ".caption"
CAPTION_EXTENSIONS = (".txt", DEFAULT_CAPTION_EXTENSION)
MOST_GUESSES = 64
"""Paths of a cache, of no known place, for which an earlier place of the image folder is looked for."""

STAT_THREADS = 16
STAT_CHUNK = 512

MOST_LENGTHS = 65_536
"""Image files whose length is looked at, spread evenly: asking a network file system for millions takes minutes."""


@dataclass(frozen=True)
class TrainerRows:
    """The images that sd-scripts' own dataset would train, in its order."""

    folder: Path
    """The image folder."""

    source: str
    """What they were read from, for people."""

    files: Sequence[str]
    """Relative to the folder where they lie in it, else absolute."""

    captions: Sequence[str]
    """As they stand in the source, before prefix, suffix and shuffle."""

    sizes: npt.NDArray[np.int64]
    """(images, 2): width and height in pixels."""

    repeats: npt.NDArray[np.int64] | int = 1
    """How often an epoch trains each image, before the template's num_repeats."""

    @property
    def digest(self) -> str:
        """The sha256 over file, caption and size of every row."""
        rows = zip(self.files, self.captions, self.sizes.tolist(), strict=True)
        return digest_of(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)

    def as_sizes(self) -> ImageSizes:
        """For the plan."""
        return ImageSizes(
            self.sizes[:, 0],
            self.sizes[:, 1],
            self.source,
            caption_bytes=sum(len(each.encode()) for each in self.captions),
            repeats=self.repeats,
        )


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


def note_whole_captions(effective: Effective) -> list[str]:
    """Imported captions that the template would shuffle or drop tags of as a whole, a trigger word with them."""
    if effective.site is None or not (images := effective.site.paths.images).is_dir():
        return []
    try:
        reader = open_captions(images)
    except NoImages:
        return []
    if read_about(reader.schema).get("style") != OWN_STYLE:
        return []
    table, notes = reader.read_all(), []
    subsets = merge_subsets(compose_dataset(effective, images))
    for place, (options, subset) in enumerate(zip(subsets, read_subsets(images), strict=True)):
        changes = options.get("shuffle_caption") or options.get("caption_tag_dropout_rate")
        if changes and not options.get("keep_tokens"):
            separator = options.get("keep_tokens_separator")
            captions = table["caption"].filter(pc.equal(table["subset"], place)).to_pylist()
            whole = [each for each in captions if not separator or separator not in each]
            notes += note_whole(f"{subset.name}:", whole)
    return notes


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
        "captions_digest": str(read_about(table.schema).get("digest", "")),
        "rows_digest": digest_of(np.ascontiguousarray(column.astype("<i8")).tobytes() for column in numbers),
        "image_files_digest": digest_lengths(images, table["file"].take(spread_evenly(len(table))).to_pylist()),
    }


def read_trainer_rows(images: Path, dataset: Mapping[str, Any]) -> TrainerRows:
    """What sd-scripts' own dataset reads: the cache where `cache_info` is set and it is there, else the folder's files.

    Sub-folders are not looked into without the cache. Raises NoImages.
    Source: DreamBoothDataset in library/train_util.py at v0.10.1.
    """
    if subsets := read_subsets(images):
        places = [images / each.name for each in subsets] if len(subsets) > 1 else [images]
        parts = [read_cache(images, place / CACHE_FILE) for place in places]
        repeats = np.repeat([each.repeats for each in subsets], [len(part.files) for part in parts])
        files, captions = ([each for part in parts for each in getattr(part, name)] for name in ("files", "captions"))
        return TrainerRows(
            images, f"the images in {images}", files, captions, np.concatenate([each.sizes for each in parts]), repeats
        )
    if not images.is_dir():
        raise NoImages(f"{images}: no such folder", "Fix paths.images in the site, or image_dir in dataset.toml.")
    cache = images / CACHE_FILE
    if dataset.get("cache_info") and cache.is_file():
        return read_cache(images, cache)
    paths = sorted(str(path) for path in images.iterdir() if path.name.endswith(IMAGE_ENDINGS) and path.name[0] != ".")
    if not paths:
        raise NoImages(
            f"{images}: no image lies in it, and sd-scripts' own dataset looks into no sub-folder",
            f"Gather them with `kwrap import {images} --out IMAGES`, which also reads N_name folders.",
        )
    extension = str(dataset.get("caption_extension") or DEFAULT_CAPTION_EXTENSION)
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = list(
            threads.map(lambda path: read_caption(path, extension, bool(dataset.get("enable_wildcard"))), paths)
        )
        sizes = list(threads.map(read_size, paths))
    captions = [str(dataset.get("class_tokens") or "") if caption is None else caption for caption in found]
    lacking = f"; {found.count(None):,} of them have none" if None in found else ""
    files = [relative_to(path, images) for path in paths]
    source = f"the images in {images} and their {extension} files{lacking}"
    return TrainerRows(images, source, files, captions, as_pairs(sizes))


def find_caption_extension(images: Path) -> str | None:
    """The ending of the folder's caption files where it is not the trainer's own default; None else.

    Raises NoImages where texts of two endings lie there: neither is chosen.
    """
    if (images / CACHE_FILE).is_file() or not images.is_dir():
        return None
    endings = {path.suffix for path in images.iterdir() if path.suffix in CAPTION_EXTENSIONS}
    if len(endings) > 1:
        raise NoImages(
            f"{images}: both .txt and .caption files lie in it, and captions come from one of them",
            'Say which: --set dataset_options.caption_extension=".txt"',
        )
    return endings.pop() if endings - {DEFAULT_CAPTION_EXTENSION} else None


def read_cache(images: Path, cache: Path) -> TrainerRows:
    """The rows of a `metadata_cache.json`. Raises NoImages."""
    entries = load_cache(images, cache)
    try:
        captions = [str(entry["caption"] or "") for entry in entries.values()]
        sizes = as_pairs([entry["resolution"] for entry in entries.values()])
    except (ValueError, KeyError, TypeError) as error:
        raise not_a_cache(cache, error) from None
    if not captions:
        raise NoImages(f"{cache}: lists no image", "Run `kwrap extract` and `kwrap caption` again.")
    return TrainerRows(images, str(cache), list(entries), captions, sizes)


def load_cache(images: Path, cache: Path) -> dict[str, Any]:
    """The entries of a `metadata_cache.json` by file, relative to the image folder where it lies in it.

    Raises NoImages. Its paths may be those of a place where the folder lay before: a file that is in the folder by the
    end of its path is taken for that one, and those beside it likewise.
    """
    try:
        entries = dict(parse_json(read_regular(cache)).items())
        paths = list(map(Path, entries))
    except (OSError, ValueError, AttributeError) as error:
        raise not_a_cache(cache, error) from None
    bases = [images.absolute(), images.resolve()]
    guesses = MOST_GUESSES
    files = []
    for path in paths:
        base = next((base for base in bases if path.is_relative_to(base)), None)
        if base is None and guesses and path.is_absolute():
            guesses -= 1
            if base := find_old_folder(path, images):
                bases.append(base)
        files.append((path.relative_to(base) if base else path).as_posix())
    return dict(zip(files, entries.values(), strict=True))


def find_old_folder(path: Path, images: Path) -> Path | None:
    """Where the image folder lay when a path of an image in it was written; None for an image that it does not have."""
    for at in range(1, len(path.parts)):
        if images.joinpath(*path.parts[at:]).is_file():
            return Path(*path.parts[:at])
    return None


def not_a_cache(cache: Path, error: Exception) -> NoImages:
    """The error for a file that sd-scripts would fail at."""
    return NoImages(f"{cache}: not what sd-scripts reads ({error!r})", "Make it again with `kwrap caption`.")


def as_pairs(sizes: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """(images, 2) whole numbers; raises ValueError for anything else."""
    pairs = np.array(sizes, dtype=np.int64)
    if len(sizes) and pairs.shape != (len(sizes), 2):
        raise ValueError("a resolution is not a width and a height")
    return pairs


def read_caption(image: str, extension: str, all_lines: bool = False) -> str | None:
    """The text of the image's caption file, by the two names that sd-scripts tries; None where there is none.

    It is the first line, or `all_lines` that are not empty. Raises NoImages for a text that the trainer fails at.
    """
    stem = str(Path(image).with_suffix(""))
    words = stem.split("_")
    names = [stem, "_".join(words[:-4])] if len(words) >= 5 else [stem]
    for path in (Path(name + extension) for name in names):
        try:
            text = read_regular(path)
        except UnicodeDecodeError as error:
            raise NoImages(
                f"{path}: not UTF-8 ({error.reason})", "Save it as UTF-8; sd-scripts reads no other."
            ) from None
        except OSError:
            continue
        if not text:
            raise NoImages(f"{path}: empty, at which sd-scripts ends", "Write a caption into it, or remove it.")
        lines = text.split("\n")
        return "\n".join(line.strip() for line in lines if line.strip()) if all_lines else lines[0].strip()
    return None


def read_size(image: str) -> tuple[int, int]:
    """Width and height from the image's header. Raises NoImages for a broken one."""
    from PIL import Image

    fix = "Fix the image, or move it away."
    with refusing(NoImages, f"{image}: its size cannot be read", fix), Image.open(image) as opened:
        return opened.size


def relative_to(path: str, folder: Path) -> str:
    """The path below the folder with forward slashes; absolute where it lies elsewhere."""
    place = Path(path)
    for base in (folder.absolute(), folder.resolve()):
        if place.is_relative_to(base):
            return place.relative_to(base).as_posix()
    return place.as_posix()


def spread_evenly(count: int) -> npt.NDArray[np.int64]:
    """Which of `count` files to look at: all, or MOST_LENGTHS of them."""
    chosen = min(count, MOST_LENGTHS)
    return np.arange(chosen, dtype=np.int64) * count // max(chosen, 1)


def digest_lengths(folder: Path, files: Sequence[str]) -> str:
    """The sha256 over the length in bytes of each file as little-endian 64-bit numbers; a missing one counts as -1."""
    return digest_of(iter([read_lengths(folder, files).tobytes()]))


def read_lengths(folder: Path, files: Sequence[str]) -> npt.NDArray[np.int64]:
    """(files,) the length of each in bytes; -1 for one that is not there."""
    chunks = [files[start : start + STAT_CHUNK] for start in range(0, len(files), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = list(threads.map(lambda chunk: lengths_of(folder, chunk), chunks))
    return np.concatenate(found) if found else np.empty(0, dtype="<i8")


def lengths_of(folder: Path, files: Sequence[str]) -> npt.NDArray[np.int64]:
    """(files,) likewise, one after the other."""
    lengths = np.empty(len(files), dtype="<i8")
    for index, file in enumerate(files):
        try:
            lengths[index] = (folder / file).stat().st_size
        except OSError:
            lengths[index] = -1
    return lengths


def digest_of(pieces: Iterator[bytes]) -> str:
    """The sha256 in hex over pieces of bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
