"""Selection, captions and tars at the scale of danbooru2023, each figure beside its bar.

Run: python benchmarks/bench_dataset.py (`make bench-dataset`). Works in .bench/dataset and needs 25 GB of disk for the
database of 7.8 million posts; --large-posts makes it smaller, --skip-large leaves that part out. HakuBooru 0.0.3 comes
from PyPI into an environment of its own. All ratios are of figures taken in the same run. Exit 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dataset_worlds import write_posts_database
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from edition_writer import EDITIONS, load_world  # noqa: E402  # the tests use it too

BENCH = ROOT / ".bench" / "dataset"
POSTS = 300_000
LARGE_POSTS = 7_800_000
HAKUBOORU_POSTS = 4_000
GIB = 1 << 30

CAPTION_BY_HAKUBOORU = """
import sys, time
from hakubooru.caption import KohakuCaptioner
from hakubooru.dataset import Post, load_db
load_db(sys.argv[1])
captioner = KohakuCaptioner()
last, every = map(int, sys.argv[2:])
wanted = Post.select().where(Post.id << list(range(every, last + 1, every)))
started = time.process_time(), time.monotonic()
made = 0
for post in wanted:
    captioner.caption(post, b"")
    post._tags_cache = None
    made += 1
print(made, time.process_time() - started[0], time.monotonic() - started[1])
"""

CAPTION_BY_KWRAP = """
import sys, time
started = time.process_time()
from pathlib import Path
from kohaku_wrap.dataset.captions.plan import plan_captions
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.making import make_captions
from kohaku_wrap.dataset.selection_file import read_selected_posts
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.tags import read_tags
database = open_database(Path(sys.argv[1]))
posts = read_selected_posts(Path(sys.argv[2]), sys.argv[4])
tags = read_tags(database)
plan = plan_captions(CaptionRecipe(style=sys.argv[3]), tags)
cutoffs = find_cutoffs(plan.recipe.quality, database, posts)
made = sum(
    len(captions)
    for captions, _ in map_tag_chunks(
        database, tags, posts.ids, lambda chunk: make_captions(plan, chunk, posts, cutoffs), 1, None
    )
)
print(made, time.process_time() - started)
"""

SCAN = """
import sqlite3, sys
columns = "id, rating, fav_count, score, created_at, file_ext, image_width, image_height, md5, is_deleted, file_url"
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
print(sum(1 for _ in connection.execute(f"SELECT {columns} FROM post")))
"""

WRITE_TEXTS = """
import json, sys
names = json.load(open(sys.argv[1]))
for path, size in names:
    with open(path, "wb") as stream:
        stream.write(bytes(size))
"""


CHECK_IMAGES = """
import sys
from pathlib import Path
from PIL import Image
for path in sorted(Path(sys.argv[1]).iterdir()):
    with Image.open(path) as image:
        image.load()
"""

IMAGES = 900
IMAGE_SIDE = 1024


@dataclass(frozen=True)
class Measure:
    """One child process."""

    output: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Figure:
    """One line of the result."""

    name: str
    told: str
    bar: str
    reached: bool


def measure(arguments: Sequence[str | Path], rounds: int = 1) -> Measure:
    """Run a child; the best of `rounds` by wall time. Its peak memory is the kernel's own figure."""
    best: Measure | None = None
    for _ in range(rounds):
        started = time.monotonic()
        child = subprocess.Popen([str(one) for one in arguments], stdout=subprocess.PIPE, text=True, cwd=BENCH)
        assert child.stdout
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))[:300]} ended with exit code {child.returncode}")
        taken = Measure(output, time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
        best = taken if best is None or taken.wall_seconds < best.wall_seconds else best
    assert best
    return best


def kwrap(*arguments: str | Path, rounds: int = 1) -> Measure:
    """Run a kwrap command."""
    return measure([sys.executable, "-m", "kohaku_wrap", *arguments, "--json"], rounds)


def make_hakubooru() -> Path:
    """The Python of an environment with HakuBooru 0.0.3."""
    folder = ROOT / ".bench" / "hakubooru-0.0.3"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        packages = ["hakubooru==0.0.3", "peewee", "python-dateutil", "six"]
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *packages]
        subprocess.run(pip, check=True)
        (folder / "ready").touch()
    return python


