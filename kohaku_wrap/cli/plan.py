"""`kwrap plan`: what a training will do, counted before it starts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.caches_shown import describe_cache, open_caches_with_bar, show_time
from kohaku_wrap.cli.options import PATH, describe_trust, machine_option, print_trust, retype, set_option, trust_option
from kohaku_wrap.cli.output import print_answer, print_note, print_notes, progress_bar, verb, waiting
from kohaku_wrap.errors import KwrapError, ProblemsFound, command_line, reason_of
from kohaku_wrap.wording import count_of, format_duration, format_share, show_bytes

if TYPE_CHECKING:
    from kohaku_wrap.config.effective import Effective
    from kohaku_wrap.config.site import Site
    from kohaku_wrap.planning.pictures import PicturesPlan
    from kohaku_wrap.planning.training_plan import TrainingPlan, ValidationPlan
    from kohaku_wrap.steps import StepPlan

BUCKETS_SHOWN = 8


@verb(
    """
  kwrap plan epsilon --site site.toml
  kwrap plan epsilon --site site.toml --images 5210319 --seconds-per-step 49.5
  kwrap plan epsilon --site site.toml --selection epsilon.parquet
  kwrap plan epsilon --site site.toml --measured first --json
""",
    writes=False,
)
@click.argument("template")
@machine_option
@set_option
@trust_option
@click.option("--selection", type=PATH, help="Count the database's sizes in SEL.parquet, before any image is there.")
@click.option(
    "--images", type=click.IntRange(min=1), metavar="N", help="Count so many images of the template's resolution."
)
@click.option(
    "--seconds-per-step",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="For the ETA: one optimizer step.",
)
@click.option("--measured", metavar="RUN", help="For the ETA: the step time that this run measured.")
@click.option("--modules/--no-modules", default=True, help="Count LoKr modules and parameters (starts torch once).")
def command(
    template: str,
    site_file: Path,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    selection: Path | None,
    images: int | None,
    seconds_per_step: float | None,
    measured: str | None,
    modules: bool,
) -> None:
    """Count steps, parameters, disk, memory and time beforehand.

    Sizes come from the images that extract and caption made ready; steps are exactly those that the trainer will count.
    Exit code 1 where the plan cannot work, with all reasons at once.
    """
    from kohaku_wrap.config.checks import describe_notes
    from kohaku_wrap.config.layers import resolve_template
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.config.training_data import read_training_sizes
    from kohaku_wrap.planning.step_plan import note_other_dataset, read_selection_sizes, suppose_sizes
    from kohaku_wrap.planning.training_plan import plan_training
    from kohaku_wrap.trainer.installed import find_option_table
    from kohaku_wrap.training.records.folder import find_run
    from kohaku_wrap.training.records.metrics import read_step_seconds
    from kohaku_wrap.training.records.samples import read_drawing_seconds
    from kohaku_wrap.training.starting.create import list_absent_images, list_absent_places

    if selection and images:
        raise click.UsageError("--selection and --images are two sources of sizes: give one")
    site = load_site(site_file)
    effective = resolve_template(template, site, overrides, table=find_option_table(read_live=False), trust=trust)
    if images:
        sizes = suppose_sizes(images, effective)
    else:
        sizes = read_selection_sizes(selection) if selection else read_training_sizes(effective, site.paths.images)
    drawing_seconds = None
    if measured:
        run = find_run(measured, (site.paths.runs,))
        seconds_per_step, drawing_seconds = read_step_seconds(run), read_drawing_seconds(run)
    with waiting("counting the network's modules"):
        plan = plan_training(effective, sizes, seconds_per_step, with_modules=modules, drawing_seconds=drawing_seconds)
    if sizes.exact:
        keep_summary(site.paths.images)
    notes = describe_notes(effective, plan.steps)
    if not sizes.exact:
        notes.append(f"Counted from {sizes.source}.")
        if effective.get("validation.posts"):
            notes.append("[validation]: posts that are held out are counted as trained here; captions say which.")
    else:
        notes += [*note_other_dataset(effective, site.paths.images), *list_absent_places(site)]
        notes += list_absent_images(effective, site)
    payload = {**describe_plan(plan, notes), "caching": plan_caching(effective, site, sizes.exact)}
    payload["trust"] = describe_trust(effective)
    print_trust(effective)
    is_cached = not any(cache["images_to_encode"] for cache in payload["caching"].values())
    following = [template, "--site", site_file, *retype(of=("overrides", "trust"))]
    next_step = command_line("train", *following, "--dry-run") if is_cached else command_line("cache", *following)
    print_plan(plan, payload, next_step)
    if plan.problems:
        change = "Change these in the template, the site or by --set, and plan again."
        raise ProblemsFound(template, plan.problems, change)


def describe_plan(plan: TrainingPlan, notes: list[str]) -> dict[str, Any]:
    """The document of `--json`."""
    from kohaku_wrap.planning.sizes import total_of

    steps, sizes, counts = plan.steps, plan.sizes, plan.counts
    counted = asdict(steps)
    counted["batch_per_gpu"] = counted.pop("batch_size")
    document: dict[str, Any] = {
        "template": plan.template,
        "engine": plan.engine,
        "data": plan.data,
        "sizes_from": plan.sizes_from,
        "sizes_exact": plan.sizes_exact,
        "image_files": plan.image_files,
        **counted,
        "effective_batch": steps.effective_batch,
        "images_per_optimizer_step": steps.images_per_optimizer_step,
        "fills_per_epoch": steps.fills_per_epoch,
        "bucket_fill": steps.bucket_fill,
        "warmup_optimizer_steps": plan.warmup_optimizer_steps,
        "warmup_optimizer_steps_plain_sd_scripts": plan.warmup_plain,
        "seconds_per_step": plan.seconds_per_step,
        "eta_seconds": plan.eta_seconds,
        "notes": notes,
        "problems": [vars(problem) for problem in plan.problems],
    }
    if counts:
        listed = [{**asdict(each), "parameters": each.parameters} for each in counts]
        document |= {name: value for name, value in listed[0].items() if name.endswith(("modules", "parameters"))}
        document["module_counts"] = listed
    if plan.pictures:
        memory = total_of(plan.pictures.memory) or None
        own = {"pictures": plan.pictures.pictures, "memory_bytes": memory, "is_beside": plan.pictures.is_beside}
        document["pictures"] = {**asdict(plan.pictures), **own}
    if plan.validation:
        document["validation"] = asdict(plan.validation)
    if sizes:
        document |= {
            **asdict(sizes),
            "disk_bytes": total_of(sizes.disk),
            "host_memory_bytes": total_of(sizes.host_memory),
            "gpu_memory_bytes": total_of(sizes.gpu_memory) or None,
        }
    return document


def plan_caching(effective: Effective, site: Site, sizes_exact: bool) -> dict[str, Any]:
    """What `kwrap cache` has still to do, by kind; nothing where images or models are not there yet."""
    if not sizes_exact or not (effective.get("cache.latents") or effective.get("cache.text_encoders")):
        return {}
    try:
        return {
            cache.name: describe_cache(cache, ()) for cache in open_caches_with_bar(effective, site, all_files=False)
        }
    except KwrapError as error:
        print_note(f"note: what is to be cached is unknown: {error.message}")
        return {}


def keep_summary(images: Path) -> None:
    """Write the captions' summary for `kwrap report` where there is none of them; without it nothing else is less."""
    from kohaku_wrap.dataset.captions.recipe import words_of_recipe
    from kohaku_wrap.dataset.captions.summary import summarise_captions
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE, read_captions_metadata
    from kohaku_wrap.formats.data_summary import read_summary, write_summary

    if not (images / CAPTIONS_FILE).exists():  # sd-scripts' own dataset needs none
        return
    try:
        about = read_captions_metadata(images)
        digest = str(about.get("digest", ""))
        if not digest or read_summary(images, digest):
            return
        groups: dict[str, list[str]] = {}
        with suppress(KwrapError):
            for word, group in words_of_recipe(load_dataset(str(about.get("dataset", ""))).caption).items():
                groups.setdefault(group, []).append(word)
        with progress_bar("summary of the captions", "captions") as report:
            write_summary(images, digest, summarise_captions(images, groups, report))
    except (KwrapError, OSError) as error:
        print_note(f"note: no summary of the captions for the page of a run: {reason_of(error)}")


