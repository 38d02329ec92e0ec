"""The files of a run's ledger, and under what their attempts trained."""

from __future__ import annotations

import math

from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.files import match_names
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import (
    FILE_NAME,
    BadLedger,
    LedgerFile,
    list_ledger_files,
    read_ledger_file,
)
from kohaku_wrap.training.verifying.ledger_checks import Conditions


class NoLedger(KwrapError):
    """The run has trained nothing yet, or its ledger is gone."""


def read_files(run: Run, last_attempt: float = math.inf) -> list[LedgerFile]:
    """The files of the ledger up to an attempt, by attempt and rank.

    Raises NoLedger where there is no record, BadLedger for a file under another's name.
    """
    files = []
    for attempt, rank, path in list_ledger_files(run.ledger):
        if attempt > last_attempt:
            break
        file = read_ledger_file(path)
        header = file.header
        if (header.attempt, header.rank) != (attempt, rank) or not header.processes:
            raise BadLedger(
                f"{path}: the header is of attempt {header.attempt}, rank {header.rank} of {header.processes}",
                "The file was renamed, swapped or damaged: restore it.",
            )
        files.append(file)
    if any(len(file.records) for file in files):
        return files
    if names := sorted(path.name for name, path in match_names(run.ledger, FILE_NAME) if int(name[1]) <= last_attempt):
        raise NoLedger(
            f"{run.ledger}: no whole record in {', '.join(names)}",
            f"If the run has trained, they are damaged: restore them. See `{command_line('status', run.folder)}`.",
        )
    raise NoLedger(
        f"{run.ledger}: no record of any training", f"Train first; see `{command_line('status', run.folder)}`."
    )


def list_conditions(run: Run, attempts: list[Attempt], files: list[LedgerFile]) -> dict[int, Conditions]:
    """Under what each attempt trained. kwrap 0.1 gave the same bits on a CPU, and said nothing of GPUs."""
    found: dict[int, Conditions] = {}
    known = {attempt.number: attempt for attempt in attempts}
    for file in files:
        header, attempt = file.header, known.get(file.header.attempt)
        if attempt is None:
            continue
        is_deterministic = header.is_deterministic if header.version > 2 else run.lock.is_on_cpu
        accepted = frozenset(f"{where}: {what}" for where, what in attempt.differences.items())
        found[attempt.number] = Conditions(
            is_deterministic, header.processes, header.device_digest, attempt.threads, accepted
        )
    return found
