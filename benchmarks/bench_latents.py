"""What cached latents cost a loader worker: reading against a bare read, and the index of 5.2 million images.

    python benchmarks/bench_latents.py          # make bench-latents

Memory is the proportional set size. The page cache is warm; both sides compute the same checksums.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from bench_scale import MEGABYTE, proportional_set_bytes
from epsilon_run import EPSILON_IMAGES

from kohaku_wrap.training.data.latent_rules import make_rule
from kohaku_wrap.training.data.latent_shards import write_shard
from kohaku_wrap.training.data.latent_store import LatentStore, Wanted, extend_index

RULE = make_rule({"keep": "moments", "precision": "fp16"}, {}, [{"resolution": 1024}], "0" * 64, 1)
SIZES = np.array([(1024, 1024), (832, 1216), (1216, 832), (896, 1152)], np.int32)
BATCH = 4
BARS = {"reading, share of a bare read with checksum": 0.9, "index, MB a process": 100.0, "start-up, seconds": 5.0}


def measure_reading(folder: Path, images: int, rounds: int) -> float:
    """The share of a bare read's speed, the best of some rounds in turn, in random order."""
    ids = np.arange(images)
    index = extend_index(folder, RULE, Wanted(ids, np.tile(SIZES[0], (images, 1)), ids))
    numbers = np.random.default_rng(0).normal(size=(1, *index.shapes[0].record_shape)).astype(np.float16)
    for shape in index.shapes:
        inside = ids[index.shards == shape.number]
        write_shard(folder, shape, inside, (numbers + number for number in inside), RULE.fingerprint, {})
    size = index.shapes[0].record_bytes
    files = [os.open(shape.file_in(folder), os.O_RDONLY) for shape in index.shapes]
    order = np.random.default_rng(1).permutation(images).tolist()
    store = LatentStore(folder, RULE)
    best = {"bare": np.inf, "store": np.inf}
    for _ in range(rounds):
        started = time.perf_counter()
        for image in order:
            zlib.crc32(os.pread(files[int(index.shards[image])], size, 512 + int(index.slots[image]) * size))
        best["bare"] = min(best["bare"], time.perf_counter() - started)
        started = time.perf_counter()
        for begin in range(0, images, BATCH):
            store.read_batch([(image, False) for image in order[begin : begin + BATCH]])
        best["store"] = min(best["store"], time.perf_counter() - started)
    bare, own = (best[name] / images * 1e3 for name in ("bare", "store"))
    print(f"  a record of {size:,} bytes: {bare:.3f} ms bare, {own:.3f} ms")
    return best["bare"] / best["store"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=EPSILON_IMAGES)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        share = measure_reading(Path(scratch) / "reading", arguments.records, arguments.rounds)
        seconds, megabytes = measure_index(Path(scratch) / "index", arguments.images)
    figures = dict(zip(BARS, (share, megabytes, seconds), strict=True))
    print(f"\n{arguments.images:,} images")
    for name, value in figures.items():
        holds = value >= BARS[name] if name.startswith("reading") else value <= BARS[name]
        print(f"  {name:<46} {value:>8.2f}   bar {BARS[name]:>6.1f}   {'ok' if holds else 'MISSED'}")


if __name__ == "__main__":
    main()
