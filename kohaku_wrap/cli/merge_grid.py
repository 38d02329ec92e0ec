"""`kwrap merge --grid`: a merge for each point, its pictures and scores, and one page that compares them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from kohaku_wrap.cli.options import PATH, option_group
from kohaku_wrap.cli.output import print_answer, progress_bar
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import describe_absence, parse_json, read_regular, write_text
from kohaku_wrap.merging.formula.grids import Point, list_points, read_axis
from kohaku_wrap.merging.plan import MergePlan
from kohaku_wrap.processes import end_child, python_command, safe_environment
from kohaku_wrap.wording import show_bytes

FORMAT = 1
POINT_FILE = "point.json"
"""Of one point, in its folder: what it is made of, and the steps that are done."""

PAGE_FILE = "grid.html"
STOP_SECONDS = 20.0
RESULTS = {"judge": "score-{}.json", "ccip": "ccip-{}/ccip.json", "loss": "loss-{}/loss.json"}
"""Where the result of each `kwrap evaluate` lies in a point's folder."""

grid_options = option_group(
    click.option("--grid", is_flag=True, help="A merge for each number of the formula's letters, into the folder -o."),
    click.option("--sheet", type=PATH, metavar="FILE", help="--grid: draw this with each merge."),
    click.option("--sample", "sample_words", default="", metavar="WORDS", help="--grid: more for `kwrap sample`."),
    click.option(
        "--evaluate", "evaluations", multiple=True, metavar="WORDS",
        help="--grid: 'judge --judge DIR', 'ccip …' or 'loss …' of `kwrap evaluate`; repeatable.",
    ),
    click.option("--keep", type=click.Choice(("files", "recipes")), help="--grid: what stays. Usually files."),
)  # fmt: skip


class StepFailed(KwrapError):
    """A command of a grid failed; those before it are kept."""


@dataclass(frozen=True)
class Step:
    """One command for one point."""

    name: str
    """`merge`, `sample`, or `judge-1` and the like."""

    words: tuple[str, ...]
    """After `kwrap`."""

    key: str
    """What it depends on; a step that is recorded with the same key is done."""

    reads_model: bool = True
    """Whether it needs the merged file."""


