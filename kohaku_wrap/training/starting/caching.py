"""What a training has cached, made ready: what is there, what is still to be made, and the processes that make it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.caching import LATENTS_KEY, TEXTS_KEY, measure_text_outputs
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.kernels import choose_kernels, kernel_settings
from kohaku_wrap.config.render import MissingInput, hash_named_files
from kohaku_wrap.config.run_files import merge_subsets
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.training_data import (
    PUT_BACK,
    ImagesGone,
    compose_dataset,
    describe_gone,
    read_lengths,
    spread_evenly,
)
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.file_hashes import kept_sha256
from kohaku_wrap.files import Progress, describe_absence
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.locks import Claims, clear_leavings
from kohaku_wrap.processes import ask_in_lines
from kohaku_wrap.training.data.items import ItemOptions, Items, read_dataset_options
from kohaku_wrap.training.data.latent_index import Index, Wanted, extend_index, lay_out
from kohaku_wrap.training.data.latent_rules import LATENTS, TEXTS, make_rule, make_text_rule
from kohaku_wrap.training.data.latent_shards import DamagedLatents, ShardShape, check_shard, read_record
from kohaku_wrap.training.data.latent_store import NoLatents, RecordStore, Rule, find_other_images
from kohaku_wrap.training.data.text_store import TextRule, stamp_of_caption
from kohaku_wrap.training.starting.launch import default_threads
from kohaku_wrap.wording import show_bytes

ENCODE_WORKER = "kohaku_wrap.training.engines.encode_latents"

SPARE_BYTES = 1 << 28
"""Left free on the disk."""


Int64Array = npt.NDArray[np.int64]
Look = Callable[[Int64Array], Int64Array]
"""Rows to what stays the same of each as long as it need not be encoded again; -1 for one that is not there."""


class NoRoom(KwrapError):
    """What is to be cached does not fit the disk."""


class CachingFailed(KwrapError):
    """A process that encodes ended, and did not say why."""


@dataclass(frozen=True)
class Cache:
    """What is cached of a template's images on a site, latents or outputs of text encoders, as far as it is there."""

    effective: Effective
    """The template."""

    site: Site
    """The machine."""

    rule: Rule | TextRule
    """What decides its bits."""

    columns: Columns
    """The images."""

    wanted: Wanted
    """Their sizes and files, or captions."""

    @property
    def name(self) -> str:
        """What keys of the lock's [inputs] begin with."""
        return TEXTS if isinstance(self.rule, TextRule) else LATENTS

    @property
    def kept(self) -> str:
        """What is kept of each image."""
        return self.rule.keep if isinstance(self.rule, Rule) else self.rule.what

    @property
    def folder(self) -> Path:
        """Where they lie: below the site's `latents`, a folder a rule."""
        return self.rule.folder_in(self.site.paths.latents)

    @cached_property
    def index(self) -> Index:
        """Where each image is or will be; new shards stand in it, but nothing is written."""
        return lay_out(Index.open(self.folder, self.rule), self.rule, self.wanted)

    def extend(self) -> None:
        """Write the index, and go by it: other commands may have added shards of other images since it was read."""
        extend_index(self.folder, self.rule, self.wanted)
        for name in ("index", "shards"):
            vars(self).pop(name, None)

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


def open_caches(
    effective: Effective, site: Site, on_bytes: Callable[[int], None] | None = None, all_files: bool = True
) -> list[Cache]:
    """What a template caches on a site; `all_files`: look at every image file and caption, else at some.

    Raises UsageError where the template caches nothing, MissingInput, NoImages, ProblemsFound, BadIndex.
    """
    chosen = [make for key, make in MAKERS.items() if effective.get(key)]
    if not chosen:
        raise UsageError(
            f"{effective.name} caches no latents", "Write latents = true into [cache], or add --set cache.latents=true."
        )
    columns, caches = Columns.open(site.paths.images), []
    for make in chosen:
        rule, sizes, look = make(effective, site, columns, on_bytes)
        index = Index.open(rule.folder_in(site.paths.latents), rule)
        lengths = find_lengths(columns, index, look, all_files)
        caches.append(Cache(effective, site, rule, columns, Wanted(columns.ids, sizes, lengths)))
    return caches


