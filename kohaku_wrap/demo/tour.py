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
from dataclasses import dataclass, replace
from pathlib import Path

from kohaku_wrap.config.site import Site, SitePaths, load_site
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import describe_absence
from kohaku_wrap.outlets import EXIT_UNREAD, OUTLETS, run_as_work
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.samples import CONTACT_SHEET, folder_of_pictures

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


def dataset_stages(site: Site, dataset: str, selection: Path, max_missing: int = 0) -> list[Stage]:
    """Select, extract and caption into the site's image folder."""
    paths = site.paths
    database, images = str(paths.db), str(paths.images)
    extract = ("extract", str(selection), "--tars", str(paths.tars), "--out", images, "--max-missing", str(max_missing))
    return [
        Stage("selection", ("select", dataset, "--db", database, "--out", str(selection)), selection),
        Stage("images", extract, paths.images),
        Stage(
            "captions",
            ("caption", str(selection), "--db", database, "--out", images, "--dataset", dataset),
            Path(images, "captions.arrow"),
        ),
    ]


def training_stages(site: Site, site_file: Path, template: str) -> list[Stage]:
    """Plan, train (or go on with) the run, prove it from its ledger."""
    run = site.paths.runs / RUN_NAME
    at_site = ("--site", str(site_file))
    if not run.exists():
        train = [Stage("training", ("train", template, *at_site, "--run", RUN_NAME), run)]
    elif (run / "checkpoints" / f"{RUN_NAME}.safetensors").exists():
        train = []
    else:
        train = [Stage("training", ("resume", str(run)), run)]
    return [
        Stage("plan", ("plan", template, *at_site)),
        *train,
        Stage("proof", ("verify", str(run))),
    ]


def result_stages(site: Site, site_file: Path, demo: bool) -> list[Stage]:
    """Bake the trained network into its base and look at what came out."""
    run = site.paths.runs / RUN_NAME
    network = run / "checkpoints" / f"{RUN_NAME}.safetensors"
    baked = run / f"{RUN_NAME}-baked.safetensors"
    models = ("-m", f"base={site.paths.base_model}", "-m", f"epsilon={network}")
    trained = Run(run)
    drawn = folder_of_pictures(trained, trained.lock.total_optimizer_steps)
    scale = ("--sampler-steps", "2", "--size", "64x64") if demo else ("--seed", "1", "--seed", "2")
    prompts = tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))
    sheet = ("--run", str(run), *prompts, *scale)
    return [
        Stage("network", ("inspect", str(network)), network),
        Stage("baked model", ("merge", "base + 1.0 * net(epsilon)", *models, "-o", str(baked)), baked),
        Stage("inspection", ("inspect", str(baked))),
        Stage(PICTURES, ("sample", *sheet, "--site", str(site_file), "--out", str(drawn)), drawn / CONTACT_SHEET),
        Stage("page of the run", ("report", str(run)), run / "report.html"),
    ]


def shorten_paths(paths: SitePaths) -> SitePaths:
    """The same paths as one would type them here: relative where they lie below the current folder."""
    here = Path.cwd()
    below = {
        name: path.relative_to(here)
        for name, path in vars(paths).items()
        if isinstance(path, Path) and path.is_relative_to(here)
    }
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
    stages: list[Stage] = []
    demo = site_file is None
    if site_file is None:
        print("Epsilon's recipe at demo scale: made-up posts, small pictures, a tiny SDXL.")
        print("On real data: make epsilon SITE=site.toml (docs/guide.md shows the file).")
        site_file = DEMO_FOLDER / "site.toml"
        world = Stage("embedded world", ("demo", str(DEMO_FOLDER)), DEMO_FOLDER)
        seconds = {world.title: run_stage(world)}
        stages.append(world)
    else:
        seconds = {}
    site = load_site(site_file)
    site = replace(site, paths=shorten_paths(site.paths))
    recipe = "demo" if demo else "epsilon"
    selection = site.paths.images.parent / f"{recipe}.parquet"
    rest = dataset_stages(site, recipe, selection, max_missing)
    if not demo:
        rest.append(Stage("machine", ("doctor", recipe, "--site", str(site_file))))
    rest += training_stages(site, site_file, recipe)
    for stage in rest:
        seconds[stage.title] = run_stage(stage)
    results = result_stages(site, site_file, demo)
    for stage in results:
        seconds[stage.title] = run_stage(stage)
    stages += [*rest, *results]
    print_results(stages, seconds, demo)
    sheet = next(stage.result for stage in stages if stage.title == PICTURES)
    print(f"Pictures: {sheet}{' (the tiny model is untrained: they mean nothing)' if demo else ''}")
    print_next(site.paths.runs / RUN_NAME, demo)
    print(f"Open in a browser: {site.paths.runs / RUN_NAME / 'report.html'}")


def print_results(stages: list[Stage], seconds: dict[str, float], demo: bool) -> None:
    """Print what was made, where, and how long each took."""
    made = [stage for stage in stages if stage.result]
    width = max(len(stage.title) for stage in made)
    print(f"\nWhat was made{' (demo scale)' if demo else ''}")
    print(f"{'what':<{width}}  seconds  where")
    for stage in made:
        print(f"{stage.title:<{width}}  {seconds[stage.title]:>7.0f}  {stage.result}")
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
