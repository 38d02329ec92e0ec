"""A process that encodes images or captions into shards until all are there: it takes one that no other has.

Started as `python -m kohaku_wrap.processes PID kohaku_wrap.training.engines.encode_latents`, with a request as JSON on
stdin, whose form is that of `caching.compose_job`. It answers in lines of JSON: how many `images` more are encoded.
Each image or caption is encoded by itself, with the threads, device and type that a training on this site has.

With RUN and IMAGES it encodes those of the `ids` on stdin once more and tells how far what the run has cached is from
that.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kohaku_wrap.config.kernels import DETERMINISTIC_VARIABLE
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.locks import Claims
from kohaku_wrap.metadata.parallel import map_in_order
from kohaku_wrap.planning.workers.module_filling import load_vae
from kohaku_wrap.processes import answer, answer_in_lines
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.columns import ColumnsDataset, as_tensor
from kohaku_wrap.training.data.items import Item, ItemOptions, read_dataset_options
from kohaku_wrap.training.data.latent_index import Index
from kohaku_wrap.training.data.latent_rules import TEXTS, open_latents, open_texts
from kohaku_wrap.training.data.latent_shards import Latents, ShardShape, read_record, round_to, write_shard
from kohaku_wrap.training.data.latent_store import MOMENTS, Rule
from kohaku_wrap.training.data.moments import moments_of, sample_moments
from kohaku_wrap.training.data.run_items import read_locked_dataset
from kohaku_wrap.training.data.text_store import TextRule
from kohaku_wrap.training.engines.encode_texts import TYPES, CaptionEncoder
from kohaku_wrap.training.records.folder import Run

WAIT_SECONDS = 0.5
"""Between two looks at shards that other processes make."""

TELL_SECONDS = 0.5
READING_THREADS = 4
"""Which decode images before they are encoded."""

NOBODY = -1
"""The id of a place in a shard whose image is in another one by now, or in no dataset."""


def settle(engine: str, index: int) -> torch.device:
    """The device of the process with this index, and kernels as the engine's training has them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    on_cpu = not torch.cuda.is_available()
    if on_cpu or engine == "builtin" or os.environ.get(DETERMINISTIC_VARIABLE) == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    return torch.device("cpu") if on_cpu else torch.device("cuda", index % torch.cuda.device_count())


class Encoder:
    """Encodes images by one rule."""

    def __init__(
        self, rule: Rule, dataset: ColumnsDataset, device: torch.device, base_model: Path, vae: Path | None
    ) -> None:
        self.rule, self.dataset, self.device = rule, dataset, device
        self.vae = load_vae(base_model, vae).to(device, TYPES[rule.vae_precision])

    def encode(self, rows: list[int]) -> Iterator[Latents]:
        """(variants, channels, height / 8, width / 8) float32 of each row."""
        import cv2

        cv2.setNumThreads(0)
        items = [self.dataset.draw_item(row, 0) for row in rows]
        each = [replace(item, flipped=flipped) for item in items for flipped in (False, True)[: self.rule.variants]]
        found: list[Latents] = []
        for item, pixels in zip(each, map_in_order(self.dataset.load_image, each, READING_THREADS), strict=True):
            found.append(self.encode_image(item, pixels))
            if len(found) == self.rule.variants:
                yield np.stack(found)
                found.clear()

    @torch.no_grad()
    def encode_image(self, item: Item, pixels: torch.Tensor) -> Latents:
        """(channels, height / 8, width / 8) float32; `pixels`: (3, height, width)."""
        part = pixels.unsqueeze(0).to(self.device, TYPES[self.rule.vae_precision])
        latents = moments_of(self.vae.encode(part).latent_dist).float().cpu()
        if self.rule.keep != MOMENTS:
            # On the CPU, so that every device draws the same.
            seed = seed_of("latents", self.rule.seed, item.image_id, int(item.flipped))
            latents = sample_moments(latents, torch.Generator().manual_seed(seed))
        found: Latents = latents[0].numpy()
        return found


def read_rule(document: dict[str, Any]) -> Rule | TextRule:
    """The rule of a request."""
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in document.items()}
    return TextRule(**values) if "outputs" in values else Rule(**values)


def load_encoder(
    rule: Rule | TextRule, dataset: ColumnsDataset, request: dict[str, Any], index: int = 0
) -> Encoder | CaptionEncoder:
    """What encodes by a rule, with the models that a request names."""
    device, base_model = settle(request["engine"], index), Path(request["base_model"])
    if isinstance(rule, TextRule):
        return CaptionEncoder(rule, dataset, device, base_model, Path(request["tokenizers"]))
    return Encoder(rule, dataset, device, base_model, Path(request["vae"]) if request["vae"] else None)


