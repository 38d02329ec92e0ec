"""A run made longer: a new chapter in its lock, from the newest state on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kohaku_wrap.config.optimizers import sets_own_rates
from kohaku_wrap.config.run_files import TRAINER_FILE, digest_lock
from kohaku_wrap.config.schedules import list_dependent
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import write_text
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.comparing.places import read_dataset
from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.chapters import AGAIN, EPOCHS, RULES, STEPS, STRETCH, Chapter
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.expected_rates import NoExpectedRates, preview_rates
from kohaku_wrap.training.starting.length import with_length
from kohaku_wrap.training.starting.resume import ResumePlan, plan_resume


class RuleNeeded(KwrapError):
    """The rates depend on the length, and nobody said by which rule they go on."""


@dataclass(frozen=True)
class Extension:
    """A longer run that could be; nothing of it is on the disk."""

    run: Run
    """With the lock as it would be."""

    chapter: Chapter
    """The new one."""

    before: Chapter
    """The one that it follows."""

    depends: tuple[str, ...]
    """Options that mean something else in a longer run, as they are written."""

    resume: ResumePlan
    """The attempt that trains on."""

    def write(self) -> None:
        """Put the chapter into the lock: from then on the run is longer."""
        write_text(self.run.lock_file, toml_text(self.run.lock.tables))
        self.resume.run.forget_lock()


def plan_extension(
    run: Run,
    epochs: int | None,
    steps: int | None,
    schedule: str = "",
    repeats_warmup: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    typed: Sequence[str] = (),
    **resume: Any,
) -> Extension:
    """The run made longer by so many epochs or optimizer steps, from its newest whole state.

    `typed`: the options of the command but for the rule, for the one that asks for it. `resume`: what else
    `plan_resume` takes. Raises RuleNeeded where the rates depend on the length and no `schedule`
    is given, UsageError for one that would have no effect, UnknownSchedule, and what `plan_resume` raises.
    """
    lock = run.lock
    if (epochs is None) == (steps is None):
        raise UsageError("say how much longer: --epochs N or --steps N, one of them", "Such as --epochs 1.")
    refuse_old(run)
    before = lock.chapters[-1]
    own_rates = sets_own_rates(lock.values.get("optimizer_type"), lock.table("optimizer_args"))
    depends = tuple(list_dependent(lock.values, read_dataset(run.dataset_config), own_rates))
    refuse_rule(run, depends, schedule, repeats_warmup)
    total, length = count_longer(run, before, epochs, steps)
    chapter = Chapter(0, 0, total, length, schedule, repeats_warmup, time.time())
    # Where it begins is known only once the state is chosen.
    planned = plan_resume(run.suppose(with_chapter(run, replace(chapter, schedule=""))), on_bytes=on_bytes, **resume)
    skipped = BadSteps.at_start(planned).skipped
    chapter = replace(
        chapter,
        from_optimizer_step=planned.start_optimizer_step,
        from_updates=planned.start_optimizer_step - skipped,
    )
    if depends and not schedule:
        raise ask_for_rule(run, depends, chapter, typed)
    if chapter.schedule and chapter.from_optimizer_step < before.from_optimizer_step:
        raise RuleNeeded(
            f"run {run.name}: its newest state lies before the last time that it was extended",
            f"Train on to a state first: {command_line('resume', run.folder)}",
        )
    longer = run.suppose(with_chapter(run, chapter))
    return Extension(longer, chapter, before, depends, replace(planned, run=longer))


def refuse_old(run: Run, cannot: str = "be made longer") -> None:
    """Raise UsageError for a run of kwrap 0.1, whose lock has no text of its files; `cannot` is what was asked for."""
    if run.lock.format == 1:
        network = next(iter(run.networks), "NETWORK")
        template = run.lock.table("run").get("template", "TEMPLATE")
        raise UsageError(
            f"run {run.name} was made by kwrap 0.1, which kept no text of a run's files: it cannot {cannot}",
            f"Start a new run from its network: {command_line('train', template, '--from', network, '--run', 'NEW')}",
        )


def ask_for_rule(run: Run, depends: Sequence[str], chapter: Chapter, typed: Sequence[str]) -> RuleNeeded:
    """The question which rule is meant, with the rates under each."""
    words = {STRETCH: "the rates of the longer plan from here on", AGAIN: "a new cycle from here on, without warm-up"}
    lines = [f"run {run.name}: {', '.join(depends)} depends on the length of the run"]
    for rule in RULES:
        longer = run.suppose(with_chapter(run, replace(chapter, schedule=rule)))
        try:
            rates = preview_rates(longer, chapter.from_updates)
            shown = [f"{', '.join(f'{each:.4g}' for each in rates[update])} at update {update:,}" for update in rates]
        except NoExpectedRates as error:
            shown = [error.message]
        lines.append(f"  --schedule {rule}: {words[rule]}: {'; '.join(shown)}")
    again = [command_line("extend", run.folder, *typed, "--schedule", rule) for rule in RULES]
    return RuleNeeded("\n".join(lines), f"Choose one: {again[0]}, or {again[1]} (--repeat-warmup for its warm-up too)")


def refuse_rule(run: Run, depends: Sequence[str], schedule: str, repeats_warmup: bool) -> None:
    """Raise UsageError for a rule that would have no effect."""
    if schedule and not depends:
        raise UsageError(
            f"--schedule {schedule}: nothing of run {run.name} depends on its length", "Leave --schedule out."
        )
    if repeats_warmup and schedule != AGAIN:
        raise UsageError("--repeat-warmup: only a new cycle has a warm-up again", "Add --schedule again.")
    if schedule == AGAIN and (share := next((each for each in depends if "token_warmup_step" in each), None)):
        raise UsageError(
            f"--schedule again: {share} is a share of the whole run and has no cycle",
            "Use --schedule stretch, or start a new run.",
        )


def count_longer(run: Run, before: Chapter, epochs: int | None, steps: int | None) -> tuple[int, dict[str, int]]:
    """The optimizer steps of the longer run, and the trainer's options that make it so long."""
    per_epoch = run.lock.count.optimizer_steps_per_epoch
    if epochs is None:
        total = before.total_optimizer_steps + int(steps or 0)
        return total, {STEPS: total}
    if EPOCHS in before.length:
        longer = before.length[EPOCHS] + epochs
        return longer * per_epoch, {EPOCHS: longer}
    total = before.total_optimizer_steps + epochs * per_epoch
    return total, {STEPS: total}


def with_chapter(run: Run, chapter: Chapter) -> dict[str, Any]:
    """The lock's tables with one chapter more, sealed anew."""
    lock = run.lock
    chapters = (*lock.chapters, chapter)
    values = {name: value for name, value in lock.values.items() if name != EPOCHS} | dict(chapter.length)
    files = dict(lock.files)
    files[TRAINER_FILE] = with_length(files[TRAINER_FILE], chapter.length)
    tables = {name: table for name, table in lock.tables.items() if name not in ("digest", "chapters")}
    tables |= {
        "plan": {
            **lock.table("plan"),
            "total_optimizer_steps": chapter.total_optimizer_steps,
            "epochs": -(-chapter.total_optimizer_steps // lock.count.optimizer_steps_per_epoch),
        },
        "values": dict(sorted(values.items())),
        "files": files,
        "chapters": [each.document() for each in chapters],
    }
    tables["digest"] = digest_lock(parse_toml(toml_text(tables)))
    return tables
