"""Which state a resume takes: the newest whole one of the run's line, that of a step, or one of plain sd-scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.training.records.attempts import Attempt, last_kept_steps, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import DamagedState, digest_of_state
from kohaku_wrap.training.records.states import list_states, read_manifests, verify_state

FOREIGN_STATE_OF_STEP = re.compile(r"-step(\d{8,})-state$")


class NoSuchState(KwrapError):
    """No whole state at the step that was asked for."""


class NoWholeState(KwrapError):
    """States were saved and none can be loaded; starting from the beginning is for the person to decide."""

    def __init__(self, run: Run, damaged: Sequence[DamagedState], last: Attempt | None) -> None:
        lines = [f"run {run.name}: no whole state is left"]
        lines += [f"  {each.state.name}: {each.what}" for each in damaged]
        if not damaged and last is not None:
            lines.append(f"  the state of optimizer step {last.start_optimizer_step:,}, from which it went on, is gone")
        beginning = command_line("resume", run.folder, "--step", run.first_optimizer_step)
        advice = f"Restore one into {run.states}, or train from the beginning: {beginning}"
        if last is not None and last.foreign:
            again = command_line("resume", run.folder, "--foreign", "--state", last.state)
            advice = f"Give the state of plain sd-scripts again: {again}"
        super().__init__("\n".join(lines), advice)


def find_state(
    run: Run,
    attempts: Sequence[Attempt],
    step: int | None,
    damaged: list[DamagedState],
    on_bytes: Callable[[int], None] | None,
) -> tuple[Path | None, int]:
    """The state to load and its step; (None, 0) when none was ever saved, or step 0 was asked for.

    A branch begins with the state that it came from, in the place of nothing.
    """
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
        is_own = manifest.fingerprint.run_id == run.lock.run_id
        if is_own and at > kept.get(manifest.attempt, at):
            if step is None:
                continue
            raise NoSuchState(
                f"{path}: written by attempt {manifest.attempt} on a line that was left behind at optimizer step "
                f"{kept[manifest.attempt]:,.0f}",
                f"Move it out of {run.states}; states of the run's line: {list_own(run, kept) or 'none'}.",
            )
        return path, at
    beginning, first = run.origin_state, run.first_optimizer_step
    last = attempts[-1] if attempts else None
    is_at_start = step is None and not damaged and (last is None or last.start_optimizer_step == first)
    if beginning is not None and (step == first or is_at_start):
        return check_beginning(run, beginning, on_bytes), first
    if step or (step is not None and beginning is not None):
        steps = [at for at, _ in list_states(run.states)] + ([first] if beginning is not None else [])
        there = ", ".join(f"{at:,}" for at in sorted(steps)) or "none"
        raise NoSuchState(f"run {run.name}: no state at optimizer step {step:,}", f"States there are: {there}.")
    if step is None and (damaged or (last is not None and last.start_optimizer_step)):
        raise NoWholeState(run, damaged, last)
    return None, 0


def check_beginning(run: Run, state: Path, on_bytes: Callable[[int], None] | None = None) -> Path:
    """The state that a branch came from, verified against its lock. Raises DamagedState."""
    verify_state(state, on_bytes)
    origin = run.lock.origin
    if origin is not None and digest_of_state(state) != origin.state_digest:
        raise DamagedState(state, f"is not the state of run {origin.run} that this run began from")
    return state


def list_own(run: Run, kept: Mapping[int, float]) -> str:
    """The steps of the states on the run's line, for people."""
    found = read_manifests(run.states)
    return ", ".join(f"{at:,}" for at, manifest in found if at <= kept.get(manifest.attempt, at))


def find_step_before(run: Run, optimizer_step: int) -> int:
    """The newest step below that one from which the run can go on: of a state on its line, else its beginning."""
    kept = last_kept_steps(list_attempts(run))
    own = (at for at, each in read_manifests(run.states) if at <= kept.get(each.attempt, at))
    return max((at for at in own if at < optimizer_step), default=run.first_optimizer_step)


def find_foreign_state(run: Run, step: int | None, given: Path | None) -> tuple[Path, int]:
    """A state that plain sd-scripts wrote, and the optimizer step that its name or its file tells."""
    if given is not None:
        if not given.is_dir():
            raise NoSuchState(f"{given}: no such folder", "Give the `…-state` folder that sd-scripts wrote.")
        return given.resolve(), step if step is not None else foreign_step(given)
    found: list[tuple[int, Path]] = []
    for path in sorted(path for path in run.checkpoints.glob("*-state") if path.is_dir()):
        with suppress(UsageError):
            found.append((foreign_step(path), path))
    wanted = [pair for pair in sorted(found) if step is None or pair[0] == step]
    if not wanted:
        there = ", ".join(f"{at:,}" for at, _ in sorted(found)) or "none"
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
        return int(parse_json(read_regular(state / "train_state.json"))["current_step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{state}: neither its name nor train_state.json has the optimizer step", "Say it with `--step N`."
        ) from None
