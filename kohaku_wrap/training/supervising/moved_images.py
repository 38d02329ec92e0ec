"""Images at a new place: whether all are there, and whether drawn ones are the same files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kohaku_wrap.config.training_data import read_lengths, read_trainer_rows
from kohaku_wrap.dataset.own.images import read_imported
from kohaku_wrap.errors import Problem
from kohaku_wrap.files import sha256_of_file
from kohaku_wrap.formats.caption_rows import NoImages, open_captions
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.supervising.places import Places

DRAWN = 100
"""Images whose sha256 is compared after a move."""

NAMES_SHOWN = 3


def compare_moved_images(places: Places, deep: bool) -> tuple[list[Problem], list[str]]:
    """Problems and notes about images that lie elsewhere than at the attempt before, or all of them with `deep`.

    Looked at: that all files are there, and the sha256 of 100 drawn ones, with `deep` of all, where it is known: of
    imported images that were linked or copied. Lengths are compared by the lock's digest, moved or not.
    """
    folder = places.images
    if not places.run.lock.dataset_digest or not (deep or str(folder) != places.remembered.images):
        return [], []
    try:
        files = list_files(places)
    except NoImages:
        # Runs of kwrap 0.1 may go on without captions that can be read.
        return [], []
    missing = [files[at] for at in np.flatnonzero(read_lengths(folder, files) < 0).tolist()]
    if missing:
        return [
            Problem("image_files", f"{folder}: {len(missing):,} of {len(files):,} are not there: {name(missing)}")
        ], []
    known = {image.file: image.sha256 for image in read_imported(folder).values() if image.how in ("linked", "copied")}
    chosen = sorted(known.keys() & set(files))
    if not deep:
        chosen = list(draw(chosen))
    other = [file for file in chosen if sha256_of_file(folder / file) != known[file]]
    if other:
        return [
            Problem("image_files", f"{folder}: {len(other):,} of {len(chosen):,} are other files: {name(other)}")
        ], []
    compared = f"the sha256 of {len(chosen):,} is the same" if chosen else "their sha256 is not known"
    return [], [f"images: all {len(files):,} are at {folder}; {compared}"]


def list_files(places: Places) -> list[str]:
    """The run's images, relative to their folder."""
    lock = places.run.lock
    if lock.data == "sd-scripts":
        return list(read_trainer_rows(places.images, places.dataset_options).files)
    files: list[str] = open_captions(places.images, lock.dataset_digest).read_all()["file"].to_pylist()
    return files


def draw(files: list[str]) -> Iterator[str]:
    """DRAWN of them, the same ones each time."""
    order = np.argsort(draws(stream_key("moved images"), np.arange(len(files))))
    return (files[at] for at in np.sort(order[:DRAWN]).tolist())


def name(files: list[str]) -> str:
    """The first few, for people."""
    return ", ".join(files[:NAMES_SHOWN]) + (", …" if len(files) > NAMES_SHOWN else "")