def make_database(posts: int, relations: bool, indexed: bool) -> Path:
    """A database that an earlier run may have left."""
    path = BENCH / f"posts-{posts}{'' if relations else '-bare'}.db"
    if not path.exists():
        print(f"making {path.name} …", file=sys.stderr, flush=True)
        write_posts_database(path, posts, relations, indexed)
    return path


def pretend_images(selection: Path, folder: Path) -> None:
    """Empty files and the list of them that extract would leave: captions never open an image."""
    if folder.exists():
        raise SystemExit(f"{folder} is in the way; remove it or name another with --images")
    table = pq.read_table(selection, columns=["id", "file_ext", "image_width", "image_height"])
    ids = table.column("id").to_pylist()
    files = [
        f"{one % 1000:04d}/{one}.{ext}" for one, ext in zip(ids, table.column("file_ext").to_pylist(), strict=True)
    ]
    for number in range(1000):
        (folder / f"{number:04d}").mkdir(parents=True)
    for name in files:
        os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY))
    columns = {
        "id": table.column("id"),
        "file": pa.array(files),
        "width": table.column("image_width"),
        "height": table.column("image_height"),
        "size_bytes": pa.array(np.zeros(len(files), dtype=np.int64)),
    }
    pq.write_table(pa.table(columns), folder / "extracted.parquet")


def remove_texts(folder: Path) -> None:
    """Take the .txt files away again."""
    for path in folder.glob("*/*.txt"):
        path.unlink()


def bench_captions(figures: list[Figure], rounds: int, images: Path) -> None:
    """Captions of 300,000 posts against HakuBooru, and against the bare writing of files."""
    database = make_database(POSTS, relations=True, indexed=True)
    python = make_hakubooru()
    selection = BENCH / "all.parquet"
    recipe = BENCH / "all.toml"
    recipe.write_text("[selection]\n")
    kwrap("select", recipe, "--db", database, "--out", selection)

    every = POSTS // HAKUBOORU_POSTS
    made, cpu, wall = map(
        float, measure([python, "-c", CAPTION_BY_HAKUBOORU, database, str(POSTS), str(every)]).output.split()[-3:]
    )
    haku_cpu, haku_wall = made / cpu, made / wall
    figures.append(Figure("HakuBooru 0.0.3, captioner alone", f"{haku_cpu:,.0f} posts/s a core", "", True))
    for style, parser in (("hakubooru", "dateutil"), ("kohaku", "iso")):
        runs = [
            measure([sys.executable, "-c", CAPTION_BY_KWRAP, database, selection, style, parser]).output.split()
            for _ in range(rounds)
        ]
        rate = max(float(one[0]) / float(one[1]) for one in runs)
        figures.append(
            Figure(
                f"captions, {style} style, all steps but writing",
                f"{rate:,.0f} posts/s a core = {rate / haku_cpu:.0f} x HakuBooru",
                ">= 60 x (stretch 100 x)",
                rate >= 60 * haku_cpu,
            )
        )
    pretend_images(selection, images)
    for name in ("cache", "jsonl"):
        wall_seconds = float("inf")
        for _ in range(rounds):
            for left in (*images.glob("captions.*"), *images.glob("metadata_cache.json")):
                left.unlink()
            run = kwrap("caption", selection, "--db", database, "--out", images, "--format", name)
            wall_seconds = min(wall_seconds, run.wall_seconds)
        rate = POSTS / wall_seconds
        told = f"{wall_seconds:.1f} s, {rate:,.0f} posts/s = {rate / haku_wall:.0f} x HakuBooru"
        figures.append(Figure(f"kwrap caption --format {name}, whole process", told, ">= 60 x", rate >= 60 * haku_wall))
    bench_texts(figures, database, selection, images, rounds)


