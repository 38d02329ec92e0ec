"""The whole Epsilon recipe, one `kwrap` command after another: `make epsilon`.

Without `--site` it runs at demo scale on the embedded world; with one, on real data at full scale.
Every command is printed before it runs, so that it can be repeated by hand.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kohaku_wrap.config.site import SitePaths, load_site
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import describe_absence
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE
from kohaku_wrap.outlets import EXIT_UNREAD, OUTLETS, run_as_work
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.reporting.page import PAGE_FILE
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.samples import CONTACT_SHEET, folder_of_pictures
from kohaku_wrap.wording import show_path

DEMO_FOLDER = Path("epsilon-demo")
RUN_NAME = "epsilon"
PROMPTS = ("1girl, solo, smile, masterpiece, newest, safe", "no humans, scenery, sky, best quality, newest, safe")
PICTURES = "pictures"


@dataclass(frozen=True)
class Stage:
    """One command of the way through."""

    title: str
    """What the command is for, in a few words."""

    arguments: tuple[str, ...]
    """What follows `kwrap`."""

    result: Path | None = None
    """The file or folder that it makes, for the closing table."""


class StageFailed(KwrapError):
    """A command of the tour failed; its own message stands above."""

    def __init__(self, stage: Stage, exit_code: int) -> None:
        super().__init__(
            f"`kwrap {shlex.join(stage.arguments)}` ended with exit code {exit_code}",
            "Fix what its message names and run the same make command again; what is done is kept.",
        )
        self.exit_code = exit_code


def list_stages(site_file: Path | None, max_missing: int) -> Iterator[Stage]:
    """The recipe from the database to the baked model; each stage is made when those before it have run."""
    demo = site_file is None
    if site_file is None:
        site_file = DEMO_FOLDER / "site.toml"
        yield Stage("embedded world", ("demo", str(DEMO_FOLDER)), DEMO_FOLDER)
    site = load_site(site_file)
    paths = shorten_paths(site.paths)
    recipe = "demo" if demo else "epsilon"
    at_site = ("--site", str(site_file))
    yield from dataset_stages(paths, recipe, max_missing)
    if not demo:
        yield Stage("machine", ("doctor", recipe, *at_site))
    yield from training_stages(paths.runs / RUN_NAME, recipe, at_site)
    yield from result_stages(paths.runs / RUN_NAME, paths.base_model, at_site, demo)


def dataset_stages(paths: SitePaths, dataset: str, max_missing: int) -> Iterator[Stage]:
    """Select, extract and caption into the site's image folder."""
    selection = paths.images.parent / f"{dataset}.parquet"
    to_images, database = ("--out", str(paths.images)), ("--db", str(paths.db))
    tars = ("--tars", str(paths.tars), *to_images, "--max-missing", str(max_missing))
    rules = (*database, *to_images, "--dataset", dataset)
    yield Stage("selection", ("select", dataset, *database, "--out", str(selection)), selection)
    yield Stage("images", ("extract", str(selection), *tars), paths.images)
    yield Stage("captions", ("caption", str(selection), *rules), paths.images / CAPTIONS_FILE)


def training_stages(run: Path, template: str, at_site: tuple[str, ...]) -> Iterator[Stage]:
    """Plan, train (or go on with) the run, prove it from its ledger."""
    yield Stage("plan", ("plan", template, *at_site))
    if not run.exists():
        yield Stage("training", ("train", template, *at_site, "--run", RUN_NAME), run)
    elif not network_of(run).exists():
        yield Stage("training", ("resume", str(run)), run)
    yield Stage("proof", ("verify", str(run)))


def network_of(run: Path) -> Path:
    """What the run's training ends in."""
    return run / "checkpoints" / f"{RUN_NAME}.safetensors"