def print_plan(plan: TrainingPlan, payload: dict[str, Any], next_step: str) -> None:
    """The plan for people; `next_step` is not for one that cannot work."""
    from kohaku_wrap.planning.sizes import total_of

    steps = plan.steps
    largest = sorted(steps.buckets, key=lambda bucket: -bucket.images)
    shown = ", ".join(f"{each.width}x{each.height}: {each.images:,}" for each in largest[:BUCKETS_SHOWN])
    rest = len(largest) - BUCKETS_SHOWN
    repeated = (
        "" if steps.images == plan.image_files else f" an epoch, {count_of(plan.image_files, 'file')} with repeats,"
    )
    rows: list[tuple[str, Any]] = [
        ("images", f"{steps.images:,}{repeated} from {plan.sizes_from}"),
        ("buckets", f"{len(steps.buckets)}; {shown}" + (f", and {rest} more" if rest > 0 else "")),
        ("batches", f"{steps.batches:,} of {steps.batch_size}, {format_share(steps.bucket_fill)} full"),
        (
            "effective batch",
            f"{steps.effective_batch} = {steps.batch_size} images × {steps.accumulation} accumulation × "
            f"{count_of(steps.processes, 'process')} ({steps.images_per_optimizer_step:.1f} images on average)",
        ),
        ("micro-batches per process", f"{steps.micro_batches_per_epoch:,} in an epoch"),
        ("optimizer steps", show_steps(steps)),
        (
            "warm-up",
            f"{plan.warmup_optimizer_steps:,} optimizer steps; under plain sd-scripts {plan.warmup_plain:,}",
        ),
    ]
    counted_on: dict[tuple[str, str], list[str]] = {}
    for counts in plan.counts:
        modules = f"{counts.unet_modules:,} UNet + {counts.text_encoder_modules:,} text encoder modules"
        parameters = f"{counts.parameters:,} = {counts.unet_parameters:,} + {counts.text_encoder_parameters:,}"
        counted_on.setdefault((modules, parameters), []).append(counts.counted_on)
    for (modules, parameters), names in counted_on.items():
        rows += [("network", f"{modules} (the UNet of {' and of '.join(names)})"), ("parameters", parameters)]
    if plan.sizes:
        rows += [
            ("checkpoint", show_bytes(plan.sizes.checkpoint_bytes)),
            ("state", show_bytes(plan.sizes.state_bytes)),
        ]
        for title, parts in (
            ("disk over the run", plan.sizes.disk),
            ("host memory", plan.sizes.host_memory),
            ("GPU memory, estimated", plan.sizes.gpu_memory),
        ):
            if parts:
                rows.append((title, show_bytes(total_of(parts))))
                rows += [("", f"{show_bytes(part.size_bytes):>8}  {part.name}") for part in parts]
    if plan.eta_seconds is not None:
        rows.append(("time", f"{format_duration(plan.eta_seconds)} at {plan.seconds_per_step:.3g} s a step"))
    else:
        rows.append(("time", "unknown; add --seconds-per-step S, or --measured RUN"))
    for kind, cache in payload["caching"].items():
        left, title = cache["images_to_encode"], f"to cache, {kind.replace('_', ' ')}"
        if left:
            to_write = f"{count_of(left, 'image')}, {show_bytes(cache['bytes_to_write'])} to write"
            rows += [(title, to_write), ("time to cache", show_time(cache))]
        else:
            rows.append((title, f"nothing: all {cache['images']:,} images are there"))
    if plan.pictures:
        rows += list_picture_rows(plan.pictures)
    if plan.validation:
        rows += list_validation_rows(plan.validation)
    print_notes([*payload["notes"], *filter(None, [plan.not_counted])])
    print_answer(payload, f"Plan of {plan.template}", rows, "" if plan.problems else next_step)


