"""`kwrap evaluate ccip`: how well models draw characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.drawing import (
    drawing_options,
    list_models,
    model_options,
    negative_option,
    prediction_option,
    prepare,
    sampler_steps_option,
)
from kohaku_wrap.cli.exposure_shown import find_exposure
from kohaku_wrap.cli.next_steps import read_site_paths
from kohaku_wrap.cli.options import FOLDER, PATH, open_source, read_by, site_option, tags_option
from kohaku_wrap.cli.output import (
    list_first,
    print_answer,
    print_note,
    progress_bar,
    verb,
)
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import describe_absence, write_text
from kohaku_wrap.sampling.sheets import MOST_CELLS, check_guidance, read_size
from kohaku_wrap.wording import format_duration, show_bytes, show_path

if TYPE_CHECKING:
    from kohaku_wrap.evaluation.characters import Character
    from kohaku_wrap.evaluation.exposure import Exposure
    from kohaku_wrap.sampling.running import DrawingJob

FROM_DATABASE = "db"
RESULT, CURVE, JUDGED = "ccip.json", "ccip.svg", ".judged"
ASSUMED_SECONDS = 6.0
"""A picture, where none is drawn yet: a guess for 24 steps at 1024² on one GPU of 2020."""

BYTES_A_PIXEL = 1.6
"""Of a PNG, about."""


@verb(
    """
  kwrap evaluate ccip model.safetensors --characters db --db danbooru.db \\
      --images images --judge ccip-caformer-24-randaug-pruned --out scores --dry-run
  kwrap evaluate ccip --run epsilon --steps all --characters character_index \\
      --judge ccip-caformer-24-randaug-pruned --out scores
  kwrap evaluate ccip other.safetensors --characters list.txt --judge JUDGE \\
      --out other --against scores/ccip.json