def hash_input(site: Site, name: str, on_bytes: Callable[[int], None] | None) -> str:
    """The sha256 of a model of the site. Raises MissingInput."""
    path = getattr(site.paths, name)
    if not path.is_file():
        raise MissingInput(f"{path}: {describe_absence(path)} ({name})", f"Fix paths.{name} in {site.path}.")
    return kept_sha256(path, on_bytes)


def plan_latents(
    effective: Effective, site: Site, columns: Columns, on_bytes: Callable[[int], None] | None
) -> tuple[Rule, npt.NDArray[np.int32], Look]:
    """The rule of a template's latents, (images, 2) the size of each, and how to look at the lengths of files."""
    vae = hash_input(site, "vae" if site.paths.vae else "base_model", on_bytes)
    subsets = merge_subsets(compose_dataset(effective, columns.folder))
    cache = effective.subtable("cache", with_defaults=True)
    rule = make_rule(cache, effective.values, subsets, vae, int(effective.get("seed", 0)))
    buckets = assign_buckets(columns.widths, columns.heights, BucketOptions.from_dataset_options(subsets[0]))

    def look(rows: Int64Array) -> Int64Array:
        return read_lengths(columns.folder, [columns.files[int(row)] for row in rows])

    return rule, buckets.resolutions[buckets.bucket_of_image], look


def plan_texts(
    effective: Effective, site: Site, columns: Columns, on_bytes: Callable[[int], None] | None
) -> tuple[TextRule, npt.NDArray[np.int32], Look]:
    """Likewise of its text encoders' outputs, and how to look at the captions, which never change."""
    inputs = {"base_model_sha256": hash_input(site, "base_model", on_bytes), **hash_named_files(effective.options)}
    outputs = measure_text_outputs(effective)
    rule = make_text_rule(effective.values, inputs, outputs, effective.engine, site.machine.gpus == 0)
    options = read_dataset_options(compose_dataset(effective, columns.folder))
    items = Items(columns, ItemOptions.from_dataset_options(options), 1, 0, 1)

    def look(rows: Int64Array) -> Int64Array:
        return np.array([stamp_of_caption(items.draw_item(int(row), 0).caption) for row in rows], np.int64)

    return rule, np.tile(np.array([rule.numbers, 1], np.int32), (len(columns), 1)), look


MAKERS: Mapping[str, Callable[..., tuple[Rule | TextRule, npt.NDArray[np.int32], Look]]] = {
    LATENTS_KEY: plan_latents,
    TEXTS_KEY: plan_texts,
}


def find_lengths(columns: Columns, index: Index, look: Look, all_files: bool) -> Int64Array:
    """(images,) what `look` finds; of images that are not looked at, or not there, what the index has."""
    at = index.find(columns.ids)
    lengths = np.where(at >= 0, index.lengths[at], -1) if len(index) else np.full(len(at), -1, np.int64)
    looked_at = np.arange(len(columns)) if all_files else spread_evenly(len(columns))
    found = look(looked_at)
    lengths[looked_at] = np.where(found >= 0, found, lengths[looked_at])
    return lengths


def lock_caches(effective: Effective, site: Site) -> dict[str, Any]:
    """What the lock's [inputs] says of what is cached; nothing where nothing is. Raises NoLatents."""
    if not (effective.get(LATENTS_KEY) or effective.get(TEXTS_KEY)):
        return {}
    said: dict[str, Any] = {"latents": str(site.paths.latents)}
    for cache in open_caches(effective, site, all_files=False):
        said |= {f"{cache.name}_fingerprint": cache.rule.fingerprint, f"{cache.name}_digest": require_all(cache)}
        if isinstance(cache.rule, TextRule):
            said[f"{cache.name}_outputs"] = list(cache.rule.outputs)
    return said


def require_all(cache: Cache) -> str:
    """The digest over the shards of a template's images. Raises NoLatents where one is not made, DamagedLatents."""
    lacking = len(cache.wanted.find_lacking(Index.open(cache.folder, cache.rule)))
    try:
        if lacking:
            images = f"{lacking:,} of {len(cache.wanted.ids):,} images have no {cache.rule.what} there"
            raise NoLatents(f"{cache.folder}: {images}")
        return RecordStore(cache.folder, cache.rule).require(cache.wanted.ids, check=True)
    except (NoLatents, DamagedLatents) as found:
        words: list[object] = ["cache", cache.effective.path, "--site", cache.site.path]
        for key, entry in cache.effective.entries.items():
            if entry.layer == "--set":
                words += ["--set", f"{key}={entry.value if isinstance(entry.value, str) else json.dumps(entry.value)}"]
        if isinstance(found, DamagedLatents):
            found.next_step = f"Make it again: {command_line(*words, '--check')}"
        else:
            found.next_step = f"Make them first: {command_line(*words)}"
        raise