def list_picture_rows(pictures: PicturesPlan) -> list[tuple[str, Any]]:
    """What the pictures take, on a row each."""
    from kohaku_wrap.planning.pictures import BETWEEN_STEPS
    from kohaku_wrap.planning.sizes import total_of

    prompts, at = count_of(pictures.prompts, "prompt"), count_of(pictures.networks, "optimizer step")
    steps, disk = pictures.pictures * pictures.steps, show_bytes(pictures.disk_bytes)
    after = "the device that trained, when the attempt has ended"
    rows: list[tuple[str, Any]] = [
        ("pictures", f"{pictures.pictures:,} by {pictures.by}: {prompts} at {at}"),
        ("", f"{steps:,} steps of the sampler, at most {disk} of disk"),
        ("drawn on", after if pictures.device == "after" else pictures.device),
    ]
    if pictures.memory:
        when = "beside the training" if pictures.is_beside else "when the training has given its own back"
        rows.append(("memory to draw", f"{show_bytes(total_of(pictures.memory))} and what a picture takes, {when}"))
        rows += [("", f"{show_bytes(part.size_bytes):>8}  {part.name}") for part in pictures.memory]
    elif pictures.device == BETWEEN_STEPS:
        rows.append(("memory to draw", "unknown: sd-scripts decodes pictures beside the training, one after another"))
    if pictures.seconds is not None:
        rows.append(("time to draw", f"{format_duration(pictures.seconds)} at the speed of that run"))
    else:
        rows.append(("time to draw", "unknown until a run has drawn some; then --measured RUN"))
    return rows


def list_validation_rows(validation: ValidationPlan) -> list[tuple[str, Any]]:
    """What is held out, and what measuring it takes."""
    like = f", and {validation.relatives:,} that are their like" if validation.relatives else ""
    forwards = f"{validation.forwards:,} forwards of {count_of(validation.rows, 'image')}"
    time = "unknown; add --seconds-per-step S, or --measured RUN"
    if validation.seconds is not None:
        hours = f"{format_duration(validation.seconds)} ({validation.seconds / 3600:.1f} h)"
        time = f"{hours}, if an image takes a third of a trained one"
    return [
        ("held out", f"{count_of(validation.posts, 'post')}{like}: none is trained"),
        ("validation", f"{count_of(validation.evaluations, 'evaluation')}, {forwards}"),
        ("time to validate", time),
    ]


def show_steps(steps: StepPlan) -> str:
    """Optimizer steps of the whole run, and of each epoch where there are several."""
    if steps.epochs == 1:
        return f"{steps.total_optimizer_steps:,} in one epoch"
    return f"{steps.total_optimizer_steps:,} = {steps.epochs} epochs × {steps.optimizer_steps_per_epoch:,}"
