"""What cached latents cost and save: reading and writing against bare ones, the index of 5.2 million images, steps.

    python benchmarks/bench_latents.py          # make bench-latents

Memory is the proportional set size. The page cache is warm; both sides fill batches and compute the same checksums.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import toml
from bench_scale import MEGABYTE, proportional_set_bytes
from epsilon_run import EPSILON_IMAGES
from PIL import Image

from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.training.data.latent_index import Wanted, extend_index
from kohaku_wrap.training.data.latent_rules import make_rule
from kohaku_wrap.training.data.latent_shards import write_shard
from kohaku_wrap.training.data.latent_store import LatentStore
from kohaku_wrap.training.engines.encode_latents import ShardMaker
from kohaku_wrap.training.starting.caching import compose_job, open_caches

RULE = make_rule({"keep": "moments", "precision": "fp16"}, {}, [{"resolution": 1024}], "0" * 64, 1)
SIZES = np.array([(1024, 1024), (832, 1216), (1216, 832), (896, 1152)], np.int32)
BATCH = 4
PICTURES, SIDE_PIXELS, EPOCHS = 96, 256, 3
CACHED = ("cache.latents=true", 'cache.precision="fp32"')
READING = "reading, share of a bare read with checksum"
BARS = {
    READING: 0.9,
    "index, MB a process": 100.0,
    "start-up, seconds": 5.0,
    "writing, times the VAE and a bare write": 1.2,
    "a step, share of one that encodes": 1.0,
}


def measure_reading(folder: Path, images: int, rounds: int) -> float:
    """The share of a bare read's speed, the median of pairs in turn; both fill batches, in random order."""
    ids = np.arange(images)
    index = extend_index(folder, RULE, Wanted(ids, np.tile(SIZES[0], (images, 1)), ids))
    shape = index.shapes[0]
    numbers = np.random.default_rng(0).normal(size=(1, *shape.record_shape)).astype(np.float16)
    for each in index.shapes:
        inside = ids[index.shards == each.number]
        write_shard(folder, each, inside, (numbers + number for number in inside), RULE.fingerprint, {})
    files = [os.open(each.file_in(folder), os.O_RDONLY) for each in index.shapes]
    order = np.random.default_rng(1).permutation(images).tolist()
    batches = [order[begin : begin + BATCH] for begin in range(0, images, BATCH)]
    store = LatentStore(folder, RULE)

    def read_bare(batch: list[int]) -> None:
        out = np.empty((len(batch), *shape.record_shape), np.float16)
        for record, image in zip(out, batch, strict=True):
            begin = 512 + int(index.slots[image]) * shape.record_bytes
            os.preadv(files[int(index.shards[image])], [record.data], begin)
            zlib.crc32(record.data)

    def read_stored(batch: list[int]) -> None:
        store.read_batch([(image, False) for image in batch])

    pairs = []
    for turn in range(rounds + 1):
        seconds = {}
        for read in (read_bare, read_stored) if turn % 2 else (read_stored, read_bare):
            started = time.process_time()
            for batch in batches:
                read(batch)
            seconds[read] = time.process_time() - started
        pairs.append((seconds[read_bare], seconds[read_stored]))
    bare, own = (statistics.median(each) / images * 1e3 for each in zip(*pairs[1:], strict=True))
    print(f"  a record of {shape.record_bytes:,} bytes: {bare:.3f} ms bare, {own:.3f} ms, CPU time")
    return statistics.median(bare / own for bare, own in pairs[1:])


def measure_index(folder: Path, images: int) -> tuple[float, float]:
    """Seconds to open an index and to find the shards of all its images, and its megabytes after lookups."""
    rule = dataclasses.replace(RULE, keep="sample")
    generator = np.random.default_rng(0)
    ids = np.sort(generator.choice(12_000_000, images, replace=False)).astype(np.int64)
    sizes = SIZES[generator.integers(0, len(SIZES), images)]
    started = time.monotonic()
    index = extend_index(folder, rule, Wanted(ids, sizes, ids))
    print(f"  {len(index.shapes):,} shards laid out and written in {time.monotonic() - started:.1f} s")
    for shape in index.shapes:
        with shape.file_in(folder).open("wb") as stream:
            stream.truncate(shape.size_bytes)
        shape.record_in(folder).write_text(json.dumps({"sha256": "0" * 64, "images": shape.count}))
    del index
    before, started = proportional_set_bytes(), time.monotonic()
    store = LatentStore(folder, rule)
    store.require(ids)
    seconds = time.monotonic() - started
    for image_id in generator.choice(ids, 200_000).tolist():
        store.index.find(np.array([image_id]))
    return seconds, (proportional_set_bytes() - before) / MEGABYTE


