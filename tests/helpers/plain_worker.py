"""A trainer without models: real attempts, order, ledger, states and metrics; misbehaves where the test asks for it.

Its "weights" are a running sum that depends on every image, position and step in order, so a wrong resume shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from kohaku_wrap.training.data.order import order_digest
from kohaku_wrap.training.records import saving
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.bad_steps import BadSteps, MostlySkipped, TooManyBadSteps
from kohaku_wrap.training.records.ledger import LedgerHeader, LedgerWriter
from kohaku_wrap.training.records.metrics import MetricsWriter
from kohaku_wrap.training.records.networks import note_network
from kohaku_wrap.training.records.saving import save_run_state, wait_for_room
from kohaku_wrap.training.records.signs import Failure
from kohaku_wrap.training.verifying.run_order import read_order


def hang() -> None:
    """Hang for ever, and say so first."""
    print("hangs", flush=True)
    while True:
        time.sleep(3600)


def main() -> int:
    attempt = Attempt.load()
    attempt.open_log(0)
    attempt.stop_on_signals()
    lock = attempt.lock
    asked = json.loads(path.read_text()) if (path := attempt.run.folder / "misbehave.json").exists() else {}
    faults = asked.get(f"attempt_{attempt.number}", asked.get("every", {}))
    done = attempt.start_optimizer_step
    print(f"worker of attempt {attempt.number}", flush=True)
    if faults.get("hang") == "start-up-silent":
        hang()
    attempt.beat(0, "start-up", done)
    if faults.get("hang") == "start-up":
        hang()
    weights = b"0" if attempt.state is None else (attempt.state / "weights.bin").read_bytes()
    order, ids = read_order(attempt.run)
    group = attempt.group
    saving.PAUSE_SECONDS, saving.PATIENCE_SECONDS = 0.1, faults.get("patience_seconds", 20)
    ledger = LedgerWriter(
        attempt.run.ledger,
        LedgerHeader(
            attempt.number, 0, attempt.processes, attempt.accumulation, lock.batch_per_gpu, lock.seed,
            lock.run_id, lock.options_digest, is_deterministic=True,
        ),
    )  # fmt: skip
    bad_steps = BadSteps.at_start(attempt)
    metrics = MetricsWriter(attempt)

    def fill(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(weights)
        (folder / "optimizer.bin").write_bytes(os.urandom(64) * faults.get("state_blocks", 1))
        if faults.get("die") == "saving":
            os.kill(os.getpid(), signal.SIGKILL)

    def save(scheduled: bool = True) -> None:
        attempt.beat(0, "saving", done)
        ledger.sync()
        if faults.get("hang") == "saving":
            hang()
        save_run_state(attempt, done, fill, scheduled=scheduled, extra=bad_steps.document())

    while done < lock.total_optimizer_steps:
        epoch, first = order.count.position_of(done, 1).epoch, order.count.position_of(done, 1).global_position
        if done == faults.get("at", 1):
            act(attempt, faults, done)
        for position in range(first, first + group):
            images = ids[order.epoch(epoch).images_at(position)]
            weights = hashlib.sha256(weights + f"{epoch} {position} {images.tolist()}".encode()).digest()
            ledger.append(
                optimizer_step=done + 1,
                epoch=epoch,
                position=position,
                order_digest=order_digest(images),
                content_digest=int.from_bytes(weights[:4], "little"),
                loss=1.0,
                learning_rate=1e-4,
                is_fill=order.epoch(epoch).is_fill(position),
            )
            attempt.beat(0, "step", done, position)
            wait_for_room(attempt, ledger.write_out, done, position, "step")
            if done == faults.get("at", 1) and position == first + 1:
                act_within(faults)
        done += 1
        skipped = done in faults.get("skip", ())
        loss = float("nan") if faults.get("nan_loss") == done or skipped else 1 / done
        bad_steps.add(loss != loss, skipped)
        ledger.append_step(
            optimizer_step=done,
            epoch=epoch,
            updates=done - bad_steps.skipped,
            rates=[1e-4],
            is_skipped=skipped,
            is_non_finite=loss != loss,
        )
        wait_for_room(attempt, ledger.write_out, done, 0, "step")
        line = {"optimizer_step": done, "epoch": epoch, "loss": loss, "lr_unet": 1e-4, "seconds": 0.01, "images": 8}
        line |= {"optimizer_step_skipped": 1, "bad_steps_in_a_row": bad_steps.in_a_row} if skipped else {}
        metrics.append(line | {"nan_latents": faults.get("nan_latents", 0)})
        if skipped:
            try:
                bad_steps.check_step(attempt, done, loss, skipped)
            except TooManyBadSteps as error:
                attempt.fail(
                    Failure(0, "non-finite-loss", error.message, done, error.next_step, is_lasting=error.is_lasting)
                )
                return 1
        if faults.get("nan_loss") == done:
            time.sleep(5)
        time.sleep(faults.get("seconds_per_step", 0.005))
        if faults.get("hang") == "sampling" and done == 2:
            attempt.beat(0, "sampling", done)
            hang()
        stop = attempt.stop_requested() and done < lock.total_optimizer_steps
        due = done % lock.values["save_every_n_steps"] == 0
        if due or stop:
            save(scheduled=due)
        if stop:
            attempt.finish("stopped", done)
            return int(faults.get("exit_code", 0))
    try:
        bad_steps.check_end(done)
    except MostlySkipped as error:
        attempt.fail(Failure(0, error.kind, error.message, done, error.next_step, is_lasting=error.is_lasting))
        return 1
    network = attempt.run.checkpoints / f"{attempt.run.output_name}.safetensors"
    network.write_bytes(weights)
    note_network(attempt, network)
    attempt.finish("finished", done)
    if faults.get("hang") == "end":
        hang()
    return 0


def act(attempt: Attempt, faults: dict[str, object], done: int) -> None:
    """What goes wrong before the step after `done`."""
    if faults.get("hang") == "step":
        hang()
    if faults.get("crash"):
        raise ValueError("a tensor was not what it should be")
    if faults.get("memory"):
        raise MemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    if faults.get("fill_disk"):
        fill_disk(attempt.run.folder / "filler")
    if faults.get("exit_0"):
        sys.exit(0)
    if kind := faults.get("fail"):
        attempt.fail(Failure(0, str(kind), f"{kind} at /images/0003/3.png", done))
        sys.exit(1)


def fill_disk(filler: Path) -> None:
    """Leave not a byte of room."""
    with filler.open("ab", buffering=0) as stream:
        for size_bytes in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size_bytes))


def act_within(faults: dict[str, object]) -> None:
    """What goes wrong in the middle of a step."""
    if faults.get("die") == "step":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