""",
    unless=("dry_run",),
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=PATH)
@model_options
@click.option("--characters", required=True, metavar="db|FILE|INDEX", help="Of the database, a list, or an index.")
@click.option("--judge", "judge_folder", required=True, type=PATH, metavar="DIR", help="CCIP's.")
@click.option("--out", required=True, type=FOLDER, help="Pictures and result.")
@click.option("--db", type=PATH, metavar="DB", help="Usually the site's.")
@tags_option
@click.option("--images", type=PATH, metavar="DIR", help="Extracted posts; usually the site's.")
@click.option("--min-posts", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Solo posts.")
@click.option(
    "--images-per-character",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    metavar="N",
    help="Pictures of each, with seeds from 0 on.",
)
@click.option("--preset", default="safe", show_default=True, metavar="NAME", help="Prompts: safe, core or published.")
@negative_option
@click.option("--size", callback=read_by(read_size), metavar="WxH", help="Usually what the model is for.")
@click.option("--guidance", type=float, callback=read_by(check_guidance), metavar="CFG", help="Usually 5.")
@sampler_steps_option
@prediction_option
@click.option("--against", multiple=True, type=PATH, metavar="FILE", help="Another ccip.json.")
@drawing_options
@click.option("--dry-run", is_flag=True, help="Print pictures, hours and disk, draw none.")
@site_option
def ccip(
    models: tuple[Path, ...],
    characters: str,
    judge_folder: Path,
    out: Path,
    db: Path | None,
    tag_table: Path | None,
    images: Path | None,
    min_posts: int,
    images_per_character: int,
    preset: str,
    against: tuple[Path, ...],
    dry_run: bool,
    site_file: Path | None,
    **asked: Any,
) -> None:
    """Score how well models draw characters, by CCIP.

    For each character, pictures are drawn with fixed prompts and seeds, and compared by the judge with references:
    extracted posts of that character alone, or the features of an index. The score is the share of references that
    the judge takes for the same character. A character without references enough is listed as not scored. A call that
    was killed is run again and goes on.
    """
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.evaluation import ccip_run
    from kohaku_wrap.evaluation.characters import PRESETS, write_prompt
    from kohaku_wrap.evaluation.judge_folders import open_judge
    from kohaku_wrap.evaluation.looking import Looker
    from kohaku_wrap.sampling.running import draw_sheet, find_waiting
    from kohaku_wrap.sampling.sheets import Sheet, SheetPrompt

    if preset not in PRESETS:
        raise UsageError(f"--preset: there is no {preset}", f"There are {', '.join(PRESETS)}.")
    judge = open_judge(judge_folder, ("ccip",), asked["threads"] or 1)
    for path in against:
        ccip_run.read_other(path, {"judge": judge.describe(), "prompts": {"template": PRESETS[preset]}})
    listed = list_models(models, asked, site_file)
    found = list_characters(characters, db, tag_table, images, site_file, out)
    choice = ccip_run.choose_characters(found, min_posts)
    pictures = len(choice.scored) * images_per_character * len(listed)
    if pictures > MOST_CELLS:
        raise UsageError(
            f"{pictures:,} pictures of {len(choice.scored):,} characters; at most {MOST_CELLS:,} can be drawn at once",
            "Ask for fewer: a larger --min-posts, fewer --images-per-character, or a list of tags in --characters.",
        )
    recipe = load_dataset("epsilon").caption
    prompts = {each.tag: write_prompt(each, preset, recipe) for each in choice.scored}
    sheet = Sheet(
        tuple(SheetPrompt(prompts[each.tag], each.tag) for each in choice.scored),
        seeds=tuple(range(images_per_character)),
        sizes=tuple(filter(None, [asked["size"]])),
        guidances=tuple(filter(None, [asked["guidance"]])),
        negative=asked["negative"],
        steps=asked["sampler_steps"],
    )
    asked |= {"template": None, "zero_terminal_snr": None, "lenient": False}
    job = prepare(sheet, listed, asked, site_file, out)
    waiting = find_waiting(job)
    if dry_run:
        show_plan(job, len(waiting), choice)
        return
    with progress_bar("draw", "pictures") as report:
        draw_sheet(job, waiting, report)
    looker = Looker(judge, out / JUDGED)
    with progress_bar("references", "pictures") as report:
        references, left, unreadable = ccip_run.look_at_references(looker, choice.scored, min_posts, report)
    drawn = ccip_run.group_cells(job.cells, out)
    with progress_bar("judge", "pictures") as report:
        scores, broken = ccip_run.score_models(looker, drawn, references, report)
    by_title = {each.labels["model"]: each for each in job.cells}
    named = [(title, by_title[title].cell.model, by_title[title].model.optimizer_step) for title in drawn]
    exposures = find_exposures(asked["run"], [step for _, _, step in named], site_file)
    seen = ccip_run.look_up_exposures(exposures, sorted(references))
    first = job.cells[0].cell
    settings = {
        "images_per_character": images_per_character, "min_posts": min_posts, "characters": Path(characters).name,
        "size": [first.width, first.height], "sampler_steps": first.steps, "guidance": first.guidance,
        "sampler": first.sampler, "schedule": first.schedule, "negative": first.negative,
        "device": first.compute.device, "dtype": first.compute.dtype,
    }  # fmt: skip
    result = ccip_run.compose_result(
        looker, choice, references, prompts, preset, named, scores, seen, settings, left, [*unreadable, *broken]
    )
    for path in against:
        ccip_run.lay_over(result, path)
    write_result(out, result)
    show_result(result, out)


def list_characters(
    characters: str, db: Path | None, tag_table: Path | None, images: Path | None, site: Path | None, out: Path
) -> list[Character]:
    """The characters of an index, of a list, or all of the database."""
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.evaluation.characters import BadCharacters, find_characters, read_index, read_names
    from kohaku_wrap.metadata.columns import DANBOORU
    from kohaku_wrap.metadata.parallel import usable_threads

    path = Path(characters)
    if characters != FROM_DATABASE and path.is_dir():
        return read_index(path)
    if characters != FROM_DATABASE and not path.is_file():
        raise BadCharacters(
            f"{path}: {describe_absence(path, 'file or folder')}", "Give a list of tags, an index's folder, or `db`."
        )
    names = None if characters == FROM_DATABASE else read_names(path)
    paths = load_site(site).paths if site else read_site_paths(Path())
    db = db or (paths.db if paths else None)
    images = images or (paths.images if paths else None)
    if db is None or images is None:
        raise UsageError(
            "references come from the database and the extracted posts",
            "Give --db DB and --images DIR, or --site site.toml; or an index: --characters FOLDER.",
        )
    return find_characters(open_source(db, DANBOORU, tag_table), images, names, out / ".spill", usable_threads())


def find_exposures(run: str | None, steps: Sequence[int | None], site: Path | None) -> list[Exposure | None]:
    """What each network of a run was trained on; None where it is of no run, or where that is not known."""
    found: list[Exposure | None] = []
    for step in steps:
        exposure = None
        if run is not None and step is not None:
            try:
                exposure = find_exposure(run, step, site, 0)
            except KwrapError as error:
                print_note(f"note: how often characters were trained is not known: {error.message}")
        found.append(exposure)
    return found


def write_result(out: Path, result: dict[str, Any]) -> None:
    """The document and its curve, beside the pictures."""
    from kohaku_wrap.evaluation.curve import draw_curves

    write_text(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    curves = [(each["title"], each["curve"]) for each in result["models"]]
    note = result["judge"]["title"]
    write_text(out / CURVE, draw_curves(curves, "CCIP score of each character, sorted", note))


def show_plan(job: DrawingJob, waiting: int, choice: Any) -> None:
    """What would be drawn: pictures, hours and disk."""

    cell = job.cells[0].cell
    size_bytes = int(waiting * cell.width * cell.height * BYTES_A_PIXEL)
    seconds = waiting * ASSUMED_SECONDS * cell.steps / 24 * cell.width * cell.height / 1024**2 / job.processes
    references = sum(len(each.references) for each in choice.scored)
    plan = {
        "characters": len(choice.scored), "not_scored": list(choice.not_scored), "pictures": len(job.cells),
        "to_draw": waiting, "references": references, "seconds_assumed": seconds, "bytes": size_bytes,
    }  # fmt: skip
    rows: list[tuple[str, Any]] = [
        ("characters", f"{len(choice.scored):,}, and {len(choice.not_scored):,} not scored"),
        ("pictures", f"{len(job.cells):,}, of which {waiting:,} are to be drawn"),
        ("references", f"{references:,} to look at"),
        ("time", f"{format_duration(seconds)}, if 24 steps at 1024² take {ASSUMED_SECONDS:g} s (a guess for a GPU)"),
        ("disk", f"about {show_bytes(size_bytes)}"),
        ("first prompt", cell.prompt),
    ]
    rows += list_first("not scored", [f"{each['tag']}: {each['why']}" for each in choice.not_scored])
    print_answer({"dry_run": True, **plan}, "CCIP", rows, "the same command without --dry-run")


def show_result(result: dict[str, Any], out: Path) -> None:
    """Print what came out."""
    rows: list[tuple[str, Any]] = [("judge", result["judge"]["title"])]
    rows += [(model["title"], describe_model(model)) for model in result["models"]]
    for pair in result["pairs"]:
        apart = pair["difference"]
        if apart:
            shown = f"{apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})"
            rows.append(
                (f"{pair['from']} → {pair['to']}", f"{shown}, {pair['wins']:,} wins, {pair['losses']:,} losses")
            )
    rows += list_first("not scored", [f"{each['tag']}: {each['why']}" for each in result["not_scored"]])
    rows += list_first("unreadable", result["unreadable"])
    rows += [("prompts", note)] if (note := result["prompts"]["note"]) else []
    rows += [("limits", result["limits"]), ("curve", out / CURVE), ("result", out / RESULT)]
    following = command_line("evaluate", "ccip", "MODEL", "--against", show_path(out / RESULT))
    payload = {"dry_run": False, "file": out / RESULT, "svg": out / CURVE, "result": result}
    print_answer(payload, "CCIP", rows, f"{following} … lays another model over it")


def describe_model(model: dict[str, Any]) -> str:
    """One model in words."""
    score, bound = model["score"], model["score_of_bound"]
    if score is None:
        return "no character scored"
    text = f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f}) over {model['characters']:,} characters"
    text += f", {bound['mean']:.3f} of the upper bound" if bound else ""
    return f"{text}, {model['above_0.9']:,} above 0.9"
