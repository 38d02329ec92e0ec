"""`kwrap sample`: pictures from checkpoints, baked models, networks and runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.drawing import (
    COMPUTE_NAMES,
    choose_sheet,
    drawing_options,
    list_models,
    model_options,
    negative_option,
    prediction_option,
    prepare,
    sampler_steps_option,
)
from kohaku_wrap.cli.options import FOLDER, PATH, open_run, option_group, read_by, site_option
from kohaku_wrap.cli.output import (
    print_answer,
    print_note,
    progress_bar,
    verb,
)
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.sampling.cells import EMPHASES, MOST_SEED, SAMPLERS, SCHEDULES
from kohaku_wrap.sampling.sheets import check_guidance, read_hires, read_size
from kohaku_wrap.wording import count_of, show_path

if TYPE_CHECKING:
    from kohaku_wrap.sampling.expanding import PlacedCell
    from kohaku_wrap.sampling.running import DrawingJob


picture_options = option_group(
    click.option("--style", "styles", multiple=True, metavar="NAME", help="A style prompt, or none; repeatable."),
    negative_option,
    click.option("--seed", "seeds", multiple=True, type=click.IntRange(0, MOST_SEED), metavar="N",
                 help="Repeatable; usually 0."),
    click.option("--size", "sizes", multiple=True, metavar="WxH", callback=read_by(read_size),
                 help="Repeatable; usually what the model is for."),
    click.option("--guidance", "guidances", multiple=True, type=float, metavar="CFG", callback=read_by(check_guidance),
                 help="Repeatable; usually 5."),
    click.option("--sampler", type=click.Choice(tuple(SAMPLERS)), help="Usually euler-a."),
    click.option("--schedule", type=click.Choice(tuple(SCHEDULES)), help="Usually exponential."),
    sampler_steps_option,
    click.option("--clip-skip", type=click.IntRange(1, 12), metavar="N", help="Usually 2, as SDXL is trained."),
    click.option("--emphasis", type=click.Choice(EMPHASES), help="How weights act; usually no-norm."),
    prediction_option,
    click.option("--zero-terminal-snr", is_flag=True, default=None, help="With --prediction v, as trained."),
    click.option("--template", metavar="NAME", help="Take the prediction from a template."),
    click.option("--hires", metavar="SCALE[:S]", callback=read_by(read_hires),
                 help="A second, larger pass over a share S of the steps."),
    click.option("--lenient", is_flag=True, help="Read an open bracket as the webui does."),
)  # fmt: skip
"""Options that decide a picture, over those of the sheet."""


@verb(
    """
  kwrap sample model.safetensors --prompt "1girl, solo, masterpiece" --out look
  kwrap sample base.safetensors --network epsilon.safetensors:0.8 \\
      --prompts prompts.txt --style kohaku-1 --seed 1 --seed 2 --out look
  kwrap sample --run epsilon --steps all --prompts sheet.toml --out look
  kwrap sample --run epsilon --queued
  kwrap sample a.safetensors b.safetensors --prompts sheet.toml --out look \\
      --jobs 4 --size 832x1216

\b
A sheet (sheet.toml) is the product of its lists:
  prompts = ["1girl, {style}, solo, masterpiece"]  or [[prompts]] tables with
                                                   prompt, name, negative
  styles = ["none", "kohaku-1"]   seeds = [1, 2]   sizes = ["832x1216"]
  guidance = [5, 7]   negative, steps, sampler, schedule, clip_skip, emphasis,
  hires; rows and columns name the axes of the contact sheet: prompt, style,
  seed, model, size, guidance.
