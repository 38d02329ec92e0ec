"""Cached latents made ready for a training: what is there, what is still to be made, and the processes that make it."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.kernels import choose_kernels, kernel_settings
from kohaku_wrap.config.render import MissingInput
from kohaku_wrap.config.run_files import merge_subsets
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.training_data import compose_dataset, read_lengths, spread_evenly
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.files import Claims, Progress, clear_leavings, describe_absence, kept_sha256
from kohaku_wrap.formats.caption_rows import Columns
from kohaku_wrap.processes import LineHelper, raise_answer
from kohaku_wrap.training.data.latent_rules import make_rule
from kohaku_wrap.training.data.latent_shards import ShardShape, check_shard, read_record
from kohaku_wrap.training.data.latent_store import Index, LatentStore, NoLatents, Rule, Wanted, extend_index, lay_out
from kohaku_wrap.training.supervising.launch import default_threads
from kohaku_wrap.wording import show_bytes

WORKER = "kohaku_wrap.training.engines.encode_latents"

SPARE_BYTES = 1 << 28
"""Left free on the disk."""

LATENTS_OPTION = "cache.latents"


class NoRoom(KwrapError):
    """The latents do not fit the disk."""


class CachingFailed(KwrapError):
    """A process that encodes images ended, and did not say why."""


@dataclass(frozen=True)
class Cache:
    """The cached latents of a template's images on a site, as far as they are there."""

    effective: Effective
    """The template."""

    site: Site
    """The machine."""

    rule: Rule
    """What decides their bits."""

    columns: Columns
    """The images."""

    wanted: Wanted
    """Their sizes and files."""

    @property
    def folder(self) -> Path:
        """Where they lie: below the site's `latents`, a folder a rule."""
        return self.rule.folder_in(self.site.paths.latents)

    @cached_property
    def index(self) -> Index:
        """Where each image is or will be; new shards stand in it, but nothing is written."""
        return lay_out(Index.open(self.folder, self.rule), self.rule, self.wanted)

    @cached_property
    def shards(self) -> tuple[ShardShape, ...]:
        """Those that hold images of the template."""
        used = np.unique(self.index.shards[self.index.find(self.wanted.ids)])
        return tuple(self.index.shapes[number] for number in used)

    def list_unmade(self) -> tuple[ShardShape, ...]:
        """Shards that are still to be made."""
        return tuple(shape for shape in self.shards if read_record(self.folder, shape) is None)

    def list_nan_images(self) -> list[int]:
        """Images of which the VAE gave no numbers."""
        records = [read_record(self.folder, shape) or {} for shape in self.shards]
        return [image for record in records for image in record.get("nan_images", ())]

    def measure_rate(self) -> float | None:
        """Images a second of one process, as the shards that are there took; None where none is."""
        records = [record for shape in self.shards if (record := read_record(self.folder, shape))]
        seconds = sum(float(record.get("seconds", 0)) for record in records)
        return sum(int(record.get("images", 0)) for record in records) / seconds if seconds else None


def open_cache(
    effective: Effective, site: Site, on_bytes: Callable[[int], None] | None = None, all_files: bool = True
) -> Cache:
    """The cache of a template on a site; `all_files`: look at the length of every image file, else of some.

    Raises UsageError where the template caches nothing, MissingInput, NoImages, ProblemsFound, BadIndex.
    """
    if not effective.get(LATENTS_OPTION):
        raise UsageError(
            f"{effective.name} caches no latents", "Write latents = true into [cache], or add --set cache.latents=true."
        )
    images = site.paths.images
    name, path = ("vae", site.paths.vae) if site.paths.vae else ("base_model", site.paths.base_model)
    if not path.is_file():
        raise MissingInput(f"{path}: {describe_absence(path)} ({name})", f"Fix paths.{name} in {site.path}.")
    subsets = merge_subsets(compose_dataset(effective, images))
    cache = effective.subtable("cache", with_defaults=True)
    vae = kept_sha256(path, on_bytes)
    rule = make_rule(cache, effective.values, subsets, vae, int(effective.get("seed", 0)))
    columns = Columns.open(images)
    buckets = assign_buckets(columns.widths, columns.heights, BucketOptions.from_dataset_options(subsets[0]))
    sizes = buckets.resolutions[buckets.bucket_of_image]
    lengths = find_lengths(columns, Index.open(rule.folder_in(site.paths.latents), rule), all_files)
    return Cache(effective, site, rule, columns, Wanted(columns.ids, sizes, lengths))