def kwrap(*words: str | Path) -> None:
    """Run a command, quietly; its output is printed where it fails."""
    command = [sys.executable, "-P", "-m", "kohaku_wrap", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def make_world(folder: Path) -> tuple[str, ...]:
    """A tiny model and pictures of one size; the words that name template and site to a command."""
    kwrap("demo", folder / "world")
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = generator.integers(0, 256, (SIDE_PIXELS, SIDE_PIXELS, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number:03d}.png")
        (folder / f"pictures/{number:03d}.txt").write_text(f"1girl, number {number}\n")
    kwrap("import", folder / "pictures", "--out", folder / "images")
    site = toml.loads((folder / "world/site.toml").read_text())
    site["paths"] |= {"images": str(folder / "images"), "runs": str(folder / "runs")}
    (folder / "world/site.toml").write_text(toml.dumps(site))
    settings = {"dataset_options.resolution": SIDE_PIXELS, "max_train_epochs": EPOCHS}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ("demo", "--site", str(folder / "world/site.toml"), *words)


def measure_writing(folder: Path, words: tuple[str, ...], rounds: int) -> float:
    """What the worker takes, against the VAE on pixels in memory and one bare write; the median of pairs in turn."""
    site = load_site(Path(words[2]))
    effective = resolve_template(words[0], site, (*words[4::2], *CACHED))
    [cache] = open_caches(effective, site)
    extend_index(cache.folder, cache.rule, cache.wanted)
    maker = ShardMaker(compose_job(cache, 0), lambda **_: None)
    encoder = maker.encoder
    items = [encoder.dataset.draw_item(row, 0) for row in range(len(cache.columns))]
    pixels = [encoder.dataset.load_image(item) for item in items]

    def write_bare() -> None:
        with (folder / "bare").open("wb") as stream:
            for item, image in zip(items, pixels, strict=True):
                stream.write(encoder.encode_image(item, image).data)
            stream.flush()
            os.fsync(stream.fileno())

    pairs = []
    for _ in range(rounds + 1):
        seconds = []
        for work in (write_bare, maker.run):
            started = time.monotonic()
            work()
            seconds.append(time.monotonic() - started)
        pairs.append(seconds[1] / seconds[0])
        for shape in cache.shards:
            shape.record_in(cache.folder).unlink()
    return statistics.median(pairs[1:])


def measure_steps(folder: Path, words: tuple[str, ...]) -> float:
    """Seconds of a step from cached latents, as a share of those of one that encodes its images; medians."""
    cached = [word for setting in CACHED for word in ("--set", setting)]
    kwrap("cache", *words, *cached)
    medians = []
    for name, setting in (("encoded", []), ("cached", cached)):
        kwrap("train", *words, *setting, "--run", name)
        lines = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        medians.append(statistics.median(json.loads(line)["seconds"] for line in lines[2:]))
    print(f"  a step: {medians[0]:.3f} s encoded, {medians[1]:.3f} s from cached latents")
    return medians[1] / medians[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=EPSILON_IMAGES)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="pairs; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        share = measure_reading(folder / "reading", arguments.records, arguments.rounds)
        seconds, megabytes = measure_index(folder / "index", arguments.images)
        words = make_world(folder)
        writing, step = measure_writing(folder, words, arguments.rounds), measure_steps(folder, words)
    figures = dict(zip(BARS, (share, megabytes, seconds, writing, step), strict=True))
    print(f"\n{arguments.images:,} images")
    for name, value in figures.items():
        holds = value >= BARS[name] if name == READING else value <= BARS[name]
        print(f"  {name:<46} {value:>8.2f}   bar {BARS[name]:>6.1f}   {'ok' if holds else 'MISSED'}")


if __name__ == "__main__":
    main()
