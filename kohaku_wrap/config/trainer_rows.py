"""What sd-scripts' own dataset would read of an image folder: its files or its cache, in its order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.formats import CACHE_FILE
from kohaku_wrap.dataset.own.folders import IMAGE_ENDINGS, TEXT_ENDINGS
from kohaku_wrap.errors import DAMAGE, refusing
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.formats.caption_rows import ImageSizes, NoImages, Subset, read_subsets
from kohaku_wrap.wording import name_first

ENDINGS = (*IMAGE_ENDINGS, *(ending.upper() for ending in IMAGE_ENDINGS))
DEFAULT_CAPTION_EXTENSION = ".caption"
FIXES = {"empty": "Write a caption into each empty one, or remove it.", "not UTF-8": "Save as UTF-8 what is not."}
"""What to do about a caption file at which sd-scripts ends."""

MOST_GUESSES = 64
"""Paths of a cache, of no known place, for which an earlier place of the image folder is looked for."""

STAT_THREADS = 16


@dataclass(frozen=True)
class TrainerRows:
    """The images that sd-scripts' own dataset would train, in its order."""

    source: str
    """What they were read from, for people."""

    files: Sequence[str]
    """Relative to the folder where they lie in it, else absolute."""

    captions: Sequence[str]
    """As they stand in the source, before prefix, suffix and shuffle."""

    sizes: Int64Array
    """(images, 2): width and height in pixels."""

    repeats: Int64Array | int = 1
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


def read_trainer_rows(images: Path, dataset: Mapping[str, Any]) -> TrainerRows:
    """What sd-scripts' own dataset reads: the cache where `cache_info` is set and it is there, else the folder's files.

    Sub-folders are not looked into without the cache. Raises NoImages.
    Source: DreamBoothDataset in library/train_util.py at v0.10.1, library/dreambooth_dataset.py at v0.11.1.
    """
    if subsets := read_imported_subsets(images, dataset):
        places = [images / each.name for each in subsets] if len(subsets) > 1 else [images]
        parts = [read_cache(images, place / CACHE_FILE) for place in places]
        repeats = np.repeat([each.repeats for each in subsets], [len(part.files) for part in parts])
        files, captions = ([each for part in parts for each in getattr(part, name)] for name in ("files", "captions"))
        every = np.concatenate([each.sizes for each in parts])
        return TrainerRows(f"the images in {images}", files, captions, every, repeats)
    if reads_cache(images, dataset):
        return read_cache(images, images / CACHE_FILE)
    paths = list_images(images)
    found = read_texts(images, paths, dataset)
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        sizes = list(threads.map(read_size, paths))
    if broken := [Path(path).name for path, size in zip(paths, sizes, strict=True) if size is None]:
        raise NoImages(
            f"{images}: {len(broken):,} of {len(paths):,} images cannot be read, or link to nothing: "
            f"{name_first(broken)}",
            "Fix them, or move them away.",
        )
    captions = [str(dataset.get("class_tokens") or "") if caption is None else caption for caption in found]
    source = f"the images in {images} and their {extension_of(dataset)} files"
    if lacking := found.count(None):
        source += f"; {lacking:,} without one"
    if blank := found.count(""):
        source += f"; {blank:,} with an empty first line, trained with an empty caption"
    if below := count_below(images):
        source += f"; {below:,} in sub-folders are not trained"
    whole = [size for size in sizes if size is not None]
    return TrainerRows(source, [relative_to(path, images) for path in paths], captions, as_pairs(whole))


def check_trainer_texts(images: Path, dataset: Mapping[str, Any]) -> None:
    """Read the captions as `read_trainer_rows` does, but no image. Raises NoImages."""
    if not read_imported_subsets(images, dataset) and not reads_cache(images, dataset):
        read_texts(images, list_images(images), dataset)


def read_imported_subsets(images: Path, dataset: Mapping[str, Any]) -> list[Subset]:
    """The subsets of an imported folder, none for another one.

    Raises NoImages where sd-scripts would look for their captions beside the images, where none are.
    """
    subsets = read_subsets(images)
    if subsets and not dataset.get("cache_info"):
        raise NoImages(
            f"{images}: the captions of imported images lie in {CACHE_FILE}, which sd-scripts reads with "
            "cache_info = true alone",
            'Set it under [dataset_options] of the template, or data = "kwrap" under its [kwrap].',
        )
    return subsets


def count_below(images: Path) -> int:
    """Images in sub-folders, hidden ones left out."""
    number = 0
    for parent, folders, files in os.walk(images):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if Path(parent) != images:
            number += sum(name.endswith(ENDINGS) and name[0] != "." for name in files)
    return number


def reads_cache(images: Path, dataset: Mapping[str, Any]) -> bool:
    """Whether sd-scripts reads the folder's cache in place of its files."""
    return bool(dataset.get("cache_info")) and (images / CACHE_FILE).is_file()


def list_images(images: Path) -> list[str]:
    """The images directly in a folder, as sd-scripts sorts them. Raises NoImages for none."""
    if not images.is_dir():
        raise NoImages(f"{images}: no such folder", "Fix paths.images in the site, or image_dir in dataset.toml.")
    paths = sorted(str(path) for path in images.iterdir() if path.name.endswith(ENDINGS) and path.name[0] != ".")
    if not paths:
        raise NoImages(
            f"{images}: no image lies in it, and sd-scripts' own dataset looks into no sub-folder",
            f"Gather them with `kwrap import {images} --out IMAGES`, which also reads N_name folders.",
        )
    return paths


