"""The next attempt of a run: from which state, at which position, and what then no longer counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kohaku_wrap.errors import KwrapError, Problem, UsageError, command_line
from kohaku_wrap.training.data.order import Position
from kohaku_wrap.training.records.manifest import DamagedState
from kohaku_wrap.training.records.states import list_states, verify_state
from kohaku_wrap.training.runs.attempts import Attempt, attempt_numbers, last_kept_steps, list_attempts, write_attempt
from kohaku_wrap.training.runs.differences import check_captions, list_changes, refuse_changes, refuse_unknown
from kohaku_wrap.training.runs.folder import Run
from kohaku_wrap.training.runs.launch import Launch, plan_attempt_launch, require_packages, write_accelerate_config
from kohaku_wrap.training.runs.machines import refuse_machines
from kohaku_wrap.training.trainer.requirements import require_requirements

CHECKPOINT_OF_STEP = re.compile(r"-step(\d{8,})\.\w+$")
CHECKPOINT_OF_EPOCH = re.compile(r"-(\d{6})\.\w+$")
FOREIGN_STATE_OF_STEP = re.compile(r"-step(\d{8,})-state$")


class RunFinished(KwrapError):
    """All optimizer steps are done."""


class NoSuchState(KwrapError):
    """No whole state at the step that was asked for."""


class NoWholeState(KwrapError):
    """States were saved and none can be loaded; starting from the beginning is for the person to decide."""

    def __init__(self, run: Run, damaged: Sequence[DamagedState], last: Attempt | None) -> None:
        lines = [f"run {run.name}: no whole state is left"]
        lines += [f"  {each.state.name}: {each.what}" for each in damaged]
        if not damaged and last is not None:
            lines.append(f"  the state of optimizer step {last.start_optimizer_step:,}, from which it went on, is gone")
        beginning = command_line("resume", run.folder, "--step", 0)
        advice = f"Restore one into {run.states}, or train from the beginning: {beginning}"
        if last is not None and last.foreign:
            again = command_line("resume", run.folder, "--foreign", "--state", last.state)
            advice = f"Give the state of plain sd-scripts again: {again}"
        super().__init__("\n".join(lines), advice)


@dataclass(frozen=True)
class ResumePlan:
    """What a resume would do; nothing is changed yet."""

    run: Run
    """The run."""

    number: int
    """Of the next attempt."""

    state: Path | None
    """The state to load; None for a start from the beginning."""

    optimizer_step: int
    """Optimizer steps done at that state."""

    position: Position
    """Where the next optimizer step starts."""

    processes: int
    """W of the next attempt."""

    accumulation: int
    """A of the next attempt."""

    workers: int
    """Loader workers of each process."""

    machines: int
    """Machines of the next attempt."""

    threads: int | None
    """OMP_NUM_THREADS of the attempt before; None for the first."""

    damaged: tuple[DamagedState, ...] = ()
    """States that did not verify, newest first."""

    abandons: tuple[Path, ...] = ()
    """Later states and checkpoints, which move to `abandoned/`."""

    foreign: bool = False
    """Whether the state was made by plain sd-scripts."""

    allow: frozenset[str] = field(default_factory=frozenset)
    """Differences and faults that the person accepts."""

    accepted: tuple[Problem, ...] = ()
    """The differences that are there and accepted."""

    bad_steps: int | None = None
    """As in Attempt."""

    def rank_positions(self) -> list[int]:
        """The next global position of each rank."""
        return [self.position.global_position + rank for rank in range(self.processes)]


def plan_resume(
    run: Run,
    step: int | None = None,
    processes: int | None = None,
    workers: int | None = None,
    allow: Sequence[str] = (),
    foreign: bool = False,
    foreign_state: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    machines: int | None = None,
) -> ResumePlan:
    """Choose the newest whole state of the run's current line, or that of `step`, and verify it.

    Raises RunFinished, NoSuchState with those there are, DamagedState for an explicit step, NoWholeState where states
    were saved and none is whole (step 0 then starts from the beginning), DifferentRun with the list of differences
    between state and run, BadOrder for a number of processes that does not divide.
    """
    if step is None and foreign_state is None and is_finished(run):
        # Whatever became of its states.
        raise RunFinished(
            f"run {run.name} is finished: all {run.lock.total_optimizer_steps:,} optimizer steps are done",
            f"Prove it with `{command_line('verify', run.folder)}`; go back with `--step N`.",
        )
    attempts = list_attempts(run)
    last = attempts[-1] if attempts else None
    before = (last.processes, last.machines) if last else (first_processes(run), run.lock.machines)
    machines = machines or before[1]
    processes = processes or before[0] // before[1] * machines
    refuse_machines(run, machines, processes)
    accumulation = run.lock.count.accumulation(processes)
    damaged: list[DamagedState] = []
    state: Path | None
    if foreign:
        state, optimizer_step = find_foreign_state(run, step, foreign_state)
    else:
        state, optimizer_step = find_state(run, attempts, step, damaged, on_bytes)
    changes = list_changes(run, None if foreign else state)
    refuse_unknown(allow, run, changes)
    accepted = frozenset(allow) | (last.allow if last else frozenset())
    refuse_changes(f"run {run.name}", changes, accepted)
    abandons = [
        path
        for at, path in list_states(run.states)
        if path != state and (at > optimizer_step or is_damaged(path, damaged))
    ]
    abandons += [path for path in later_checkpoints(run, optimizer_step) if path != state]
    return ResumePlan(
        run=run,
        number=next_number(run),
        state=state,
        optimizer_step=optimizer_step,
        position=run.lock.count.position_of(optimizer_step, processes),
        processes=processes,
        accumulation=accumulation,
        workers=workers if workers is not None else (last.workers if last else first_workers(run)),
        machines=machines,
        threads=threads_of(last),
        damaged=tuple(damaged),
        abandons=tuple(abandons),
        foreign=foreign,
        allow=accepted,
        accepted=tuple(problem for problem in changes if problem.where in accepted),
    )


def begin_attempt(plan: ResumePlan) -> tuple[Attempt, Launch]:
    """Make the attempt, move what no longer counts to `abandoned/`, and say how to start it.

    The attempt is written first: from then on the ledger and the states of the line left behind are known as such,
    even if this process dies in the middle. Raises MissingExtra, MissingRequirements, DamagedCaptions.
    """
    require_packages()
    if plan.run.lock.engine == "sd-scripts":
        require_requirements()
    if plan.number > 1:
        # Those of the first attempt were read when the run was made.
        check_captions(plan.run)
    attempt = describe_attempt(plan)
    launch = describe_launch(plan)
    differences = {problem.where: problem.what for problem in plan.accepted}
    write_attempt(attempt, launch.environment, differences)
    write_accelerate_config(attempt)
    for path in plan.abandons:
        away = plan.run.abandoned / f"before-attempt-{plan.number}" / path.relative_to(plan.run.folder)
        away.parent.mkdir(parents=True, exist_ok=True)
        path.rename(away)
    return attempt, launch


def describe_attempt(plan: ResumePlan) -> Attempt:
    """The attempt that the plan leads to; nothing is written."""
    return Attempt(
        run=plan.run,
        number=plan.number,
        processes=plan.processes,
        accumulation=plan.accumulation,
        workers=plan.workers,
        start_optimizer_step=plan.optimizer_step,
        state=plan.state,
        allow=plan.allow,
        foreign=plan.foreign,
        machines=plan.machines,
        bad_steps=plan.bad_steps,
    )


def describe_launch(plan: ResumePlan) -> Launch:
    """The command that the plan leads to."""
    return plan_attempt_launch(describe_attempt(plan), plan.threads)


def find_state(
    run: Run,
    attempts: Sequence[Attempt],
    step: int | None,
    damaged: list[DamagedState],
    on_bytes: Callable[[int], None] | None,
) -> tuple[Path | None, int]:
    """The state to load and its step; (None, 0) when none was ever saved, or step 0 was asked for."""
    kept = last_kept_steps(list(attempts))
    for at, path in reversed(list_states(run.states)):
        if step is not None and at != step:
            continue
        try:
            manifest = verify_state(path, on_bytes)
        except DamagedState as error:
            if step is not None:
                raise
            damaged.append(error)
            continue
        if at > kept.get(manifest.attempt, at) and step is None:
            continue
        return path, at
    if step:
        there = ", ".join(f"{at:,}" for at, _ in list_states(run.states)) or "none"
        raise NoSuchState(f"run {run.name}: no state at optimizer step {step:,}", f"States there are: {there}.")
    last = attempts[-1] if attempts else None
    if step is None and (damaged or (last is not None and last.start_optimizer_step)):
        raise NoWholeState(run, damaged, last)
    return None, 0


def find_foreign_state(run: Run, step: int | None, given: Path | None) -> tuple[Path, int]:
    """A state that plain sd-scripts wrote, and the optimizer step that its name or its file tells."""
    if given is not None:
        if not given.is_dir():
            raise NoSuchState(f"{given}: no such folder", "Give the `…-state` folder that sd-scripts wrote.")
        return given.resolve(), step if step is not None else foreign_step(given)
    folders = [path for path in run.checkpoints.glob("*-state") if path.is_dir()] if run.checkpoints.is_dir() else []
    found = sorted((foreign_step(path), path) for path in folders)
    wanted = [pair for pair in found if step is None or pair[0] == step]
    if not wanted:
        there = ", ".join(f"{at:,}" for at, _ in found) or "none"
        raise NoSuchState(
            f"{run.checkpoints}: no state of plain sd-scripts"
            + ("" if step is None else f" at optimizer step {step:,}"),
            f"States there are: {there}. Give another folder with `--state PATH`.",
        )
    return wanted[-1][1], wanted[-1][0]


def foreign_step(state: Path) -> int:
    """Optimizer steps done at a state of plain sd-scripts: by its name, else by its train_state.json."""
    if match := FOREIGN_STATE_OF_STEP.search(state.name):
        return int(match.group(1))
    try:
        return int(json.loads((state / "train_state.json").read_text(encoding="utf-8"))["current_step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{state}: neither its name nor train_state.json tells the optimizer step", "Say it with `--step N`."
        ) from None


def later_checkpoints(run: Run, optimizer_step: int) -> list[Path]:
    """Checkpoints of steps and epochs that are to be trained again, and the final one."""
    found = []
    per_epoch = run.lock.count.optimizer_steps_per_epoch
    for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []:
        if path.is_dir():
            continue
        if match := CHECKPOINT_OF_STEP.search(path.name):
            at = int(match.group(1))
        elif match := CHECKPOINT_OF_EPOCH.search(path.name):
            at = int(match.group(1)) * per_epoch
        elif path.stem == run.name:
            at = run.lock.total_optimizer_steps + 1
        else:
            continue
        if at > optimizer_step:
            found.append(path)
    return found


def is_finished(run: Run) -> bool:
    """Whether the newest attempt reached the last step and the final network is there.

    The network alone proves nothing: a crash may have cut it while it was written.
    """
    attempts = list_attempts(run)
    result = attempts[-1].result() if attempts else None
    is_there = any(run.checkpoints.glob(f"{run.name}.*")) if run.checkpoints.is_dir() else False
    return is_there and result is not None and result["outcome"] == "finished"


def is_damaged(state: Path, damaged: Sequence[DamagedState]) -> bool:
    return any(each.state == state for each in damaged)


def next_number(run: Run) -> int:
    """One more than the highest attempt, whole or not."""
    return max(attempt_numbers(run), default=0) + 1


def first_processes(run: Run) -> int:
    """The processes that the site gave when the run was made."""
    machine = run.lock.tables.get("machine", {})
    return int(machine.get("processes", max(int(machine.get("gpus", 1)), 1)))


def first_workers(run: Run) -> int:
    """The loader workers that the site or the template gave when the run was made."""
    values = run.lock.values
    return int(run.lock.tables.get("machine", {}).get("workers", values.get("max_data_loader_n_workers", 0)) or 0)


def threads_of(attempt: Attempt | None) -> int | None:
    """OMP_NUM_THREADS of an attempt."""
    if attempt is None:
        return None
    document = json.loads((attempt.folder / "attempt.json").read_text(encoding="utf-8"))
    threads = document.get("environment", {}).get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isascii() and threads.isdecimal() else None
