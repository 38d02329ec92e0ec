"""What to do after an attempt that failed, by the kind of its end."""

from __future__ import annotations

from contextlib import suppress

from kohaku_wrap.errors import command_line
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.bad_steps import KEY_IN_STATE
from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.supervising.ends import AttemptEnd


def go_back(attempt: Attempt) -> str:
    """How to go on from before the steps that were skipped or had no number as loss."""
    for step, state in reversed(list_states(attempt.run.states)):
        with suppress(DamagedState):
            counts = read_manifest(state).extra.get(KEY_IN_STATE, {})
            if not counts.get("in_a_row"):
                resume = command_line("resume", attempt.run.folder, "--step", step)
                return f"the newest state from before they went wrong: {resume}"
    return "no state is from before they went wrong: start a new run, with lower rates or bf16"


def advice_after(attempt: Attempt, end: AttemptEnd) -> str:
    """What to do after a failure of this kind."""
    resume = command_line("resume", attempt.run.folder)
    advice = {
        "bad-image": f"Remove the image and run `kwrap extract` again, which makes it anew, then: {resume}. "
        f"Or train a substitute in its place: {resume} --allow bad-images",
        "out-of-memory": f"Lower [machine] batch_per_gpu for a new run, or free memory; then: {resume}",
        "disk-full": f"Free some space, then: {resume}",
        "mostly-skipped": "Start a new run with lower rates, or with bf16 in place of fp16. The last network is there.",
        "non-finite-loss": f"Look at the last losses with `{command_line('status', attempt.run.folder)}`; "
        + go_back(attempt),
        "nan-latents": f"Fix the VAE's precision for a new run, or accept it: {resume} --allow nan-latents",
        "bad-state": f"Choose another state: {resume} --step N",
        "hang": f"The stacks of the hang are in the logs under {attempt.folder}. Go on with: {resume}",
        "exited-early": f"The logs under {attempt.folder} may tell why. Go on with: {resume}",
    }
    if end.kind == "bad-image" and attempt.lock.data != "kwrap":
        return f'Fix the image, then: {resume}. Only kwrap\'s dataset (data = "kwrap") can train a substitute.'
    return advice.get(end.kind, f"The whole logs are in {attempt.folder}. Go on with: {resume}")
