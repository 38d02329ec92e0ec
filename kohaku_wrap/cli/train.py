"""`kwrap train`: a new run, from template to final network."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import PATH, describe_trust, machine_option, print_trust, retype, set_option, trust_option
from kohaku_wrap.cli.output import print_answer, print_aside, print_json, print_notes, verb, wants_json
from kohaku_wrap.cli.supervised import (
    describe_launch,
    make_run,
    print_finished,
    supervisor_options,
    train_run,
    watch_options,
    watch_run,
)
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.wording import format_duration, show_bytes

if TYPE_CHECKING:
    from kohaku_wrap.planning.training_plan import TrainingPlan
    from kohaku_wrap.proving.trial import Trial
    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.supervising.supervise import RunReport
    from kohaku_wrap.training.supervising.watch import WatchOptions


@verb(
    """
  kwrap train demo --site world/site.toml --run first
  kwrap train epsilon --site site.toml --run epsilon --restarts 5
  kwrap train epsilon --site site.toml --try
  kwrap train epsilon --site site.toml --from first.safetensors --run second
  kwrap train epsilon --site site.toml --set seed=7 --dry-run
  kwrap train --locked runs/epsilon/run.lock.toml --site site.toml --run again
""",
    unless=("dry_run",),
)
@click.argument("template", required=False)
@machine_option
@click.option("--run", "name", metavar="NAME", help="The run's name; the template's where it is not given.")
@click.option("--engine", metavar="ENGINE", help="sd-scripts or builtin, in place of the site's.")
@set_option
@click.option("--from", "parent", type=PATH, metavar="NETWORK",
              help="Train on from this network; the same as network_weights in a template or a site.")  # fmt: skip
@trust_option
@click.option("--locked", type=PATH, metavar="LOCK",
              help="Repeat the run of this run.lock.toml: refuse whatever would differ from it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the command that would run; make nothing.")
@click.option(
    "--try", "is_trial", is_flag=True, help="Train two steps, resume one, remove them; say what the whole run needs."
)
@click.option("--report", "has_page", is_flag=True, help="Keep the run's report.html up to date while it trains.")
@supervisor_options
def command(
    template: str | None,
    site_file: Path,
    name: str | None,
    engine: str | None,
    overrides: tuple[str, ...],
    parent: Path | None,
    trust: tuple[str, ...],
    locked: Path | None,
    dry_run: bool,
    is_trial: bool,
    has_page: bool,
    allow: tuple[str, ...],
    **watch: Any,
) -> None:
    """Train a template as a new run, watched until it is done.

    Renders and locks everything the run depends on, then launches the trainer under accelerate. The first Ctrl-C
    finishes the optimizer step, saves a state and ends with exit code 130; a second one ends at once. Exit code 3: the
    trainer failed.
    """
    from kohaku_wrap.config.base_model import note_other_prediction
    from kohaku_wrap.planning.step_plan import note_other_dataset
    from kohaku_wrap.training.comparing.accepting import refuse_unknown
    from kohaku_wrap.training.starting.create import check_parent, list_absent, plan_new_run

    if template is None and locked is not None:
        from kohaku_wrap.training.comparing.other_lock import template_of_lock

        template = template_of_lock(locked)
    if template is None:
        raise UsageError(
            "no TEMPLATE given", "For example: `kwrap train epsilon`. `kwrap template ls` lists the templates."
        )
    options = watch_options(**watch)
    refuse_unknown(allow)
    if parent is not None:
        overrides += (f"network_weights={parent.absolute()}",)
    if is_trial:
        if locked is not None or dry_run:
            raise UsageError("--try trains two steps of its own", "Leave --locked and --dry-run out.")
        try_run(template, site_file, name, engine, overrides, trust, allow, options)
        return
    new = plan_new_run(template, site_file, name, engine, overrides, trust)
    print_trust(new.effective)
    print_aside(f"engine: {new.engine} ({new.engine_origin})")
    notes = (*note_other_prediction(new.effective), *note_other_dataset(new.effective, new.site.paths.images))
    print_notes(notes, "warning")
    if dry_run:
        check_parent(new)
        if wants_json():
            payload = {
                "run": str(new.folder),
                "engine": new.engine,
                "engine_origin": new.engine_origin,
                **describe_launch(new.launch),
                "trust": describe_trust(new.effective),
                "absent": list_absent(new),
            }
            print_json(payload)
        else:
            click.echo(new.launch.text())
            print_notes(list_absent(new), "warning")
            print_aside(f"Next: {repeat_command(template, site_file)}")
        return
    run = make_run(new, locked, allow)
    with keeping_page(run, has_page):
        report = train_run(run, allow, options)
    print_finished(report)


def try_run(
    template: str,
    site_file: Path,
    name: str | None,
    engine: str | None,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    allow: tuple[str, ...],
    options: WatchOptions,
) -> None:
    """Train two steps, resume the second, and say what the whole run will need."""
    from kohaku_wrap.config.layers import resolve_template
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.config.training_data import read_training_sizes
    from kohaku_wrap.planning.training_plan import plan_training
    from kohaku_wrap.proving.trial import SETTINGS, SUFFIX, clear_earlier, finish_trial
    from kohaku_wrap.training.starting.create import plan_new_run
    from kohaku_wrap.training.starting.resume import plan_resume
    from kohaku_wrap.training.supervising.supervise import RunStopped

    site = load_site(site_file)
    effective = resolve_template(template, site, overrides, trust=trust)
    own = f"{name or Path(template).stem}{SUFFIX}"
    clear_earlier(site.paths.runs / own)
    new = plan_new_run(template, site_file, own, engine, (*overrides, *SETTINGS), trust)
    print_trust(new.effective)
    print_aside(f"engine: {new.engine} ({new.engine_origin})")
    run = make_run(new, None, allow)

    def resume_from(step: int) -> RunReport:
        return watch_run(run, lambda: plan_resume(run, step, allow=allow), allow, options)

    try:
        train_run(run, allow, options)
        trial = finish_trial(run, resume_from)
    except RunStopped as stopped:
        again = command_line("train", template, "--site", site_file, "--try", *retype("site_file", "is_trial"))
        raise RunStopped(f"the trial was stopped: {stopped.message}", f"Try again with: {again}") from None
    plan = plan_training(effective, read_training_sizes(effective, site.paths.images), trial.seconds_per_step)
    print_trial(trial, plan, repeat_command(template, site_file))


def print_trial(trial: Trial, plan: TrainingPlan, next_command: str) -> None:
    """The closing table of a trial."""
    from kohaku_wrap.planning.sizes import total_of

    disk_bytes = None if plan.sizes is None else total_of(plan.sizes.disk)
    payload = {
        "trial": {
            "seconds_per_step": trial.seconds_per_step,
            "state_bytes": trial.state_bytes,
            "network_bytes": trial.network_bytes,
            "resume_is_identical": not trial.difference,
            "difference": trial.difference or None,
        },
        "optimizer_steps": plan.steps.total_optimizer_steps,
        "eta_seconds": plan.eta_seconds,
        "disk_bytes": disk_bytes,
    }
    rows: list[tuple[str, Any]] = [
        ("trained", "2 optimizer steps, a checkpoint and a state after each"),
        ("resumed from step 1", trial.difference or "the same network, bit for bit"),
        ("a step", f"{trial.seconds_per_step:.2f} s; the first ones of a run are slower than later ones"),
        ("a state, a checkpoint", f"{show_bytes(trial.state_bytes)}, {show_bytes(trial.network_bytes)}"),
        ("the whole run", f"{plan.steps.total_optimizer_steps:,} optimizer steps"),
        ("at this rate", format_duration(plan.eta_seconds or 0.0)),
        *([("disk", show_bytes(disk_bytes))] if disk_bytes is not None else []),
    ]
    print_answer(payload, f"Tried {plan.template}; nothing of the trial is kept", rows, next_command)


def repeat_command(template: str, site_file: Path) -> str:
    """The same training, for real."""
    return command_line("train", template, "--site", site_file, *retype("site_file", "dry_run", "is_trial"))


EVERY_SECONDS = 20.0
TIMEOUT_SECONDS = 120.0


@contextmanager
def keeping_page(run: Run, is_wanted: bool) -> Iterator[None]:
    """Have `kwrap report RUN` write the page again and again within the block, and once after it."""
    if not is_wanted:
        yield
        return
    is_over = threading.Event()

    def write() -> None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                python_command("-m", "kohaku_wrap", "report", run.folder, "--live"),
                env=safe_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_SECONDS,
                start_new_session=True,
                check=False,
            )

    def go_on() -> None:
        while not is_over.is_set():
            write()
            is_over.wait(EVERY_SECONDS)

    writer = threading.Thread(target=go_on, daemon=True)
    writer.start()
    try:
        yield
    finally:
        is_over.set()
        writer.join()
        write()