def bench_texts(figures: list[Figure], database: Path, selection: Path, images: Path, rounds: int) -> None:
    """`kwrap caption --format txt` against a loop that only writes files of the same sizes in the same places."""
    sizes = BENCH / "sizes.json"
    ours = bare = float("inf")
    for _ in range(rounds):
        remove_texts(images)
        run = kwrap("caption", selection, "--db", database, "--out", images, "--format", "txt")
        ours = min(ours, run.wall_seconds)
        if not sizes.exists():
            paths = sorted(images.glob("*/*.txt"), key=lambda path: int(path.stem))
            sizes.write_text(json.dumps([(str(path), path.stat().st_size) for path in paths]))
        remove_texts(images)
        bare = min(bare, measure([sys.executable, "-c", WRITE_TEXTS, sizes]).wall_seconds)
    sizes.unlink()
    told = f"{ours:.1f} s, bare loop {bare:.1f} s: {ours / bare:.2f} x"
    figures.append(
        Figure("kwrap caption --format txt, whole process", told, "<= 1.5 x the bare loop", ours <= 1.5 * bare)
    )
    shutil.rmtree(images)


def bench_images(figures: list[Figure], rounds: int) -> None:
    """`kwrap import` and `kwrap extract` of JPEGs in one process against a loop that opens and decodes each of them."""
    folder = BENCH / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(1, IMAGES + 1):
        coarse = Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8))
        coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)
    tars, recipe = BENCH / "picture-tars", BENCH / "pictures.toml"
    shutil.rmtree(tars, ignore_errors=True)
    (tars / "images").mkdir(parents=True)
    for number in range(1, IMAGES + 1):
        with tarfile.open(tars / "images" / f"{number % 1000:04d}.tar", "a") as tar:
            tar.add(folder / f"{number}.jpg", f"{number}.jpg")
    recipe.write_text(f"[selection]\n[[selection.strata]]\nlast_id = {IMAGES}\n")
    database, selection, out = make_database(POSTS, True, True), BENCH / "pictures.parquet", BENCH / "picture-images"
    kwrap("select", recipe, "--db", database, "--out", selection)
    ways = {
        "extract": ("extract", selection, "--tars", tars, "--out", out, "--jobs", "1", "--max-missing", str(IMAGES)),
        "import": ("import", folder, "--out", out, "--jobs", "1"),
    }
    bare = measure([sys.executable, "-c", CHECK_IMAGES, folder], rounds)
    for name, words in ways.items():
        seconds, done = float("inf"), 0
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            run = kwrap(*words)
            seconds, done = min(seconds, run.wall_seconds), json.loads(run.output)["written"]
        ratio = seconds / done / (bare.wall_seconds / IMAGES)
        told = f"{done} images in {seconds:.1f} s, bare loop {IMAGES} in {bare.wall_seconds:.1f} s: {ratio:.2f} x"
        figures.append(Figure(f"kwrap {name}, one process", told, "<= 1.3 x the bare loop", ratio <= 1.3))
    for left in (folder, tars, out):
        shutil.rmtree(left)


def write_editions(database: Path, folder: Path) -> dict[str, str]:
    """Every edition of the posts in `database`: where each lies."""
    world = load_world(database)
    return {name: str(write(world, folder / name)) for name, write in EDITIONS.items()}


def bench_editions(figures: list[Figure], rounds: int) -> None:
    """`kwrap select` of all posts and their captions to one file, from every edition of the same 300,000 posts."""
    database = make_database(POSTS, relations=True, indexed=True)
    folder = BENCH / f"editions-{POSTS}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making {folder.name} …", file=sys.stderr, flush=True)
        # In a process of its own: a child's peak memory counts what its parent held when it began.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            places = pool.submit(write_editions, database, folder).result()
        (folder / "ready").write_text(json.dumps(places))
    recipe = BENCH / "all.toml"
    recipe.write_text("[selection]\n")
    places = {"sqlite": str(database), **json.loads((folder / "ready").read_text())}
    bar_seconds = 0.0
    for name, place in places.items():
        selection, out = BENCH / f"edition-{name}.parquet", BENCH / f"edition-{name}"
        seconds, peak_bytes = float("inf"), 0
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            runs = (
                kwrap("select", recipe, "--db", place, "--out", selection),
                kwrap("caption", selection, "--db", place, "--out", out, "--format", "jsonl"),
            )
            seconds = min(seconds, sum(run.wall_seconds for run in runs))
            peak_bytes = max(peak_bytes, *(run.peak_bytes for run in runs))
        shutil.rmtree(out)
        bar_seconds = bar_seconds or seconds
        told = f"{seconds:.1f} s = {seconds / bar_seconds:.2f} x sqlite, {peak_bytes / GIB:.2f} GiB"
        reached = seconds <= bar_seconds and peak_bytes <= 2 * GIB
        bar = "<= 1 x sqlite, <= 2 GiB" if name != "sqlite-api" else "<= 2 GiB"
        reached = reached if name != "sqlite-api" else peak_bytes <= 2 * GIB
        figures.append(Figure(f"select and caption, {name}", told, bar, reached))