""",
    unless=("dry_run",),
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=PATH)
@model_options
@click.option("--prompts", "sheet_file", type=PATH, metavar="FILE", help="Prompts, or a sheet.")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; repeatable.")
@click.option("--queued", is_flag=True, help="With --run: what its [samples] asks for and is not drawn yet.")
@click.option(
    "--out",
    type=FOLDER,
    help="Where pictures go; with --run usually its samples/.",
)
@picture_options
@drawing_options
@click.option("--dry-run", is_flag=True, help="List the pictures, draw none.")
@site_option
def command(
    models: tuple[Path, ...],
    sheet_file: Path | None,
    texts: tuple[str, ...],
    queued: bool,
    out: Path | None,
    dry_run: bool,
    site_file: Path | None,
    **asked: Any,
) -> None:
    """Draw pictures, and a contact sheet of them.

    A picture is drawn once: a second call goes on where the first one ended, and only what is not there is drawn. Each
    PNG says how it was made, for galleries and for `kwrap inspect`. Seeds do not give the webui's pictures: the noise
    of a picture follows from its seed and step alone, on every device.
    """
    from kohaku_wrap.sampling.contact_sheet import choose_axes, write_contact_sheets
    from kohaku_wrap.sampling.running import draw_sheet, find_waiting
    from kohaku_wrap.training.records.samples import ASKED_FOLDER

    if queued:
        given = models or texts or sheet_file or out or any(asked[name] for name in ("networks", "steps", "vae"))
        if asked["run"] is None or given:
            raise UsageError(
                "--queued draws what the [samples] of a run asks for",
                "Give --run RUN and no model, prompt, --vae or --out.",
            )
        draw_queued(site_file, asked, dry_run)
        return
    sheet = choose_sheet(sheet_file, texts, asked)
    found = list_models(models, asked, site_file)
    if out is None:
        if asked["run"] is None:
            raise UsageError("--out is missing", "Name the folder where the pictures go: --out DIR.")
        out = open_run(asked["run"], site_file).samples / ASKED_FOLDER
    job = prepare(sheet, found, asked, site_file, out)
    choose_axes(job.cells, sheet.rows, sheet.columns)
    for name in dict.fromkeys(known.model.path.name for known in job.models if not known.prediction.source):
        print_note(f"note: {name} does not say what it predicts; epsilon is assumed (--prediction)")
    waiting = find_waiting(job)
    if dry_run:
        show(job, waiting, [], dry_run=True)
        return
    with progress_bar("draw", "pictures") as report:
        draw_sheet(job, waiting, report)
    show(job, waiting, write_contact_sheets(out, job.cells, sheet.rows, sheet.columns), dry_run=False)


def draw_queued(site: Path | None, asked: dict[str, Any], dry_run: bool) -> None:
    """Draw what a run still wants, and print where it lies."""
    from kohaku_wrap.sampling.devices import choose_compute
    from kohaku_wrap.sampling.of_runs import draw_queue, sheet_of_run
    from kohaku_wrap.training.records.samples import list_pictures

    run = open_run(asked["run"], site)
    compute = choose_compute(*(asked[name] for name in COMPUTE_NAMES))
    sheet_of_run(run)
    drawn = [each for each in list_pictures(run) if not each.are_drawn] if dry_run else []
    if not dry_run:
        with progress_bar("hash", "bytes") as hashed, progress_bar("draw", "pictures") as report:
            drawn = list(draw_queue(run, compute, hashed, report))
    found = [{"optimizer_step": each.optimizer_step, "network": str(each.network), "contact_sheet": str(each.sheet)}
             for each in drawn]  # fmt: skip
    payload = {"dry_run": dry_run, "queue": found, "compute": asdict(compute)}
    rows: list[tuple[str, Any]] = [(f"optimizer step {each.optimizer_step:,}", each.sheet) for each in drawn] or [
        ("none", "all are drawn")
    ]
    title = f"Pictures of {run.name}: {'to draw' if dry_run else 'drawn'}"
    print_answer(payload, title, rows, command_line("status", show_path(run.folder)))


def show(job: DrawingJob, waiting: list[PlacedCell], contacts: list[Path], dry_run: bool) -> None:
    """Print what was drawn, or would be."""
    from kohaku_wrap.training.records.samples import ASKED_FOLDER

    new = {each.cell.name for each in waiting}
    pictures = [
        {"file": str(job.out / each.cell.name), "seed": each.cell.seed, "prompt": each.cell.prompt,
         "model": each.model.title, "negative": each.cell.negative, "width": each.cell.width,
         "height": each.cell.height, "guidance": each.cell.guidance, "labels": dict(each.labels),
         "optimizer_step": each.model.optimizer_step, "drawn": each.cell.name in new}
        for each in job.cells
    ]  # fmt: skip
    compute = job.cells[0].cell.compute
    payload = {"dry_run": dry_run, "pictures": pictures, "compute": asdict(compute),
               "contact_sheet": str(contacts[0]) if contacts else None,
               "further_contact_sheets": list(map(str, contacts[1:]))}  # fmt: skip
    kept = len(pictures) - len(new)
    rows: list[tuple[str, Any]] = [
        ("pictures", f"{len(pictures):,}: {len(new):,} {'to draw' if dry_run else 'drawn'}, {kept:,} there already"),
        ("computed", f"{compute.device} in {compute.dtype}, VAE in {compute.vae_dtype}, batch {compute.batch}, "
                     f"{count_of(compute.threads, 'thread')}"),
    ]  # fmt: skip
    rows += [("model", known.model.title) for known in job.models]
    if dry_run:
        rows += [("picture", job.out / each.cell.name) for each in job.cells]
    else:
        rows.append(("contact sheet", contacts[0]))
        rows += [("further sheets", f"{len(contacts) - 1:,}, to {contacts[-1].name}")] if contacts[1:] else []
    following = command_line("inspect", pictures[0]["file"])
    if job.out.name == ASKED_FOLDER:
        following = command_line("report", show_path(job.out.parent.parent))
    next_step = "the same command without --dry-run" if dry_run else following
    print_answer(payload, f"Pictures in {job.out}", rows, next_step)
