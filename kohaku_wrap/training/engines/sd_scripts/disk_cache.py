"""sd-scripts' own latents on the disk: kept in the run's folder, whole before the first step or made again as a whole.

The trainer writes one file an image beside the images, takes whatever lies there already, and draws each sample from
where its generator happens to stand. In the run's folder nothing lies but what the run wrote; a caching that was killed
begins again, under the same draws; and after it every attempt's generator stands at one place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_text
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.torch_streams import seed_generators
from kohaku_wrap.training.records.attempts import Attempt

FOLDER = "latents"
WHOLE = "whole"
"""In it, once every image has its file: how many there are; an earlier kwrap wrote nothing into it."""

DIGITS = 24
CORRUPT = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


class DamagedCacheFile(KwrapError):
    """A file of the trainer's latents is not what it wrote."""


def keep_latents_in_run(attempt: Attempt) -> None:
    """Give the trainer's strategy and datasets a folder of the run for their latents. Raises NoSuchObject."""
    from kohaku_wrap.training.engines.sd_scripts.objects import find_object

    folder, images = attempt.run.folder / FOLDER, attempt.run.find_images()
    strategy, group = find_object("SdSdxlLatentsCachingStrategy"), find_object("DatasetGroup")

    def place(_self: Any, absolute_path: str, image_size: tuple[int, int]) -> str:
        # Relative, so that images may be moved.
        name = os.path.relpath(os.path.realpath(absolute_path), os.path.realpath(images))
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:DIGITS]
        return str(folder / f"{digest}_{image_size[0]:04d}x{image_size[1]:04d}_sdxl.npz")

    strategy.get_latents_npz_path = place
    strategy.load_latents_from_disk = name_damaged(strategy.load_latents_from_disk)
    group.new_cache_latents = make_whole(group.new_cache_latents, folder, attempt.lock.seed)


def name_damaged(load: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer's reader of one file, with failures that name it."""

    def read(self: Any, npz_path: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            return load(self, npz_path, *arguments, **keywords)
        except CORRUPT as error:
            folder = Path(npz_path).parent
            raise DamagedCacheFile(
                f"{npz_path}: damaged: {error}",
                f"Remove {folder} and resume: the trainer encodes the images again, to the same latents.",
            ) from error

    return read


def make_whole(make: Callable[..., None], folder: Path, seed: int) -> Callable[..., None]:
    """The trainer's caching of all images; what a killed one left is removed, and it begins again."""

    def cache(self: Any, model: Any, accelerator: Any) -> None:
        if accelerator.is_main_process and not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        accelerator.wait_for_everyone()
        make(self, model, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_text(folder / WHOLE, str(count_files(folder)))
        # What follows draws the network: from one place, whether images were encoded just now or not.
        seed_generators(seed_of("after caching", seed))

    return cache


def is_whole(folder: Path) -> bool:
    """Whether every file is there: one that was removed would be made again from other draws."""
    try:
        told = (folder / WHOLE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return told in ("", str(count_files(folder)))


def count_files(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.npz"))
