"""What `verify` found last, kept in the run and bound to the ledger and the options that it looked at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import kohaku_wrap
from kohaku_wrap.file_hashes import HASH_BLOCK_BYTES
from kohaku_wrap.files import open_regular, read_json, write_text
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.documents import fits, is_whole
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import digest_of_ledger, list_ledger_files

VERIFICATION_FILE = "verification.json"
FORMAT = 1

Standing = Literal["proved", "partly", "faults", "changed", "never"]
"""All of the ledger is proved; the ledger grew since; faults were found; ledger or options are others; no result."""


@dataclass(frozen=True)
class Seal:
    """The ledger at one moment."""

    ledger_sha256: str
    """The digest over all its files; empty where there is none."""

    files: Mapping[str, tuple[int, str]]
    """Bytes and sha256 of each file by its name: a ledger only grows, so these are the beginnings of later ones."""


@dataclass(frozen=True)
class Verdict:
    """What the kept result says of the run as it is now."""

    standing: Standing
    """In one word."""

    optimizer_step: int = 0
    """The last one that is proved; 0 where nothing is."""

    unix_seconds: float = 0.0
    """When `verify` ran; 0 where it never did."""

    report: Mapping[str, Any] | None = None
    """Its result as `verify --json` printed it; None where there is none."""

    why: str = ""
    """What no longer fits, for people."""

    @property
    def not_looked_at(self) -> list[str]:
        """What `verify` named as not looked at, or left to the trainer."""
        report = self.report or {}
        checks = [f"{each['name']}: {each['detail']}" for each in report.get("checks", ()) if not each["is_looked_at"]]
        return checks + [f"option {name}" for name in report.get("unverified", ())]


def seal_ledger(run: Run) -> Seal:
    """The ledger as it is now; taken before `verify` reads it, so that all it covers was read."""
    files = {path.name: (size := path.stat().st_size, sha256_of_start(path, size))
             for _, _, path in list_ledger_files(run.ledger)}  # fmt: skip
    return Seal(digest_of_ledger(run.ledger), files)


def sha256_of_start(path: Path, size_bytes: int) -> str:
    """The sha256 over the first bytes of a file; empty where it is shorter."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while size_bytes and (block := stream.read(min(HASH_BLOCK_BYTES, size_bytes))):
            digest.update(block)
            size_bytes -= len(block)
    return "" if size_bytes else digest.hexdigest()


def keep_verification(run: Run, seal: Seal, report: Mapping[str, Any]) -> None:
    """Write the result into the run, whole or not at all. Raises OSError."""
    document = {
        "format": FORMAT,
        "kwrap_version": kohaku_wrap.__version__,
        "unix_seconds": time.time(),
        "options_digest": run.lock.options_digest,
        "ledger_sha256": seal.ledger_sha256,
        "ledger_files": {name: list(entry) for name, entry in seal.files.items()},
        "report": report,
    }
    write_text(run.folder / VERIFICATION_FILE, json.dumps(document, indent=1, default=str) + "\n")


def judge_verification(run: Run, attempts: Sequence[Attempt]) -> Verdict:
    """What the kept result is worth for the ledger and the options of now; hashes the ledger."""
    found = read_json(run.folder / VERIFICATION_FILE)
    if not is_result(found):
        return Verdict("never")
    report, seconds = found["report"], float(found["unix_seconds"])
    if found["options_digest"] != run.lock.options_digest:
        return Verdict("changed", 0, seconds, report, "the options that decide the weights are others now")
    now = {path.name: path for _, _, path in list_ledger_files(run.ledger)}
    kept = found["ledger_files"]
    for name, (size, sha256) in kept.items():
        if name not in now or sha256_of_start(now[name], size) != sha256:
            return Verdict("changed", 0, seconds, report, f"the ledger's {name} is no longer what was verified")
    if not report["proved"]:
        return Verdict("faults", 0, seconds, report)
    step = report["optimizer_steps"]
    if now.keys() == kept.keys() and all(path.stat().st_size == kept[name][0] for name, path in now.items()):
        return Verdict("proved", step, seconds, report)
    seen = {attempt for attempt, _, path in list_ledger_files(run.ledger) if path.name in kept}
    later = [each.start_optimizer_step for each in attempts if each.number not in seen]
    return Verdict("partly", min([step, *later]), seconds, report)


def is_result(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is a result that this kwrap can read."""
    report, files = document.get("report"), document.get("ledger_files")
    return (
        document.get("format") == FORMAT
        and fits(document.get("unix_seconds"), float)
        and isinstance(document.get("options_digest"), str)
        and isinstance(files, dict)
        and all(isinstance(each, list) and len(each) == 2 and is_whole(each[0]) for each in files.values())
        and isinstance(report, dict)
        and isinstance(report.get("proved"), bool)
        and is_whole(report.get("optimizer_steps"))
        and all(isinstance(report.get(name, []), list) for name in ("checks", "faults", "unverified"))
        and all(isinstance(each, dict) for name in ("checks", "faults") for each in report.get(name, ()))
        and all({"name", "detail", "is_looked_at"} <= each.keys() for each in report.get("checks", ()))
    )  # fmt: skip
