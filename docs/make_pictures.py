"""Make the pictures of the page that README shows, from a run of the embedded world that crashes and goes on.

python docs/make_pictures.py [FOLDER]   (needs playwright and Chromium; some minutes)
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from PIL import Image

PICTURES = Path(__file__).parent / "pictures"
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUALITY = 80
CRASH_AT = 16
SETTINGS = (
    "effective_batch=4", "max_train_epochs=3", "lr_scheduler=constant_with_warmup", "lr_warmup_steps=4",
    "save_every_n_steps=6", "samples.every=6", "samples.steps=6", "dataset_options.resolution=[128, 128]",
)  # fmt: skip


def kwrap(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "kohaku_wrap", *map(str, words)], check=True)


def crash(words: Sequence[object], metrics: Path) -> None:
    """Train, and kill the trainer when it has done CRASH_AT optimizer steps."""
    process = psutil.Popen([sys.executable, "-m", "kohaku_wrap", *map(str, words)])
    while process.poll() is None:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= CRASH_AT:
            for child in process.children(recursive=True):
                with suppress(psutil.Error):  # it ends by itself meanwhile
                    if "engines" in " ".join(child.cmdline()):
                        child.kill()
        time.sleep(0.02)


def make_runs(world: Path) -> Path:
    """A run that crashes, is resumed, made longer and branched; the first one's folder."""
    shutil.rmtree(world, ignore_errors=True)
    site, selection, runs = world / "site.toml", world / "demo.parquet", world / "runs"
    kwrap("demo", world, "--posts", 90)
    kwrap("select", "demo", "--db", world / "danbooru.db", "--out", selection)
    kwrap("extract", selection, "--tars", world / "tars", "--out", world / "images")
    kwrap("caption", selection, "--db", world / "danbooru.db", "--out", world / "images")
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    crash(("train", "demo", "--site", site, "--run", "epsilon", *chosen), runs / "epsilon" / "metrics.jsonl")
    kwrap("resume", runs / "epsilon")
    kwrap("extend", runs / "epsilon", "--epochs", 1)
    kwrap("branch", runs / "epsilon", "--step", 48, "--run", "lower-rate", "--set", "unet_lr=5e-5")
    for name in ("epsilon", "lower-rate"):
        kwrap("verify", runs / name)
        kwrap("report", runs / name)
    kwrap("report", runs / "epsilon", runs / "lower-rate", "-o", runs / "both.html")
    kwrap("report", "--index", runs)
    return runs / "epsilon"


def photograph(page: Path, target: Path, width: int, height: int, scheme: str, section: str = "") -> None:
    """The page, or from one of its sections on, as a browser shows it."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise SystemExit("no Chromium here: apt install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab.goto(page.absolute().as_uri())
        if section:
            tab.evaluate(f"document.getElementById({json.dumps(section)}).scrollIntoView()")
        picture = Image.open(io.BytesIO(tab.screenshot()))
        browser.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(target, "WEBP", quality=QUALITY, method=6)
    print(f"{target}: {target.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="For the world, kept; else a temporary one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = make_runs((arguments.folder or Path(temporary)) / "world")
        photograph(run / "report.html", PICTURES / "report.webp", 1200, 1250, "light")
        sheet = max(run.glob("samples/*/contact-sheet.png"))
        with Image.open(sheet) as picture:
            picture.convert("RGB").save(PICTURES / "contact-sheet.webp", "WEBP", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
