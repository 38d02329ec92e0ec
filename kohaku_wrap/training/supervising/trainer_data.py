"""What sd-scripts' own dataset reads in an attempt: the run's copy of `metadata_cache.json`, with paths of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kohaku_wrap.config.run_files import DATASET_FILE, merge_subsets
from kohaku_wrap.config.training_data import CACHE_FILE, load_cache
from kohaku_wrap.files import atomic_write, write_text
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.training.supervising.places import Places, map_places


def write_trainer_data(places: Places) -> None:
    """Write the copy and a dataset.toml that names it, for data = "sd-scripts" with a cache; else remove what is there.

    sd-scripts takes paths of the cache as they stand, and relative ones from its working folder. Raises NoImages.
    """
    run, images = places.run, places.images
    shutil.rmtree(run.trainer_data, ignore_errors=True)
    if run.lock.data != "sd-scripts":
        return
    cached = [Path(str(each["image_dir"])) for each in merge_subsets(places.dataset) if each.get("cache_info")]
    own: dict[str, Path] = {}
    for number, folder in enumerate(folder for folder in cached if (folder / CACHE_FILE).is_file()):
        # The trainer writes the folder's last name into its networks.
        copy = run.trainer_data / str(number) / folder.name
        with atomic_write(copy / CACHE_FILE) as stream:
            entries = load_cache(images, folder / CACHE_FILE).items()
            json.dump({(images / file).absolute().as_posix(): entry for file, entry in entries}, stream)
        own[str(folder)] = copy
    if own:
        dataset = map_places(places.dataset, lambda _, text: str(own.get(str(text), text)))
        write_text(run.trainer_data / DATASET_FILE, toml_text(dataset))