def bench_large(figures: list[Figure], posts: int) -> None:
    """Selection and captions at full size: time against a scan, and memory."""
    database = make_database(posts, relations=True, indexed=False)
    selection, out = BENCH / "epsilon.parquet", BENCH / "large"
    measure([sys.executable, "-c", SCAN, database])
    scan = measure([sys.executable, "-c", SCAN, database])
    select = kwrap("select", "epsilon", "--db", database, "--out", selection)
    ratio = select.wall_seconds / scan.wall_seconds
    told = f"{select.wall_seconds:.0f} s, scan {scan.wall_seconds:.0f} s: {ratio:.2f} x"
    figures.append(Figure(f"kwrap select epsilon, {posts:,} posts", told, "<= 3 x the scan", ratio <= 3))
    figures.append(Figure("its memory", f"{select.peak_bytes / GIB:.2f} GiB", "<= 1 GiB", select.peak_bytes <= GIB))
    selected = json.loads(select.output)["selected"]
    shutil.rmtree(out, ignore_errors=True)
    caption = kwrap("caption", selection, "--db", database, "--out", out, "--format", "jsonl")
    told = f"{caption.peak_bytes / GIB:.2f} GiB; {caption.wall_seconds:.0f} s for {selected:,} posts"
    figures.append(Figure("memory of kwrap caption at that size", told, "<= 2 GiB", caption.peak_bytes <= 2 * GIB))
    shutil.rmtree(out)


def bench_tars(figures: list[Figure]) -> None:
    """The listing of a tar has a benchmark of its own."""
    listing = [sys.executable, str(ROOT / "benchmarks" / "bench_tars.py"), "--json"]
    document = json.loads(subprocess.run(listing, stdout=subprocess.PIPE, check=False).stdout)
    told, bar = f"{document['ratio_to_tarfile']:.2f} x tarfile alone", f"<= {document['bar']:g} x"
    figures.append(Figure("listing a tar of 7,000", told, bar, document["passed"]))


def main() -> int:
    """Measure and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large-posts", type=int, default=LARGE_POSTS, help="posts of the large database")
    parser.add_argument("--skip-large", action="store_true", help="leave the large database out")
    parser.add_argument("--images", type=Path, default=BENCH / "images", help="for 600,000 small files; must not exist")
    parser.add_argument("--only-editions", action="store_true", help="the editions of the metadata alone")
    parser.add_argument("--only-images", action="store_true", help="extract and import alone")
    parser.add_argument("--rounds", type=int, default=3, help="repeat short measurements and take the best")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    BENCH.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    if not (arguments.only_editions or arguments.only_images):
        bench_tars(figures)
        bench_captions(figures, arguments.rounds, arguments.images)
    if not arguments.only_editions:
        bench_images(figures, arguments.rounds)
    if not arguments.only_images:
        bench_editions(figures, arguments.rounds)
    if not (arguments.skip_large or arguments.only_editions or arguments.only_images):
        bench_large(figures, arguments.large_posts)
    if arguments.json:
        print(json.dumps([vars(figure) for figure in figures], indent=2))
    else:
        width = max(len(figure.name) for figure in figures)
        told = max(len(figure.told) for figure in figures)
        for figure in figures:
            verdict = "" if not figure.bar else "reached" if figure.reached else "MISSED"
            print(f"{figure.name:<{width}}  {figure.told:<{told}}  {figure.bar:<24}  {verdict}".rstrip())
    return 0 if all(figure.reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
