"""`kwrap evaluate loss`: the loss of models on posts that were not trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.drawing import (
    COMPUTE_NAMES,
    batch_option,
    choose_tokenizers,
    device_option,
    dtype_option,
    jobs_option,
    know_models,
    list_models,
    network_option,
    tokenizers_option,
    vae_option,
)
from kohaku_wrap.cli.options import FOLDER, PATH, open_run, site_option
from kohaku_wrap.cli.output import print_answer, progress_bar, verb
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.files import write_text
from kohaku_wrap.wording import format_duration, show_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kohaku_wrap.evaluation.held_out import LossJob
    from kohaku_wrap.formats.caption_columns import Columns
    from kohaku_wrap.training.records.folder import Run

RESULT = "loss.json"


@verb(
    """
  kwrap evaluate loss epsilon
  kwrap evaluate loss epsilon --checkpoints all --images held-out --out losses
  kwrap evaluate loss model.safetensors --network mine.safetensors:0.8 \\
      --images held-out --out losses
  kwrap evaluate loss other.safetensors --images held-out --out other \\
      --against losses/loss.json
""",
    unless=("dry_run",),
)
@click.argument("targets", nargs=-1, required=True, metavar="RUN|MODEL...")
@click.option("--checkpoints", metavar="all|N,M", help="Of a RUN: at these optimizer steps; usually its newest.")
@network_option
@vae_option
@click.option("--images", type=FOLDER,
              help="Posts not trained; without it, what the RUN measured by itself.")  # fmt: skip
@click.option("--posts", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="At most so many.")
@click.option("--timesteps", type=click.IntRange(1, 1000), default=9, show_default=True, metavar="N", help="Of each.")
@click.option("--out", type=FOLDER, help="Where the result goes.")
@click.option("--template", metavar="NAME", help="Whose dataset options hold for a MODEL; usually epsilon.")
@click.option("--prediction", type=click.Choice(("epsilon", "v")), help="Usually what the run or the file says.")
@click.option("--leave-out-trained", is_flag=True, help="Only posts of --images that the run does not train.")
@click.option("--allow-trained", is_flag=True, help="Measure on posts that the run has trained, and say so.")
@click.option("--against", multiple=True, type=PATH, metavar="FILE", help="Another loss.json.")
@device_option
@dtype_option
@batch_option
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="A process.")
@jobs_option
@tokenizers_option
@click.option("--dry-run", is_flag=True, help="Print forwards and posts, measure none.")
@site_option
def loss(
    targets: tuple[str, ...],
    checkpoints: str | None,
    images: Path | None,
    posts: int,
    timesteps: int,
    out: Path | None,
    template: str | None,
    leave_out_trained: bool,
    allow_trained: bool,
    against: tuple[Path, ...],
    jobs: int,
    tokenizers: Path | None,
    dry_run: bool,
    site_file: Path | None,
    **asked: Any,
) -> None:
    """Measure the loss on posts that were not trained.

    The same posts, whole captions, noise and time steps for every model, so that two of them can be compared post by
    post: by time step, rating, year and quality, and as a paired difference with an interval. Posts that a run has
    trained are refused. The result is the same, bit for bit, with any number of processes and after a kill. Without
    --images: what a RUN with [validation] measured while it trained.
    """
    from kohaku_wrap.dataset.captions.groups import draw_posts, group_posts
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.evaluation import held_out
    from kohaku_wrap.formats.caption_columns import Columns
    from kohaku_wrap.sampling.expanding import name_models

    paths = [Path(each) for each in targets]
    run = None
    if len(targets) == 1 and not paths[0].is_file():
        run = open_run(targets[0], site_file)
    elif checkpoints:
        raise UsageError("--checkpoints is of a run", "Give one RUN in place of models.")
    if images is None:
        show_validation(run, checkpoints, out, against)
        return
    if out is None:
        raise UsageError("--images measures anew, and the result goes to a folder", "Add --out FOLDER.")
    asked |= {"vae_dtype": None, "zero_terminal_snr": None, "template": None if run else template}
    asked |= {"run": str(run.folder) if run else None, "steps": checkpoints}
    models = list_models(() if run else tuple(paths), asked, site_file)
    folders = choose_tokenizers(tokenizers, site_file, models)
    columns = Columns.open(images)
    candidates = held_out.choose_rows(run, columns, leave_out_trained, allow_trained)
    rows = draw_posts(columns, candidates, posts, load_dataset("epsilon").caption)
    job = prepare(run, columns, rows, timesteps, out, template, folders, asked)
    for path in against:
        held_out.read_other(path, held_out.describe_job(job))
    forwards = len(job.chunks) * timesteps * len(models)
    if dry_run:
        show_plan(job, len(models), forwards)
        return
    titles = name_models(models)
    known = [(each, titles[each.model]) for each in know_models(models, asked, site_file)[0]]
    losses = []
    for each, title in known:
        with progress_bar(title, "chunks") as report:
            losses.append(held_out.measure_losses(job, each, jobs, report))
    groups = group_posts(job.columns, job.rows, load_dataset("epsilon").caption)
    result = held_out.compose_result(job, known, losses, groups, tell_held_out(run, allow_trained))
    for path in against:
        held_out.lay_over(result, path)
    write_text(out / RESULT, json.dumps(result, ensure_ascii=False) + "\n")
    show_result(result, out)


def prepare(
    run: Run | None, columns: Columns, rows: npt.NDArray[np.int64], timesteps: int, out: Path, template: str | None,
    folders: tuple[Path, Path], asked: dict[str, Any],
) -> LossJob:  # fmt: skip
    """What is measured: dataset options of the run, or of a template."""
    from kohaku_wrap.config.layers import load_layers
    from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
    from kohaku_wrap.dataset.fixed_chunks import cut_chunks, list_timesteps
    from kohaku_wrap.evaluation.held_out import LossJob
    from kohaku_wrap.formats.caption_rows import read_subsets
    from kohaku_wrap.sampling.chunks import digest_tokenizers
    from kohaku_wrap.sampling.devices import choose_compute
    from kohaku_wrap.training.data.items import read_dataset_options
    from kohaku_wrap.training.data.run_items import read_locked_dataset

    if run:
        options = dict(read_dataset_options(read_locked_dataset(run)))
        options.pop("later_subsets", None)
        tokens, joins = run.lock.values.get("max_token_length"), run.lock.joins_by_separator
    else:
        effective, _ = load_layers(template or "epsilon")
        options, tokens, joins = dict(effective.subtable("dataset_options")), effective.get("max_token_length"), False
    # Where things lie is no part of what an item is.
    options = {name: value for name, value in options.items() if name not in ("image_dir", "metadata_file")}
    if len(subsets := read_subsets(columns.folder)) > 1:
        options |= {"later_subsets": [{**options, **dict(each.options)} for each in subsets[1:]]}
    compute = choose_compute(*(asked[name] for name in COMPUTE_NAMES))
    buckets = assign_buckets(columns.widths, columns.heights, BucketOptions.from_dataset_options(options))
    return LossJob(
        columns=columns,
        rows=rows.tolist(),
        chunks=cut_chunks(rows, buckets, compute.batch),
        dataset_options=options,
        joins_by_separator=joins,
        max_token_length=int(tokens) if tokens else None,
        tokenizers=folders,
        tokenizers_digest=digest_tokenizers(folders),
        timesteps=list_timesteps(timesteps),
        compute=compute,
        out=out,
    )


def show_validation(run: Run | None, checkpoints: str | None, out: Path | None, against: tuple[Path, ...]) -> None:
    """What a run measured on its held-out posts while it trained."""
    from kohaku_wrap.dataset.captions.groups import group_posts
    from kohaku_wrap.dataset.held_out import find_recipe
    from kohaku_wrap.evaluation import held_out
    from kohaku_wrap.evaluation.validated import choose_evaluations, compose_validation
    from kohaku_wrap.formats.caption_columns import Columns
    from kohaku_wrap.formats.caption_rows import read_captions_metadata

    if run is None:
        raise UsageError("a model is measured on posts that it was not trained on", "Give them: --images IMAGES.")
    chosen = choose_evaluations(run, read_steps(checkpoints))
    images, digest = run.find_images(), run.lock.dataset_digest
    columns = Columns.open(images, digest)
    recipe = find_recipe(str(read_captions_metadata(images, digest).get("dataset", "")))
    groups = group_posts(columns, columns.ids.searchsorted(chosen[0].posts).tolist(), recipe)
    result = compose_validation(run, chosen, groups)
    for path in against:
        held_out.lay_over(result, path)
    if out is not None:
        write_text(out / RESULT, json.dumps(result, ensure_ascii=False) + "\n")
    show_result(result, out)


def read_steps(checkpoints: str | None) -> list[int] | None:
    """The optimizer steps of `--checkpoints`; None for all. Raises UsageError."""
    if checkpoints in (None, "all"):
        return None
    try:
        return [int(each) for each in str(checkpoints).split(",")]
    except ValueError:
        raise UsageError(f"--checkpoints {checkpoints}: not optimizer steps", "Such as --checkpoints 0,500.") from None


def tell_held_out(run: Run | None, allow_trained: bool) -> str:
    """What is known of whether the posts were trained."""
    if run is None:
        return "not known: a model does not say what it was trained on"
    if allow_trained:
        return "not asked: --allow-trained"
    return f"none of them is in the dataset of run {run.name}, by id; relatives and equal pictures are not looked for"


def show_plan(job: LossJob, models: int, forwards: int) -> None:
    """What would be measured."""
    payload = {"dry_run": True, "posts": len(job.rows), "models": models, "forwards": forwards}
    rows: list[tuple[str, Any]] = [
        ("posts", f"{len(job.rows):,} of {len(job.columns):,}, in {len(job.chunks):,} chunks of {job.compute.batch}"),
        ("time steps", ", ".join(map(str, job.timesteps))),
        ("models", models),
        ("forwards", f"{forwards:,}; {format_duration(forwards)} at 1 s each"),
    ]
    print_answer(payload, "Loss", rows, "the same command without --dry-run")


def show_result(result: dict[str, Any], out: Path | None) -> None:
    """Print what came out."""
    file = None if out is None else out / RESULT
    rows: list[tuple[str, Any]] = [("held out", result["posts"]["held_out"])]
    rows += [(each["title"], describe_model(each)) for each in result["models"]]
    for pair in result["pairs"]:
        if apart := pair["difference"]:
            shown = f"{apart['mean']:+.5f} ({apart['low']:+.5f} to {apart['high']:+.5f})"
            rows.append((f"{pair['from']} → {pair['to']}", f"{shown}, paired over {pair['posts']:,} posts"))
    if odd := result["posts"]["unreadable"]:
        named: Sequence[str] = [str(each) for each in odd[:5]]
        rows.append(("left out", f"{len(odd):,} posts that cannot be read or give no number: {', '.join(named)}"))
    next_step = ""
    if file is not None:
        rows.append(("result", file))
        next_step = f"{command_line('evaluate', 'loss', 'MODEL', '--against', show_path(file))} …"
    payload = {"dry_run": False, "file": file, "result": result}
    print_answer(payload, "Loss", rows, next_step)


def describe_model(model: dict[str, Any]) -> str:
    """One model in words."""
    if model["loss"] is None:
        return "no post gave a number"
    interval = model["interval"]
    steps = ", ".join(f"{value:.3f}" for value in model["by_timestep"].values())
    shown = f"{model['loss']:.5f} ({interval['low']:.5f} to {interval['high']:.5f}) over {model['posts']:,} posts"
    return f"{shown}; by time step {steps}"