def find_lengths(columns: Columns, index: Index, all_files: bool) -> npt.NDArray[np.int64]:
    """(images,) bytes of each file; of those that are not looked at, or not there, as the index has it."""
    at = index.find(columns.ids)
    lengths = np.where(at >= 0, index.lengths[at], -1) if len(index) else np.full(len(at), -1, np.int64)
    looked_at = np.arange(len(columns)) if all_files else spread_evenly(len(columns))
    found = read_lengths(columns.folder, [columns.files[int(row)] for row in looked_at])
    lengths[looked_at] = np.where(found >= 0, found, lengths[looked_at])
    return lengths


def lock_latents(effective: Effective, site: Site) -> dict[str, str]:
    """What the lock's [inputs] says of the cached latents; nothing where none are used. Raises NoLatents."""
    if not effective.get(LATENTS_OPTION):
        return {}
    cache = open_cache(effective, site, all_files=False)
    lacking = len(cache.wanted.find_lacking(Index.open(cache.folder, cache.rule)))
    try:
        if lacking:
            raise NoLatents(f"{cache.folder}: {lacking:,} of {len(cache.wanted.ids):,} images have no latents there")
        digest = LatentStore(cache.folder, cache.rule).require(cache.wanted.ids, check=True)
    except NoLatents as missing:
        raise NoLatents(missing.message, f"Make them first: kwrap cache {effective.path} --site {site.path}") from None
    return {
        "latents": str(site.paths.latents),
        "latents_fingerprint": cache.rule.fingerprint,
        "latents_digest": digest,
    }


def find_damaged(cache: Cache, thorough: bool, on_progress: Progress, remove: bool) -> Iterator[tuple[ShardShape, str]]:
    """Shards that were made and are not what was written, with the reason; with `remove` each is to be made again."""
    made = [shape for shape in cache.shards if read_record(cache.folder, shape) is not None]
    for done, shape in enumerate(made):
        if fault := check_shard(cache.folder, shape, thorough):
            claims = Claims(cache.folder)
            # Another command may have found it too, and make it again just now.
            if remove and claims.take(shape.name) and check_shard(cache.folder, shape):
                shape.record_in(cache.folder).unlink(missing_ok=True)
            claims.release()
            yield shape, fault
        on_progress(done + 1, len(made))


def require_room(cache: Cache) -> int:
    """Bytes that are free where the shards go. Raises NoRoom where those to be made do not fit."""
    place = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    needed = sum(shape.size_bytes for shape in cache.list_unmade())
    if needed + SPARE_BYTES > free:
        raise NoRoom(
            f"{cache.folder}: the latents take {show_bytes(needed)} more, and {show_bytes(free)} are free",
            f"Set paths.latents in {cache.site.path} to a larger disk, or write less: --set cache.precision=fp16, "
            "--set cache.keep=sample.",
        )
    return free


def make_latents(cache: Cache, on_progress: Progress) -> int:
    """Make the shards that are not there, by as many processes as the site trains with; how many images it encoded.

    `on_progress` is told images. Goes on where another command makes them too, until all are there. Raises what ended a
    process, such as an image that cannot be read; the other processes are stopped then.
    """
    extend_index(cache.folder, cache.rule, cache.wanted)
    unmade = cache.list_unmade()
    total = sum(shape.count for shape in unmade)
    machine = cache.site.machine
    on_cpu = machine.gpus == 0
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    settings = {
        "OMP_NUM_THREADS": str(default_threads(machine.processes_here, on_cpu)),
        "HF_HUB_OFFLINE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        **kernel_settings(choose_kernels(on_cpu=on_cpu), cache.folder),
    }
    running: list[LineHelper] = []
    done = left = 0
    on_progress(0, total)
    try:
        for index in range(min(machine.processes_here, len(unmade))):
            running.append(LineHelper(WORKER, compose_job(cache, index), settings, index, answers))
            left += 1
        while left:
            index, answer = answers.get()
            if answer is None:
                if failure := running[index].describe_failure():
                    raise CachingFailed(
                        f"a process that encodes failed: {failure}", "What is made is kept; run it again to go on."
                    )
                left -= 1
            else:
                raise_answer(answer)
                done += answer["images"]
                on_progress(min(done, total), total)
    finally:
        for process in running:
            process.stop()
        clear_leavings(cache.folder, ".*.part")
    return done


def compose_job(cache: Cache, index: int) -> dict[str, Any]:
    """The request of one process."""
    paths = cache.site.paths
    return {
        "folder": str(cache.folder),
        "rule": asdict(cache.rule),
        "images": str(cache.columns.folder),
        "captions_digest": cache.columns.digest,
        "dataset": compose_dataset(cache.effective, paths.images),
        "base_model": str(paths.base_model),
        "vae": str(paths.vae) if paths.vae else None,
        "engine": cache.effective.engine,
        "index": index,
        "shards": [shape.number for shape in cache.shards],
    }
