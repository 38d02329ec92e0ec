"""What a training will read of its images: the rows in their order, and digests of them that do not name a place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.formats.caption_rows import ImageSizes, NoImages, open_captions, read_about, read_folder_sizes

CACHE_FILE = "metadata_cache.json"
"""What sd-scripts reads in place of a folder's files where `cache_info` is set."""

SMALL_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")

IMAGE_ENDINGS = (*SMALL_ENDINGS, *(ending.upper() for ending in SMALL_ENDINGS))
"""Of the files that sd-scripts takes for images."""

DEFAULT_CAPTION_EXTENSION = ".caption"
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
        )


def read_training_sizes(effective: Effective, images: Path) -> ImageSizes:
    """The sizes of the images that this template's dataset would train. Raises NoImages."""
    if effective.get("kwrap.data") != "sd-scripts":
        return read_folder_sizes(images)
    return read_trainer_rows(images, effective.subtable("dataset_options", with_defaults=True)).as_sizes()


def describe_data(data: str, images: Path, dataset: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a lock's [inputs] over what `dataset`'s options have the trainer read. Raises NoImages.

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
    table = open_captions(images).read_all()
    numbers = (table["id"].to_numpy(), table["width"].to_numpy(), table["height"].to_numpy())
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
    if not images.is_dir():
        raise NoImages(f"{images}: no such folder", "Fix paths.images in the site, or image_dir in dataset.toml.")
    cache = images / CACHE_FILE
    if dataset.get("cache_info") and cache.is_file():
        return read_cache(images, cache)
    paths = sorted(str(path) for path in images.iterdir() if path.name.endswith(IMAGE_ENDINGS) and path.name[0] != ".")
    if not paths:
        raise NoImages(
            f"{images}: no image lies in it, and sd-scripts' own dataset looks into no sub-folder",
            f"Write {CACHE_FILE} with `kwrap caption` (--format cache) and set cache_info, "
            'or train with data = "kwrap" in [kwrap].',
        )
    extension = str(dataset.get("caption_extension") or DEFAULT_CAPTION_EXTENSION)
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        captions = list(threads.map(lambda path: read_caption(path, extension), paths))
        sizes = list(threads.map(read_size, paths))
    files = [relative_to(path, images) for path in paths]
    return TrainerRows(images, f"the images in {images} and their {extension} files", files, captions, as_pairs(sizes))


def read_cache(images: Path, cache: Path) -> TrainerRows:
    """The rows of a `metadata_cache.json`. Raises NoImages."""
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
        captions = [str(entry["caption"] or "") for entry in entries.values()]
        sizes = as_pairs([entry["resolution"] for entry in entries.values()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoImages(
            f"{cache}: not what sd-scripts reads ({error!r})", "Make it again with `kwrap caption`."
        ) from None
    if not captions:
        raise NoImages(f"{cache}: lists no image", "Run `kwrap extract` and `kwrap caption` again.")
    return TrainerRows(images, str(cache), [relative_to(path, images) for path in entries], captions, sizes)


def as_pairs(sizes: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """(images, 2) whole numbers; raises ValueError for anything else."""
    pairs = np.array(sizes, dtype=np.int64)
    if len(sizes) and pairs.shape != (len(sizes), 2):
        raise ValueError("a resolution is not a width and a height")
    return pairs


def read_caption(image: str, extension: str) -> str:
    """The text of the image's caption file, by the two names that sd-scripts tries; empty where there is none."""
    stem = str(Path(image).with_suffix(""))
    words = stem.split("_")
    names = [stem, "_".join(words[:-4])] if len(words) >= 5 else [stem]
    for name in names:
        try:
            return Path(name + extension).read_text(encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
    return ""


def read_size(image: str) -> tuple[int, int]:
    """Width and height from the image's header. Raises NoImages for a broken one."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            return opened.size
    except (OSError, ValueError) as error:
        raise NoImages(f"{image}: its size cannot be read ({error})", "Fix the image, or move it away.") from None


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
    """The sha256 over the length in bytes of each file; a missing one counts as -1."""
    chunks = [files[start : start + STAT_CHUNK] for start in range(0, len(files), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        return digest_of(threads.map(lambda chunk: lengths_of(folder, chunk), chunks))


def lengths_of(folder: Path, files: Sequence[str]) -> bytes:
    """The length of each file as little-endian 64-bit numbers."""
    lengths = np.empty(len(files), dtype="<i8")
    for index, file in enumerate(files):
        try:
            lengths[index] = (folder / file).stat().st_size
        except OSError:
            lengths[index] = -1
    return lengths.tobytes()


def digest_of(pieces: Iterator[bytes]) -> str:
    """The sha256 in hex over pieces of bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