def result_stages(run: Path, base_model: Path, at_site: tuple[str, ...], demo: bool) -> Iterator[Stage]:
    """Bake the trained network into its base and look at what came out."""
    network, baked = network_of(run), run / f"{RUN_NAME}-baked.safetensors"
    models = ("-m", f"base={base_model}", "-m", f"epsilon={network}")
    trained = Run(run)
    drawn = folder_of_pictures(trained, trained.lock.total_optimizer_steps)
    scale = ("--sampler-steps", "2", "--size", "64x64") if demo else ("--seed", "1", "--seed", "2")
    prompts = tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))
    sheet = ("--run", str(run), *prompts, *scale, *at_site, "--out", str(drawn))
    yield Stage("network", ("inspect", str(network)), network)
    yield Stage("baked model", ("merge", "base + 1.0 * net(epsilon)", *models, "-o", str(baked)), baked)
    yield Stage("inspection", ("inspect", str(baked)))
    yield Stage(PICTURES, ("sample", *sheet), drawn / CONTACT_SHEET)
    yield Stage("page of the run", ("report", str(run)), run / PAGE_FILE)


def shorten_paths(paths: SitePaths) -> SitePaths:
    """The same paths as one would type them here: relative where they lie below the current folder."""
    below = {name: Path(show_path(path)) for name, path in vars(paths).items() if isinstance(path, Path)}
    return replace(paths, **below)


def run_stage(stage: Stage) -> float:
    """Run one command in its own process; seconds taken. Raises StageFailed."""
    print(f"\n$ kwrap {shlex.join(stage.arguments)}", flush=True)
    started = time.monotonic()
    is_lost = 1 in OUTLETS and OUTLETS[1].error is not None
    done = subprocess.run(
        python_command("-m", "kohaku_wrap", *stage.arguments),
        env=safe_environment(),
        stdout=subprocess.DEVNULL if is_lost else None,
        check=False,
    )
    # Nobody reads any more what it only showed.
    if done.returncode not in (0, EXIT_UNREAD):
        raise StageFailed(stage, done.returncode)
    return time.monotonic() - started


def take_tour(site_file: Path | None, max_missing: int) -> None:
    """Run the recipe from the database to the baked model, and print what was made."""
    demo = site_file is None
    if demo:
        print("Epsilon's recipe at demo scale: made-up posts, small pictures, a tiny SDXL.")
        print("On real data: make epsilon SITE=site.toml (docs/guide.md shows the file).")
    seconds = {stage: run_stage(stage) for stage in list_stages(site_file, max_missing)}
    print_results(seconds, demo)
    found = {stage.title: stage.result for stage in seconds if stage.result}
    page = found["page of the run"]
    print(f"Pictures: {found[PICTURES]}{' (the tiny model is untrained: they mean nothing)' if demo else ''}")
    print_next(page.parent, demo)
    print(f"Open in a browser: {page}")


def print_results(seconds: Mapping[Stage, float], demo: bool) -> None:
    """Print what was made, where, and how long each took."""
    width = max(len(stage.title) for stage in seconds if stage.result)
    print(f"\nWhat was made{' (demo scale)' if demo else ''}")
    print(f"{'what':<{width}}  seconds  where")
    for stage, taken in seconds.items():
        if stage.result:
            print(f"{stage.title:<{width}}  {taken:>7.0f}  {stage.result}")
    print(f"{'in all':<{width}}  {sum(seconds.values()):>7.0f}")


def print_next(run: Path, demo: bool) -> None:
    """Print the command to try, and what it takes to try it."""
    print(f"Next: {command_line('status', run)}")
    if shutil.which("kwrap") is None:
        print("(`. .venv/bin/activate` puts kwrap on the path)")
    if demo:
        print("At full scale: write a site.toml with your paths and run make epsilon SITE=site.toml")


def main() -> int:
    """Run the tour."""
    parser = argparse.ArgumentParser(prog="make epsilon", description=__doc__)
    parser.add_argument("--site", type=Path, help="what is true of this machine; without it, the demo")
    parser.add_argument("--max-missing", type=int, default=0, metavar="N", help="images that may lack in the tars")
    arguments = parser.parse_args()
    if arguments.site is not None and not arguments.site.is_file():
        raise UsageError(
            f"{arguments.site}: {describe_absence(arguments.site)}", "docs/guide.md shows what a site.toml holds."
        )
    take_tour(arguments.site, arguments.max_missing)
    return 0


if __name__ == "__main__":
    run_as_work(main)