def extension_of(dataset: Mapping[str, Any]) -> str:
    """The ending of caption files."""
    return str(dataset.get("caption_extension") or DEFAULT_CAPTION_EXTENSION)


def find_caption_extension(images: Path) -> str | None:
    """The ending of the folder's caption files where it is not the trainer's own default; None else.

    Raises NoImages where texts of two endings lie there: neither is chosen.
    """
    if (images / CACHE_FILE).is_file() or not images.is_dir():
        return None
    endings = {path.suffix for path in images.iterdir() if path.suffix in TEXT_ENDINGS}
    if len(endings) > 1:
        raise NoImages(
            f"{images}: both .txt and .caption files lie in it, and captions come from one of them",
            'Say which: --set dataset_options.caption_extension=".txt"',
        )
    return endings.pop() if endings - {DEFAULT_CAPTION_EXTENSION} else None


def read_cache(images: Path, cache: Path) -> TrainerRows:
    """The rows of a `metadata_cache.json`. Raises NoImages."""
    entries = load_cache(images, cache)
    with reading_cache(cache):
        captions = [str(entry["caption"] or "") for entry in entries.values()]
        sizes = as_pairs([entry["resolution"] for entry in entries.values()])
    if not captions:
        raise NoImages(f"{cache}: lists no image", "Run `kwrap extract` and `kwrap caption` again.")
    return TrainerRows(str(cache), list(entries), captions, sizes)


def load_cache(images: Path, cache: Path) -> dict[str, Any]:
    """The entries of a `metadata_cache.json` by file, relative to the image folder where it lies in it.

    Raises NoImages. Its paths may be those of a place where the folder lay before: a file that is in the folder by the
    end of its path is taken for that one, and those beside it likewise.
    """
    with reading_cache(cache):
        entries = dict(parse_json(read_regular(cache)).items())
        paths = list(map(Path, entries))
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


def reading_cache(cache: Path) -> AbstractContextManager[None]:
    """Refuse, as NoImages, a file that sd-scripts would fail at."""
    return refusing(NoImages, f"{cache}: not what sd-scripts reads", "Make it again with `kwrap caption`.")


def as_pairs(sizes: Sequence[Sequence[int]]) -> Int64Array:
    """(images, 2) whole numbers; raises ValueError for anything else."""
    pairs = np.array(sizes, dtype=np.int64)
    if len(sizes) and pairs.shape != (len(sizes), 2):
        raise ValueError("a resolution is not a width and a height")
    return pairs


@dataclass(frozen=True)
class FaultyText:
    """A caption file at which sd-scripts ends."""

    name: str
    """Of the file."""

    what: str
    """One of FIXES."""


def read_texts(images: Path, paths: Sequence[str], dataset: Mapping[str, Any]) -> list[str | None]:
    """The caption of each image's file; None where there is none. Raises NoImages with all that the trainer ends at."""
    extension, all_lines = extension_of(dataset), bool(dataset.get("enable_wildcard"))
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = list(threads.map(lambda path: read_caption(path, extension, all_lines), paths))
    faults: dict[str, list[str]] = {}
    for each in found:
        if isinstance(each, FaultyText):
            faults.setdefault(each.what, []).append(each.name)
    if faults:
        there = len(found) - found.count(None)
        raise NoImages(
            f"{images}: sd-scripts ends at {sum(map(len, faults.values())):,} of {there:,} caption files: "
            + "; ".join(f"{what} {name_first(names)}" for what, names in faults.items()),
            " ".join(FIXES[what] for what in faults),
        )
    return [each for each in found if not isinstance(each, FaultyText)]


def read_caption(image: str, extension: str, all_lines: bool = False) -> str | FaultyText | None:
    """The text of the image's caption file, by the two names that sd-scripts tries; None where there is none.

    It is the first line, or `all_lines` that are not empty.
    """
    stem = str(Path(image).with_suffix(""))
    words = stem.split("_")
    names = [stem, "_".join(words[:-4])] if len(words) >= 5 else [stem]
    for path in (Path(name + extension) for name in names):
        try:
            text = read_regular(path)
        except UnicodeDecodeError:
            return FaultyText(path.name, "not UTF-8")
        except OSError:
            continue
        if not text:
            return FaultyText(path.name, "empty")
        lines = text.split("\n")
        return "\n".join(line.strip() for line in lines if line.strip()) if all_lines else lines[0].strip()
    return None


def read_size(image: str) -> tuple[int, int] | None:
    """Width and height from the image's header; None for a broken one."""
    from PIL import Image

    with suppress(*DAMAGE, Image.DecompressionBombError), Image.open(image) as opened:
        return opened.size
    return None


def relative_to(path: str, folder: Path) -> str:
    """The path below the folder with forward slashes; absolute where it lies elsewhere."""
    place = Path(path)
    for base in (folder.absolute(), folder.resolve()):
        if place.is_relative_to(base):
            return place.relative_to(base).as_posix()
    return place.as_posix()


def digest_of(pieces: Iterator[bytes]) -> str:
    """The sha256 in hex over pieces of bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