@dataclass(frozen=True)
class Work:
    """A point's folder and steps."""

    point: Point
    """The numbers and the formula."""

    folder: Path
    """Where all of it lies."""

    steps: tuple[Step, ...]
    """The merge first."""

    keeps_file: bool
    """Whether the merged file stays."""

    done: dict[str, str] = field(default_factory=dict)
    """Steps by name that are recorded, with their keys."""

    @property
    def model(self) -> Path:
        return self.folder / f"{self.point.name}.safetensors"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def results(self) -> tuple[Path, ...]:
        """Where the scores are."""
        found = ((step.name.partition("-")) for step in self.steps[1:] if "-" in step.name)
        return tuple(self.folder / RESULTS[kind].format(number) for kind, _, number in found)

    def waiting(self) -> list[Step]:
        """The steps that are to be done; the merge too where another needs its file, which is gone."""
        merge, *others = self.steps
        left = [step for step in others if self.done.get(step.name) != step.key]
        is_made = self.done.get(merge.name) == merge.key
        needs_file = self.keeps_file or any(step.reads_model for step in left)
        return left if is_made and (self.model.is_file() or not needs_file) else [merge, *left]

    def record(self, step: Step) -> None:
        """Note that a step is done."""
        self.done[step.name] = step.key
        document = {"format": FORMAT, "formula": self.point.formula, "values": self.point.values, "done": self.done,
                    "command": command_line(*self.steps[0].words)}  # fmt: skip
        write_text(self.folder / POINT_FILE, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def split_words(option: str, text: str) -> list[str]:
    """Words as a shell reads them. Raises UsageError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}", "Close the quotes.") from None


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def lay_out(
    point: Point,
    folder: Path,
    merge_words: Sequence[str],
    inputs: Mapping[str, str],
    sheet: Path | None,
    sample_words: str,
    evaluations: Sequence[str],
    keeps_file: bool,
) -> Work:
    """The steps of a point. `inputs`: the hash of each file of the formula. Raises UsageError."""
    own = folder / point.name
    work = Work(point, own, (), keeps_file)
    key = digest(point.formula, merge_words, inputs)
    steps = [Step("merge", ("merge", *merge_words, "-o", str(work.model), "--", point.formula), key)]
    if sheet:
        words: tuple[str, ...] = (
            "sample", str(work.model), "--prompts", str(sheet), "--out", str(work.pictures),
        )  # fmt: skip
        more = split_words("--sample", sample_words)
        steps.append(Step("sample", (*words, *more), digest(key, sheet.read_bytes().hex(), more)))
    for number, text in enumerate(evaluations, start=1):
        kind, *more = split_words("--evaluate", text) or [""]
        if kind not in RESULTS:
            what = f"--evaluate {text!r}: {kind or 'nothing'} is none of {', '.join(RESULTS)}"
            raise UsageError(what, "For example: --evaluate 'judge --judge DIR'")
        if kind == "judge" and not sheet:
            raise UsageError("--evaluate judge has no pictures to judge", "Add --sheet FILE.")
        result = own / RESULTS[kind].format(number)
        if kind == "judge":
            words = ("evaluate", kind, str(work.pictures), *more, "--result", str(result))
        else:
            words = ("evaluate", kind, str(work.model), *more, "--out", str(result.parent))
        reads = steps[1 if kind == "judge" else 0].key
        steps.append(Step(f"{kind}-{number}", words, digest(reads, more), kind != "judge"))
    return Work(point, own, tuple(steps), keeps_file, read_done(own, key))


def read_done(folder: Path, key: str) -> dict[str, str]:
    """The steps that a folder records. Raises UsageError where it is of another merge."""
    file = folder / POINT_FILE
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    try:
        document = parse_json(read_regular(file))
        done = {str(name): str(value) for name, value in document["done"].items()}
    except FileNotFoundError:
        done = {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{file} is no record of a grid", "Remove that folder, or choose another with -o.") from None
    if done.get("merge", key) != key:
        raise UsageError(
            f"{folder} holds the merge of another formula, other files or options", "Choose another folder with -o."
        )
    return done


def run_child(words: Sequence[str], log: Path) -> str:
    """What `kwrap` with these words prints on stdout; all that it says also goes to `log`. Raises StepFailed."""
    command = python_command("-m", "kohaku_wrap.processes", os.getpid(), "kohaku_wrap", *words)
    before = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, env=safe_environment()
    ) as child:  # fmt: skip
        try:
            printed = child.communicate()[0]
        except BaseException:
            end_child(child, STOP_SECONDS)
            raise
    if child.returncode:
        said = log.read_bytes()[before:].decode("utf-8", "replace").splitlines()
        found = [place for place, line in enumerate(said) if line.startswith("error: ")]
        lines = said[found[-1] :] if found else [f"it ended with code {child.returncode}"]
        what = " ".join(line.strip() for line in lines).removeprefix("error: ")
        raise StepFailed(f"{command_line(*words)}: {what}", "Fix that and start the same command: it goes on.")
    return printed.decode()


def do_steps(works: Sequence[Work], finish: Callable[[], None]) -> int:
    """Do what waits, point by point; `finish` is called after each. How many steps were done."""
    total = sum(len(work.waiting()) for work in works)
    done = 0
    with progress_bar("grid", "steps") as report:
        for work in works:
            work.folder.mkdir(parents=True, exist_ok=True)
            for step in work.waiting():
                report(done, total)
                run_child(step.words, work.folder / "log.txt")
                work.record(step)
                done += 1
            if not work.keeps_file:
                work.model.unlink(missing_ok=True)
            finish()
        report(done, total)
    return done


def count_pictures(anchor: Path, sheet: Path, sample_words: str, folder: Path) -> int:
    """How many pictures each merge gets, by `kwrap sample --dry-run` on the anchor. Raises StepFailed."""
    words: tuple[str, ...] = ("sample", str(anchor), "--prompts", str(sheet), "--out", str(folder / "pictures"))
    words = (*words, *split_words("--sample", sample_words), "--dry-run", "--json")
    with tempfile.TemporaryDirectory() as scratch:
        printed = run_child(words, Path(scratch) / "log")
    return len(json.loads(printed)["pictures"])


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise KwrapError where the disk has no room for the files."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise KwrapError(
            f"{folder}: the merges take {needed_bytes:,} bytes and only {free_bytes:,} are free",
            "Free some space, take fewer points, or add --keep recipes: then one file lies there at a time.",
        )


def run_grid(
    formula: str,
    letters: Sequence[str],
    bindings: Mapping[str, Path],
    folder: Path | None,
    plan_of: Callable[[str], MergePlan],
    merge_words: Sequence[str],
    asked: Mapping[str, Any],
    dry_run: bool,
) -> None:
    """Merge, draw and score every point, and write the page.

    `plan_of`: the plan of a formula. `merge_words`: options of the merge as typed. `asked`: sheet, sample_words,
    evaluations and keep. All points are planned first, so that a fault of one is found before anything is written.
    """
    from kohaku_wrap.merging.hashes import hash_files
    from kohaku_wrap.reporting.grid import GridPoint, write_grid_page

    if folder is None or folder.suffix == ".safetensors" or folder.is_file():
        raise UsageError("--grid writes into a folder", "Add -o FOLDER.")
    if not letters:
        raise UsageError("--grid needs a letter of the formula and its numbers", "For example: A=0.5:1.25:0.25")
    sheet: Path | None = asked["sheet"]
    if sheet and not sheet.is_file():
        raise UsageError(f"--sheet {sheet}: {describe_absence(sheet)}", "Check the path.")
    points = list_points(formula, [read_axis(each) for each in letters])
    first = plan_of(points[0].formula)
    sizes = [first.data_bytes, *(plan_of(point.formula).data_bytes for point in points[1:])]
    with progress_bar("hash the inputs", "bytes") as report:
        found = hash_files(list(bindings.values()), 0, report)
    inputs = {name: hashes.sha256 for name, hashes in zip(bindings, found, strict=True)}
    keeps_files = asked["keep"] != "recipes"
    works = [
        lay_out(point, folder, merge_words, inputs, sheet, asked["sample_words"], asked["evaluations"], keeps_files)
        for point in points
    ]
    sizes = [0 if work.model.is_file() else size for size, work in zip(sizes, works, strict=True)]
    new_bytes = sum(sizes) if keeps_files else max(sizes)
    anchor = first.files[first.anchor].path
    pictures = count_pictures(anchor, sheet, asked["sample_words"], folder) if sheet else 0
    steps = [step for work in works for step in work.waiting()]
    described = {
        "formula": formula,
        "points": [{"name": each.point.name, "values": each.point.values, "formula": each.point.formula,
                    "file": str(each.model), "waiting": [step.name for step in each.waiting()]} for each in works],
        "merges": len(works), "merges_waiting": sum(step.name == "merge" for step in steps),
        "pictures_each": pictures, "pictures": pictures * len(works), "steps_waiting": len(steps),
        "disk_bytes": new_bytes, "page": str(folder / PAGE_FILE),
    }  # fmt: skip
    rows: list[tuple[str, Any]] = [
        ("formula", formula),
        ("merges", f"{len(works):,}: {described['merges_waiting']:,} to make"),
        ("pictures", f"{pictures:,} of each merge, {pictures * len(works):,} in all"),
        ("steps", f"{len(steps):,} to do: {', '.join(dict.fromkeys(step.name for step in steps)) or 'none'}"),
        ("disk", f"{show_bytes(new_bytes)} for {'all files' if keeps_files else 'one file at a time'}, and pictures"),
    ]
    if dry_run:
        rows += [(work.point.name, work.point.formula) for work in works]
        document = {"dry_run": True, "grid": described}
        print_answer(document, "Grid of merges", rows, "the same command without --dry-run")
        return
    check_space(folder, new_bytes)

    def write_page() -> None:
        made = [work for work in works if not work.waiting()]
        shown = [
            GridPoint(work.point.name, work.point.values, command_line(*work.steps[0].words), work.pictures,
                      work.results(), work.model.is_file()) for work in made
        ]  # fmt: skip
        write_grid_page(formula, shown, folder / PAGE_FILE, len(works) - len(made))

    count = do_steps(works, write_page)
    rows = [("formula", formula), ("merges", len(works)), ("pictures", pictures * len(works)), ("steps done", count)]
    rows.append(("page", folder / PAGE_FILE))
    document = {"dry_run": False, "grid": {**described, "steps_done": count}}
    following = command_line("inspect", works[0].model) if keeps_files else ""
    print_answer(document, f"Grid in {folder}", rows, following)
