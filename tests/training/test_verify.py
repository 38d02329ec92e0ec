"""`kwrap verify` against ledgers that tell the truth, and against every lie that we could think of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from plain_runs import misbehave, train, write_captions

from kohaku_wrap.cli import program
from kohaku_wrap.training.records.ledger import (
    FILL,
    HEADER,
    RECORD,
    SUBSTITUTE,
    BadLedger,
    LedgerHeader,
    Records,
    compute_checksums,
    ledger_file,
    pack_header,
    read_ledger_file,
)
from kohaku_wrap.training.records.ledger_checks import digest_blocks
from kohaku_wrap.training.records.verify import NoLedger, VerifyReport, read_order, verify_run
from kohaku_wrap.training.runs.attempts import Attempt, write_attempt
from kohaku_wrap.training.runs.folder import Run
from kohaku_wrap.training.runs.supervise import TrainerFailed

NewRun = Callable[..., Run]
Change = Callable[[Records], Records]


def expected_records(run: Run, attempt: int, rank: int, processes: int, first_step: int, last_step: int) -> Records:
    """What a rank must record for the steps from `first_step` to `last_step`, counted from 1."""
    order, ids = read_order(run)
    count = run.lock.count
    group = count.group
    places = np.arange((first_step - 1) * group, last_step * group)
    places = places[places % count.positions_per_epoch % processes == rank]
    records = np.zeros(len(places), dtype=RECORD)
    records["attempt"], records["rank"] = attempt, rank
    records["epoch"], records["position"] = np.divmod(places, count.positions_per_epoch)
    records["optimizer_step"] = places // group + 1
    digests = [np.concatenate(list(digest_blocks(order.epoch(epoch), ids, 2))) for epoch in range(2)]
    records["order_digest"] = np.stack(digests)[records["epoch"], records["position"]]
    records["content_digest"] = places * 17
    records["learning_rate"] = 1e-4
    records["flags"] = np.where(records["position"] >= count.batches, FILL, 0)
    return records


def write_ledger(run: Run, attempt: int, rank: int, processes: int, records: Records) -> None:
    accumulation = run.lock.group // processes
    header = pack_header(LedgerHeader(attempt, rank, processes, accumulation, 2, run.lock.seed))
    records["checksum"] = compute_checksums(records)
    ledger_file(run.ledger, attempt, rank).write_bytes(header + records.tobytes())


def write_life(run: Run, number: int, processes: int, start: int, last_step: int, change: Change | None = None) -> None:
    """One attempt from after step `start` to `last_step`; `change` falsifies rank 0's records."""
    write_attempt(Attempt(run, number, processes, run.lock.group // processes, 0, start, None), {})
    for rank in range(processes):
        records = expected_records(run, number, rank, processes, start + 1, last_step)
        write_ledger(run, number, rank, processes, change(records) if change and rank == 0 else records)


def faults(run: Run) -> dict[str, tuple[int, int, int]]:
    """Kind of fault to count, optimizer step and position of the first."""
    return {fault.kind: (fault.count, fault.optimizer_step, fault.position) for fault in verify_run(run).faults}


def set_record(index: int, **values: int | float) -> Change:
    def change(records: Records) -> Records:
        changed = records.copy()
        for name, value in values.items():
            changed[name][index] = value
        return changed

    return change


def test_a_true_ledger_is_proved(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    report = verify_run(run)
    count = run.lock.count
    assert report.is_proved and report.is_finished and report.order_checked
    assert report.optimizer_steps == report.total_optimizer_steps == 2 * count.optimizer_steps_per_epoch
    assert report.positions == report.records == 2 * count.positions_per_epoch
    assert report.fills == 2 * (count.positions_per_epoch - count.batches) > 0


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
    path.write_bytes(path.read_bytes()[: HEADER.size + RECORD.itemsize * 3 * 4 - 1])
    # The newest state is of step 4; of the four records of step 3 one is torn.
    assert faults(run) == {"missing": (5, 3, 11)}


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
    assert report.is_proved and "plain sd-scripts up to optimizer step 3" in report.notes[0]
    write_life(run, 3, 1, 7, 12, lambda records: np.delete(records, 2))
    assert faults(run)["missing"] == (1, 8, 6)
    write_life(run, 4, 1, 0, 12)
    report = verify_run(run)
    assert not report.notes and "missing" not in faults(run)


def test_another_dataset_is_found(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    write_captions(run.folder.parent.parent / "images", 44)
    assert "order" in faults(run)


def test_substitutes_are_counted(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12, set_record(3, flags=SUBSTITUTE))
    report = verify_run(run)
    assert report.is_proved and report.substitutes == 1


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
    report = verify_run(run)
    assert report.is_proved and not report.order_checked and report.notes


def test_the_command_tells_and_exits(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"die": "step", "at": 5})
    train(run, restarts=1)
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.return_value == 0
    assert "proved" in result.output and "optimizer steps 5 to 6" in result.output
    header, records = read_ledger_file(ledger_file(run.ledger, 1, 0))
    write_ledger(run, 1, 0, header.processes, set_record(2, order_digest=5)(records))
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.return_value == 1
    assert "order: 1 × other images" in result.output and "first at optimizer step 1" in result.output
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