def find_damaged(cache: Cache, thorough: bool, on_progress: Progress, remove: bool) -> Iterator[tuple[ShardShape, str]]:
    """Shards that were made and are not what was written, with the reason; with `remove` each is to be made again."""
    made = [shape for shape in cache.shards if read_record(cache.folder, shape) is not None]

    def look(shape: ShardShape) -> str:
        fault = check_shard(cache.folder, shape, thorough)
        return fault or (find_other_images(cache.folder, cache.index, shape) if thorough else "")

    for done, shape in enumerate(made):
        if fault := look(shape):
            claims = Claims(cache.folder)
            # Another command may have found it too, and make it again just now.
            if remove and claims.take(shape.name) and look(shape):
                shape.record_in(cache.folder).unlink(missing_ok=True)
            claims.release()
            yield shape, fault
        on_progress(done + 1, len(made))


def require_room(caches: Sequence[Cache]) -> int:
    """Bytes that are free where the shards go. Raises NoRoom where those to be made do not fit."""
    root, site = caches[0].site.paths.latents, caches[0].site.path
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    needed = sum(shape.size_bytes for cache in caches for shape in cache.list_unmade())
    if needed + SPARE_BYTES > free:
        names, get = " and the ".join(cache.rule.what for cache in caches), caches[0].effective.get
        smaller = {"cache.precision": "fp16", "cache.keep": "sample"} if get(LATENTS_KEY) else {}
        less = [f"--set {key}={value}" for key, value in smaller.items() if get(key) != value]
        less += [f"--set {TEXTS_KEY}=false"] if len(caches) > 1 else []
        raise NoRoom(
            f"{root}: the {names} take {show_bytes(needed)} more, and {show_bytes(free)} are free",
            f"Set paths.latents in {site} to a larger disk{', or write less: ' * bool(less)}{', '.join(less)}.",
        )
    return free


def require_images(caches: Sequence[Cache]) -> None:
    """Raise ImagesGone where an image is to be encoded whose file is not there; models are not loaded for it."""
    for cache in caches:
        gone = np.flatnonzero(cache.wanted.lengths < 0) if isinstance(cache.rule, Rule) else ()
        if len(gone):
            names = [cache.columns.files[int(row)] for row in gone]
            raise ImagesGone(describe_gone(cache.columns.folder, names, len(cache.wanted.ids)), f"{PUT_BACK}.")


def make_shards(cache: Cache, on_progress: Progress) -> int:
    """Make the shards that are not there, by as many processes as the site trains with; how many images it encoded.

    `on_progress` is told images. Goes on where another command makes them too, until all are there. Raises what ended a
    process, such as an image that cannot be read; the other processes are stopped then.
    """
    cache.extend()
    unmade = cache.list_unmade()
    total = sum(shape.count for shape in unmade)
    machine = cache.site.machine
    on_cpu = machine.gpus == 0
    settings = {
        "OMP_NUM_THREADS": str(default_threads(machine.processes_here, on_cpu)),
        "HF_HUB_OFFLINE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        **kernel_settings(choose_kernels(on_cpu=on_cpu), cache.folder),
    }
    jobs = [compose_job(cache, index) for index in range(min(machine.processes_here, len(unmade)))]
    done = 0
    on_progress(0, total)
    try:
        failed = CachingFailed, "a process that encodes failed", "What is made is kept; run it again to go on."
        with closing(ask_in_lines(ENCODE_WORKER, jobs, settings, *failed)) as answers:
            for answer in answers:
                done += answer["images"]
                on_progress(min(done, total), total)
    finally:
        # Who makes a shard next removes what is half-written: a process of another container may write it just now.
        clear_leavings(cache.folder)
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
        "tokenizers": str(paths.tokenizers),
        "engine": cache.effective.engine,
        "index": index,
        "shards": [shape.number for shape in cache.shards],
    }
