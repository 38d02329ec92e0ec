"""Make a run of Epsilon's size without its images: 5,210,319 captions, a lock, and a sealed state.

python benchmarks/epsilon_run.py FOLDER
kwrap resume FOLDER/runs/epsilon --step 13600 --dry-run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.render import compose_run
from kohaku_wrap.config.site import load_site
from kohaku_wrap.config.training_data import describe_data
from kohaku_wrap.files import atomic_write, write_text
from kohaku_wrap.formats.caption_rows import read_folder_sizes
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.saving import fingerprint_of
from kohaku_wrap.training.records.states import write_state

EPSILON_IMAGES = 5_210_319
EPSILON_STEP = 13_600
ROWS_A_BLOCK = 200_000
SIDES = np.array([640, 700, 768, 850, 900, 1000, 1024, 1200, 1280, 1448, 1600, 1920, 2048, 2508, 3000], dtype=np.int32)
CAPTION = "1girl, some character, some series, an artist ||| {tags} ||| great quality, newest, safe"
TAGS = ("long hair, blue eyes, smile, school uniform, standing, outdoors, sky, cloud, looking at viewer, {}",) * 3

DIFFERENT_TAGS = 400_000
PARTS = ((5, DIFFERENT_TAGS), (32, 30_000), (3, 20))
"""Before, between and after the separators: tags of each caption, 40 in all, and of how many different ones."""

SITE = """
[paths]
images = "images"
base_model = "base/model.safetensors"
runs = "runs"

[machine]
engine = "{engine}"
gpus = 4
batch_per_gpu = 4
workers = 8
"""


def draw_captions(ids: npt.NDArray[np.int64], names: pa.Array, seed: int) -> pa.Array:
    """(ids,) captions of 40 tags of `names`, each as often as its place from the first is near (Zipf's law)."""
    parts = []
    for place, (count, different) in enumerate(PARTS):
        counters = (ids[:, None] * count + np.arange(count)).ravel().astype(np.uint64)
        shares = draws(stream_key("bench-tags", seed, place), counters).astype(np.float64) / 2.0**64
        chosen = names.take(pa.array((different**shares - 1).astype(np.int64)))
        starts = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * count)
        parts.append(pc.binary_join(pa.ListArray.from_arrays(starts, chosen), ", "))
    return pc.binary_join_element_wise(*parts, " ||| ").cast(pa.large_string())


def write_captions(folder: Path, images: int, seed: int = 0, draws_tags: bool = False) -> None:
    """Write `captions.arrow` with made-up sizes and captions of the real length, block by block."""
    names = pa.array([f"tag no. {number}" for number in range(DIFFERENT_TAGS)])
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("file", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("caption", pa.large_string()),
        ]
    )
    digest = hashlib.sha256(f"{images}:{seed}".encode()).hexdigest()
    about = {"digest": digest, "count": images, "dataset": "epsilon", "style": "kohaku"}
    schema = schema.with_metadata({"kwrap": json.dumps(about)})
    key = stream_key("bench-sizes", seed)
    with atomic_write(folder / "captions.arrow", "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for start in range(0, images, ROWS_A_BLOCK):
            ids = np.arange(start, min(start + ROWS_A_BLOCK, images), dtype=np.int64)
            drawn = draws(key, ids)
            widths = SIDES[(drawn % np.uint64(len(SIDES))).astype(np.int64)]
            heights = SIDES[(drawn // np.uint64(1000) % np.uint64(len(SIDES))).astype(np.int64)]
            captions: Any = draw_captions(ids, names, seed) if draws_tags else [
                CAPTION.format(tags=", ".join(tag.format(post) for tag in TAGS)) for post in ids.tolist()
            ]  # fmt: skip
            files = [f"{post % 1000:04d}/{post}.webp" for post in ids.tolist()]
            writer.write_batch(pa.record_batch([ids, files, widths, heights, captions], schema=schema))


def fill_state(folder: Path) -> None:
    """Something to seal, in place of weights and optimizer."""
    (folder / "weights.bin").write_bytes(os.urandom(1 << 20))


def make_run(
    folder: Path, images: int, engine: str = "sd-scripts", template: str = "epsilon", draws_tags: bool = False
) -> Run:
    """The folder of a run of that many images, with one sealed state at Epsilon's published step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "site.toml", SITE.format(engine=engine))
    (folder / "images").mkdir(exist_ok=True)
    write_captions(folder / "images", images, draws_tags=draws_tags)
    write_text(folder / "base" / "model.safetensors", "stands for a base model; nothing here is trained")
    site = load_site(folder / "site.toml")
    effective = resolve_template(template, site, [])
    plan = plan_steps(effective, read_folder_sizes(site.paths.images))
    run_folder = site.paths.runs / "epsilon"
    inputs = {
        "images": str(site.paths.images),
        "base_model": str(site.paths.base_model),
    } | describe_data("kwrap", site.paths.images, {})
    compose_run(effective, site, run_folder, "epsilon", plan, inputs).write()
    run = Run(run_folder)
    step = min(EPSILON_STEP, plan.total_optimizer_steps - 1)
    write_state(run.states, step, fill_state, fingerprint_of(run, step, processes=site.machine.processes))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=EPSILON_IMAGES)
    parser.add_argument("--engine", default="sd-scripts")
    arguments = parser.parse_args()
    run = make_run(arguments.folder, arguments.images, arguments.engine)
    print(run.folder)
    print(f"Next: kwrap resume {run.folder} --step {EPSILON_STEP} --dry-run")


if __name__ == "__main__":
    main()