class ShardMaker:
    """Makes the shards of one request."""

    def __init__(self, request: dict[str, Any], tell: Callable[..., None]) -> None:
        self.tell = tell
        self.folder = Path(request["folder"])
        dataset = open_images(Path(request["images"]), request["captions_digest"], request["dataset"])
        rule = read_rule(request["rule"])
        self.encoder = load_encoder(rule, dataset, request, request["index"])
        self.index = Index.open(self.folder, rule)
        self.wanted: list[int] = request["shards"]
        self.claims = Claims(self.folder)
        self.untold, self.told_at = 0, time.monotonic()

    def run(self) -> None:
        """Make every shard that is wanted, or wait until another process has made it."""
        left = [self.index.shapes[number] for number in self.wanted]
        while left := [shape for shape in left if read_record(self.folder, shape) is None]:
            done = [self.make_if_free(shape) for shape in left]
            if not any(done):
                time.sleep(WAIT_SECONDS)

    def make_if_free(self, shape: ShardShape) -> bool:
        """Make a shard, unless it is there by now or another process makes it; whether it is there."""
        if read_record(self.folder, shape) is not None:
            return True
        if not self.claims.take(shape.name):
            return False
        try:
            if read_record(self.folder, shape) is None:
                self.make(shape)
        finally:
            self.claims.release()
        return True

    def make(self, shape: ShardShape) -> None:
        """Encode the images of a shard and write it."""
        begun, rows = time.monotonic(), self.find_rows(shape)
        ids = np.where(rows >= 0, self.encoder.dataset.columns.ids[rows], NOBODY)
        about = {
            "images": int((rows >= 0).sum()),
            "device": self.encoder.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        nan_images: list[int] = []

        def records() -> Iterator[Latents]:
            empty = np.full((shape.variants, *shape.record_shape), np.nan, np.float32)
            encoded = self.encoder.encode([int(row) for row in rows if row >= 0])
            for row, image_id in zip(rows, ids.tolist(), strict=True):
                record = empty if row < 0 else next(encoded)
                if row >= 0:
                    self.tell_images(1)
                    if np.isnan(record).any():
                        nan_images.append(image_id)
                yield record
            about.update(seconds=round(time.monotonic() - begun, 3), nan_images=nan_images)

        write_shard(self.folder, shape, ids, records(), self.encoder.rule.fingerprint, about)
        self.tell_images(0, at_once=True)

    def find_rows(self, shape: ShardShape) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(count,) the row of the image at each place of a shard; -1 where it is no longer there."""
        inside = np.flatnonzero(self.index.shards == shape.number)
        ids = self.encoder.dataset.columns.ids
        at = np.minimum(np.searchsorted(ids, self.index.ids[inside]), len(ids) - 1)
        rows = np.full(shape.count, -1, dtype=np.int64)
        rows[self.index.slots[inside]] = np.where(ids[at] == self.index.ids[inside], at, -1)
        return rows

    def tell_images(self, count: int, at_once: bool = False) -> None:
        """Say now and then how many images more are encoded."""
        self.untold += count
        if self.untold and (at_once or time.monotonic() - self.told_at > TELL_SECONDS):
            self.tell(images=self.untold)
            self.untold, self.told_at = 0, time.monotonic()


def open_images(folder: Path, captions_digest: str, dataset: dict[str, Any]) -> ColumnsDataset:
    """The images of a folder; `dataset`: the document of dataset.toml."""
    options = ItemOptions.from_dataset_options(read_dataset_options(dataset))
    return ColumnsDataset(Columns.open(folder, captions_digest), options, 1, 0, 1, tokenize=None)


def compare_again(run: Run, request: dict[str, Any]) -> dict[str, Any]:
    """How far what is cached for a run is from the same encoded now at most, and of which image.

    Beyond 1 the difference is a share of the number itself.
    """
    run = replace(run, latents_now=Path(request["latents"]) if request["latents"] else None)
    store = open_texts(run) if request["kind"] == TEXTS else open_latents(run)
    assert store is not None
    dataset = open_images(run.find_images(), run.lock.dataset_digest, read_locked_dataset(run))
    encoder = load_encoder(store.rule, dataset, request)
    rows = np.searchsorted(dataset.columns.ids, request["ids"]).tolist()
    largest, image = 0.0, 0
    for image_id, encoded in zip(request["ids"], encoder.encode(rows), strict=True):
        for variant, exact in enumerate(encoded):
            held = as_tensor(store.read_batch([(image_id, bool(variant))])[0]).double()
            now = as_tensor(round_to(exact, store.rule.precision)).double()
            # NaN, where both have it, is no difference.
            difference = float(((now - held).abs() / held.abs().clamp(min=1)).nan_to_num(0).max())
            if bool((now.isnan() != held.isnan()).any()):
                difference = math.inf
            if difference > largest:
                largest, image = difference, image_id
    return {"difference": largest, "image": image}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(lambda: compare_again(Run(Path(sys.argv[1]), Path(sys.argv[2])), json.load(sys.stdin)))
    else:
        sys.exit(answer_in_lines(lambda request, tell: ShardMaker(request, tell).run()))
