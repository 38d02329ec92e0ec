"""`kwrap verify` against ledgers that tell the truth, and against every lie that we could think of."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from plain_runs import misbehave, train, write_captions
from written_ledgers import Change, expected_records, hold_out, set_losses, set_record, write_ledger, write_life

from kohaku_wrap.cli import program
from kohaku_wrap.training.comparing.differences import NOT_KEPT_BY_0_1
from kohaku_wrap.training.data.order import order_digest
from kohaku_wrap.training.records.ancestry import Until
from kohaku_wrap.training.records.attempts import Attempt, list_attempts, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import (
    FILL,
    HEADER,
    RECORD,
    SKIPPED,
    STEP,
    SUBSTITUTE,
    BadLedger,
    Records,
    StepRecords,
    ledger_file,
    read_ledger_file,
)
from kohaku_wrap.training.records.networks import Network
from kohaku_wrap.training.records.verification import VERIFICATION_FILE, judge_verification
from kohaku_wrap.training.supervising.supervise import TrainerFailed
from kohaku_wrap.training.verifying.ledger_checks import digest_blocks
from kohaku_wrap.training.verifying.ledger_files import NoLedger
from kohaku_wrap.training.verifying.run_order import read_order
from kohaku_wrap.training.verifying.verify import verify_run
from kohaku_wrap.training.verifying.verify_report import VerifyReport, describe_networks

NewRun = Callable[..., Run]


def faults(run: Run) -> dict[str, tuple[int, int, int]]:
    """Kind of fault to count, optimizer step and position of the first."""
    return {fault.kind: (fault.count, fault.optimizer_step, fault.position) for fault in verify_run(run).faults}


def check_of(run: Run, name: str) -> tuple[bool, str]:
    """Whether `verify` looked at something, and what it says of it."""
    found = {check.name: check for check in verify_run(run).checks}[name]
    return found.is_looked_at, found.detail


def test_a_true_ledger_is_proved(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    report = verify_run(run)
    count = run.lock.count
    assert report.is_proved and report.is_finished and report.order_checked
    assert report.optimizer_steps == report.total_optimizer_steps == 2 * count.optimizer_steps_per_epoch
    assert report.positions == report.records == 2 * count.positions_per_epoch
    assert report.fills == 2 * (count.positions_per_epoch - count.batches) > 0
    assert report.skipped_images_loaded == 0 and report.deep_samples == 0 and report.in_progress == 0
    assert report.notes == (NOT_KEPT_BY_0_1,), "of the order there is nothing to say"


def test_attempts_on_other_numbers_of_processes_make_one_line(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 2, 0, 5)
    write_life(run, 2, 4, 4, 9)
    write_life(run, 3, 1, 6, 12)
    report = verify_run(run)
    assert report.is_proved, report.faults
    assert report.optimizer_steps == 12 and report.attempts == 3
    assert [(each.attempt, each.first_optimizer_step, each.last_optimizer_step) for each in report.repeats] == [
        (1, 5, 5),
        (2, 7, 9),
    ]
    assert report.compared == 4 * 4


def test_a_run_on_its_way_is_proved_as_far_as_it_is(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 5, lambda records: records[:-2])
    report = verify_run(run)
    assert report.is_proved and not report.is_finished
    assert (report.optimizer_steps, report.in_progress) == (4, 2)
    assert report.positions == 4 * run.lock.group, "those of whole steps"


@pytest.mark.parametrize(
    ("change", "kind", "first"),
    [
        (lambda records: np.delete(records, 6), "missing", (1, 2, 6)),
        (lambda records: np.delete(records, 6), "out-of-order", (1, 2, 7)),
        (lambda records: np.insert(records, 6, records[6]), "duplicate", (2, 2, 6)),
        (lambda records: records[[*range(5), 6, 5, *range(7, len(records))]], "out-of-order", (3, 2, 5)),
        (set_record(9, order_digest=1), "order", (1, 3, 9)),
        (set_record(9, optimizer_step=4), "misplaced", (1, 4, 9)),
        (set_record(23, flags=0), "mark", (1, 6, 23)),
        (set_record(9, flags=FILL), "mark", (1, 3, 9)),
        (set_record(9, attempt=1 << 31), "misplaced", (1, 3, 9)),
        (set_record(9, rank=1), "misplaced", (1, 3, 9)),
        (set_record(9, position=(1 << 63) + 9), "misplaced", (1, 3, 1 << 62)),
    ],
    ids=[
        "missing", "gap", "twice", "swapped", "other images", "other step", "unmarked fill", "false fill",
        "other attempt", "other rank", "no position",
    ],
)  # fmt: skip
def test_a_fault_is_found_where_it_is(new_run: NewRun, change: Change, kind: str, first: tuple[int, int, int]) -> None:
    run = new_run()
    assert run.lock.count.positions_per_epoch == 24 > run.lock.count.batches == 23
    write_life(run, 1, 1, 0, 12, change)
    assert faults(run)[kind] == first


@pytest.mark.parametrize(
    ("name", "kind"), [("content_digest", "content"), ("learning_rate", "rate"), ("order_digest", "order")]
)
def test_attempts_that_disagree_are_found(new_run: NewRun, name: str, kind: str) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 8)
    write_life(run, 2, 1, 6, 12, set_record(3, **{name: 9}))
    assert faults(run)[kind] == (1, 7, 3)


@pytest.mark.parametrize("byte", range(RECORD.itemsize))
def test_any_flipped_bit_of_a_record_is_found(new_run: NewRun, byte: int) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12)
    path = ledger_file(run.ledger, 1, 0)
    data = bytearray(path.read_bytes())
    data[HEADER.size + 7 * RECORD.itemsize + byte] ^= 1 << byte % 8
    path.write_bytes(data)
    report = verify_run(run)
    [damaged] = [fault for fault in report.faults if fault.kind == "damaged"]
    assert damaged.count == 1 and not report.is_proved


def test_any_flipped_bit_of_a_header_is_refused(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12)
    path = ledger_file(run.ledger, 1, 0)
    whole = path.read_bytes()
    for byte in range(HEADER.size):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        with pytest.raises(BadLedger):
            verify_run(run)


def test_a_resume_that_skipped_steps_is_found(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 4)
    write_life(run, 2, 1, 6, 12)
    assert faults(run)["missing"] == (8, 5, 16)


def test_a_ledger_that_ends_before_the_newest_state_is_found(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 5})
    with pytest.raises(TrainerFailed):
        train(run)
    assert verify_run(run).is_proved and not verify_run(run).is_finished
    path = ledger_file(run.ledger, 1, 0)
    path.write_bytes(path.read_bytes()[: HEADER.size + RECORD.itemsize * (3 * 5 - 1) - 1])
    # The newest state is of step 4; of the four records of step 3 one is torn.
    assert faults(run) == {"missing": (5, 3, 11)}
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.output.endswith(f"Go back to before the first of these: kwrap resume {run.folder} --step 2\n")


def test_the_part_of_a_run_that_left_no_record_is_said(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 5)
    write_life(run, 2, 1, 4, 9)
    assert verify_run(run, until=Until(1, 4)).is_proved
    path = ledger_file(run.ledger, 1, 0)
    path.write_bytes(path.read_bytes()[: HEADER.size])
    with pytest.raises(NoLedger, match=r"no whole record in attempt-0001-rank-000\.bin\n"):
        verify_run(run, until=Until(1, 4))
    path.unlink()
    with pytest.raises(NoLedger, match="no record of any training"):
        verify_run(run, until=Until(1, 4))


def test_a_file_under_the_name_of_another_is_refused(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 2, 0, 12)
    one, other = ledger_file(run.ledger, 1, 0), ledger_file(run.ledger, 1, 1)
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes), other.write_bytes(one_bytes)
    with pytest.raises(BadLedger, match=r"attempt-0001-rank-000.bin: the header is of attempt 1, rank 1 of 2"):
        verify_run(run)
    one.write_bytes(one_bytes), other.unlink()
    # Two of each step; the last one may be in progress.
    assert faults(run) == {"missing": (2 * 11, 1, 1)}


def test_steps_of_plain_sd_scripts_are_noted_and_the_rest_is_proved(new_run: NewRun) -> None:
    run = new_run()
    write_attempt(Attempt(run, 1, 1, run.lock.group, 0, 3, run.folder, foreign=True), {})
    write_ledger(run, 1, 0, 1, expected_records(run, 1, 0, 1, 4, 9))
    write_life(run, 2, 1, 6, 12)
    report = verify_run(run)
    assert report.is_proved and "plain sd-scripts up to optimizer step 3" in " ".join(report.notes)
    write_life(run, 2, 1, 3, 12)
    report = verify_run(run)
    assert report.is_proved and "plain sd-scripts up to optimizer step 3" in " ".join(report.notes)
    write_life(run, 3, 1, 7, 12, lambda records: np.delete(records, 2))
    assert faults(run)["missing"] == (1, 8, 6)
    write_life(run, 4, 1, 0, 12)
    report = verify_run(run)
    assert "plain sd-scripts" not in " ".join(report.notes) and "missing" not in faults(run)


def test_another_dataset_is_found(new_run: NewRun) -> None:
    """It is not held against the ledger: captions may change once a run is over."""
    run = new_run()
    train(run)
    assert check_of(run, "order") == (True, "recomputed from seed and dataset")
    write_captions(run.folder.parent.parent / "images", 44)
    report = verify_run(run, deep_samples=3)
    assert report.is_proved and not report.order_checked and report.deep_samples == 0
    assert "the captions were changed after the run" in {check.name: check for check in report.checks}["order"].detail
    assert "the captions were changed after the run" in {check.name: check for check in report.checks}["deep"].detail
    assert any(change.startswith("dataset: the captions had the digest") for change in report.changed_after)


def test_captions_that_were_written_anew_leave_the_order_provable(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    write_captions(run.folder.parent.parent / "images", 45, last_tag="another")
    report = verify_run(run, deep_samples=3)
    assert report.is_proved and report.order_checked and report.deep_samples == 0 and report.changed_after
    write_life(run, 2, 1, 0, 12, set_record(9, order_digest=1))
    assert faults(run)["order"] == (1, 3, 9), "attempts are still compared with each other"


def test_a_dataset_that_is_gone_is_said(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    shutil.rmtree(run.folder.parent.parent / "images")
    report = verify_run(run)
    assert report.is_proved and not report.order_checked and report.changed_after


def test_a_run_of_kwrap_0_1_is_proved_as_before(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 8, version=2)
    write_life(run, 2, 1, 6, 12)
    report = verify_run(run)
    assert report.is_proved, report.faults
    told = {check.name: (check.is_looked_at, check.detail) for check in report.checks}
    assert told["order"][0] and told["losses"] == (True, "8 compared bit for bit")
    assert not told["skipped steps"][0] and "for 6 steps" in told["skipped steps"][1]
    assert not told["rates"][0] and not told["options"][0]
    run.metrics.write_text('{"optimizer_step": 3, "loss": "nan", "optimizer_step_skipped": 1, "attempt": 1}\n')
    assert verify_run(run).skipped_steps == 1


@pytest.mark.parametrize(
    ("change", "kind", "first"),
    [
        (lambda steps: np.delete(steps, 4), "step", (1, 5, 16)),
        (lambda steps: np.insert(steps, 4, steps[4]), "step", (1, 5, 16)),
        (set_record(4, groups=5), "step", (1, 5, 16)),
        (set_record(4, optimizer_step=6), "step", (1, 5, 16)),
        (set_record(4, attempt=3), "misplaced", (1, 5, 16)),
        (set_record(4, rank=1), "misplaced", (1, 5, 16)),
        (set_record(4, epoch=1), "misplaced", (1, 5, 16)),
        (set_record(4, flags=STEP | SKIPPED), "skip", (1, 5, 16)),
        (set_record(4, updates=4), "skip", (2, 5, 16)),
        (set_record(0, updates=0), "skip", (2, 1, 0)),
    ],
)
def test_a_fault_of_a_step_is_found(new_run: NewRun, change: Change, kind: str, first: tuple[int, int, int]) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12, change_steps=change)
    assert faults(run)[kind] == first


def test_ranks_that_disagree_are_found(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 2, 0, 12, change_steps=set_record(4, flags=STEP | SKIPPED, updates=4))
    told = {(fault.what[:19], fault.optimizer_step) for fault in verify_run(run).faults}
    assert told == {("one rank skipped th", 5), ("the updates counted", 6)}
    write_life(run, 2, 2, 0, 12, change_steps=set_record(6, rates=(2e-4, 0, 0, 0)))
    assert faults(run)["rate"] == (1, 7, 0)


def test_only_a_last_step_may_be_without_its_record(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 7, change_steps=lambda steps: steps[:-1])
    assert verify_run(run).is_proved
    write_life(run, 2, 1, 5, 12)
    assert verify_run(run).is_proved
    write_life(run, 3, 1, 7, 12)
    assert verify_run(run).is_proved
    report = verify_run(run)
    assert report.is_finished is False


def test_skipped_steps_are_counted_and_too_many_are_a_fault(new_run: NewRun) -> None:
    run = new_run()

    def skip(*numbers: int) -> Change:
        def change(steps: StepRecords) -> StepRecords:
            steps["flags"] |= np.where(np.isin(steps["optimizer_step"], numbers), SKIPPED, 0).astype(np.uint16)
            steps["updates"] = np.cumsum((steps["flags"] & SKIPPED) == 0)
            return steps

        return change

    write_life(run, 1, 1, 0, 12, change_steps=skip(1, 2, 3, 7, 8, 9))
    report = verify_run(run)
    assert report.is_proved and report.skipped_steps == 6
    assert check_of(run, "skipped steps")[0]
    write_life(run, 2, 1, 0, 12, change_steps=skip(1, 2, 3, 7, 8, 9, 10))
    report = verify_run(run)
    assert not report.is_proved and report.skipped_steps == 7
    assert faults(run) == {"skipped": (7, 1, 0)}


@pytest.mark.parametrize("header", [{"options_digest": "f" * 64}, {"run_id": "a" * 32}])
def test_an_attempt_with_other_options_than_the_lock_is_found(new_run: NewRun, header: dict[str, Any]) -> None:
    run = new_run(run={"id": "b" * 32, "options_digest": "e" * 64}, format=2)
    write_life(run, 1, 1, 0, 8)
    assert verify_run(run).is_proved and check_of(run, "options") == (True, "every attempt has the digest of the lock")
    write_life(run, 2, 1, 6, 12, **header)
    assert faults(run) == {"options": (1, 7, 0)}


def test_losses_of_two_attempts_agree_bit_for_bit_or_nearly(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 8, set_losses(1.0))
    write_life(run, 2, 1, 6, 12, set_losses(1.0))
    assert verify_run(run).is_proved and check_of(run, "losses") == (True, "8 compared bit for bit")
    write_life(run, 3, 1, 10, 12, set_losses(np.nextafter(1.0, 2.0)))
    assert faults(run) == {"loss": (8, 11, 16)}
    write_life(run, 3, 1, 10, 12, set_losses(1.05), is_deterministic=False)
    assert verify_run(run).is_proved
    assert check_of(run, "losses")[1] == (
        "8 compared bit for bit; 8 compared to within 10%, the largest difference 4.76%"
    )
    write_life(run, 3, 1, 10, 12, set_losses(1.05), device_digest=7)
    assert verify_run(run).is_proved, "another machine rounds otherwise"
    write_life(run, 3, 1, 10, 12, set_losses(1.2), is_deterministic=False)
    assert faults(run)["loss"] == (8, 11, 16)


def test_losses_of_attempts_with_other_options_are_not_compared(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 8, set_losses(1.0))
    write_life(run, 2, 1, 6, 12, set_losses(2.0), differences={"min_snr_gamma": "was 5, is now 1"})
    assert verify_run(run).is_proved
    assert check_of(run, "losses") == (False, "8 not, as the attempts have other options by --allow")


def test_substitutes_are_counted(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12, set_record(3, flags=SUBSTITUTE))
    report = verify_run(run)
    assert report.is_proved and report.substitutes == 1
    assert report.fills == 2, "a substitute is no fill"


def test_less_than_a_step_is_in_progress(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 1, lambda records: records[:-2])
    report = verify_run(run)
    assert report.is_proved and (report.optimizer_steps, report.in_progress) == (0, 2)


def test_a_step_that_only_left_attempts_reached_is_not_due(new_run: NewRun) -> None:
    """Attempts 1 and 2 were left behind by `resume --step 2`, and so were the states that they wrote."""
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 5})
    with pytest.raises(TrainerFailed):
        train(run)
    write_life(run, 1, 1, 0, 5)
    write_life(run, 2, 1, 4, 9)
    write_life(run, 3, 1, 2, 3)
    report = verify_run(run)
    assert report.is_proved and report.optimizer_steps == 3, report.faults


def test_without_records_there_is_nothing_to_prove(new_run: NewRun) -> None:
    run = new_run()
    with pytest.raises(NoLedger, match="no record of any training"):
        verify_run(run)
    (run.ledger / "attempt-0001-rank-000.bin").write_text("not a ledger")
    with pytest.raises(NoLedger, match=r"no whole record in attempt-0001-rank-000\.bin"):
        verify_run(run)


def test_the_trainers_own_dataset_is_compared_between_attempts(new_run: NewRun) -> None:
    run = new_run(run={"data": "sd-scripts"})
    write_life(run, 1, 1, 0, 8, set_record(2, order_digest=5))
    write_life(run, 2, 1, 6, 12)
    report = verify_run(run, deep_samples=3)
    assert report.is_proved and not report.order_checked and report.notes and report.deep_samples == 0
    deep = {check.name: check for check in report.checks}["deep"]
    assert not deep.is_looked_at and deep.detail == 'not possible with data = "sd-scripts"'
    assert check_of(run, "order") == (
        False,
        'data = "sd-scripts": the images at each position are compared between attempts only',
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("options_digest",), None),
        (("unix_seconds",), 1e400),
        (("report", "checks"), None),
        (("report", "unverified"), 3),
        (("report", "faults"), [1]),
    ],
)
def test_a_kept_result_that_was_edited_counts_as_none(new_run: NewRun, path: tuple[str, ...], value: object) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 5)
    CliRunner().invoke(program, ["verify", str(run.folder)])
    assert judge_verification(run, list_attempts(run)).standing == "proved"
    file = run.folder / VERIFICATION_FILE
    document = json.loads(file.read_text())
    table = document["report"] if len(path) == 2 else document
    table[path[-1]] = value
    file.write_text(json.dumps(document))
    assert judge_verification(run, list_attempts(run)).standing == "never"


def test_the_command_tells_and_exits(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"die": "step", "at": 5})
    train(run, restarts=1)
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.return_value == 0
    assert "proved" in result.output and "optimizer steps 5 to 6" in result.output
    file = read_ledger_file(ledger_file(run.ledger, 1, 0))
    header, records = file.header, file.records
    write_ledger(run, 1, 0, header.processes, set_record(2, order_digest=5)(records))
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.return_value == 1
    assert "order: 1 × other images" in result.output and "first at optimizer step 1" in result.output
    assert f"kwrap resume {run.folder} --step 0\n" in result.output, "no state is from before it"
    result = CliRunner().invoke(program, ["verify", str(run.folder), "--json"], standalone_mode=False)
    told = json.loads(result.stdout)
    assert not told["proved"] and told["faults"][0]["position"] == 2 and told["repeats"][0]["attempt"] == 1


def test_epsilon_takes_seconds(new_run: NewRun, tmp_path: Path) -> None:
    """20,354 optimizer steps of 16 micro-batches on 4 ranks."""
    run = new_run(images=100_000, accumulation=16, processes=4, epochs=2)
    per_epoch = run.lock.count.optimizer_steps_per_epoch
    epochs = -(-20_354 // per_epoch)
    text = run.lock_file.read_text().replace(
        f"total_optimizer_steps = {2 * per_epoch}", f"total_optimizer_steps = {epochs * per_epoch}"
    )
    run.lock_file.write_text(text)
    run = Run(run.folder)
    count = run.lock.count
    write_attempt(Attempt(run, 1, 4, 16, 0, 0, None), {})
    order, ids = read_order(run)
    digests = np.stack([np.concatenate(list(digest_blocks(order.epoch(each), ids, 2))) for each in range(epochs)])
    for rank in range(4):
        places = np.arange(rank, epochs * count.positions_per_epoch, 4)
        records = np.zeros(len(places), dtype=RECORD)
        records["attempt"], records["rank"] = 1, rank
        records["epoch"], records["position"] = np.divmod(places, count.positions_per_epoch)
        records["optimizer_step"] = places // count.group + 1
        records["order_digest"] = digests[records["epoch"], records["position"]]
        records["flags"] = np.where(records["position"] >= count.batches, FILL, 0)
        write_ledger(run, 1, rank, 4, records)
    started = time.process_time()
    report: VerifyReport = verify_run(run)
    assert report.is_proved and report.records >= 20_354 * 16 * 4
    assert time.process_time() - started < 20


def test_a_state_of_another_run_and_what_was_accepted_are_named(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 6)
    write_life(run, 2, 1, 3, run.lock.total_optimizer_steps, differences={"other-run": "the state was another's"})
    path = run.attempts / "2" / "attempt.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"lineage": {"run_id": "a" * 32}}))
    notes = " ".join(verify_run(run).notes)
    assert "trained by another run up to optimizer step 3 (--allow other-run): proved from there on" in notes
    assert "attempt 2 accepted other-run: the state was another's" in notes


def test_that_no_held_out_post_was_trained_is_proved(new_run: NewRun) -> None:
    run = new_run()
    assert not [each for each in verify_run_of(run, 1).checks if each.name == "held out"]
    hold_out(run, 3, 10, 17)
    assert 10 not in read_order(run)[1] and 10 in read_order(run, with_held_out=True)[1]
    report = verify_run_of(run, 1)
    assert report.is_proved, report.faults
    assert check_of(run, "held out") == (True, "none of 3 posts was trained: 3 measured, 0 that are their like")


@pytest.mark.parametrize("post", [3, 17])
def test_a_planted_held_out_post_is_named(new_run: NewRun, post: int) -> None:
    run = new_run()
    hold_out(run, 3, 10, 17)

    def plant(records: Records) -> Records:
        order, ids = read_order(run)
        batch = ids[order.epoch(0).images_at(int(records["position"][5]))].copy()
        batch[-1] = post
        return set_record(5, order_digest=order_digest(batch))(records)

    write_life(run, 1, 1, 0, 6, change=plant)
    found = faults(run)
    assert found["held-out"] == (1, 2, 5) and "order" in found
    assert not verify_run(run).is_proved
    assert check_of(run, "held out") == (True, "some were trained")


def test_a_run_that_trained_as_if_none_were_held_out_is_refused(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 6)
    hold_out(run, 3, 10, 17)
    assert faults(run)["held-out"][0] > 0


@pytest.mark.parametrize(("unknown", "changed", "same"), [(0, 1, 4), (1, 1, 3), (0, 2, 3), (2, 0, 3)])
def test_networks_as_written_are_counted(unknown: int, changed: int, same: int) -> None:
    kinds = [("", "")] * unknown + [("a", "b")] * changed + [("a", "a")] * same
    check = describe_networks([Network(Path(f"{n}.safetensors"), *kind) for n, kind in enumerate(kinds)])
    assert check.detail.startswith(f"{same} as the run wrote them")


def verify_run_of(run: Run, number: int) -> VerifyReport:
    """The report on a true attempt of 6 optimizer steps."""
    write_life(run, number, 1, 0, 6)
    return verify_run(run)
