"""A run as kwrap 0.1 wrote it, made from one of today by leaving out what came later."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import toml

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import list_ledger_files, pack_header, read_ledger_file
from kohaku_wrap.training.records.manifest import MANIFEST, document_digest

LATER_TABLES = ("format", "digest", "files", "kernels")
LATER_RUN_ENTRIES = ("id", "options_digest", "trust")
LATER_INPUTS = (
    "rows_digest",
    "image_files_digest",
    "tokenizers_sha256",
    "base_weights_sha256",
    "network_weights_sha256",
    "site",
    "site_sha256",
)
LATER_FINGERPRINT = ("run_id", "options_digest")
LATER_ATTEMPT_ENTRIES = ("bad_steps", "lineage")
LATER_METRICS = ("optimizer_step_skipped",)


def without(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def make_older(run: Run) -> Run:
    """Rewrite lock, attempts, states, ledger and metrics; the run read anew."""
    lock = without(toml.loads(run.lock_file.read_text(encoding="utf-8")), *LATER_TABLES)
    lock["run"] = without(lock["run"], *LATER_RUN_ENTRIES)
    lock["inputs"] = without(lock["inputs"], *LATER_INPUTS)
    run.lock_file.write_text(toml.dumps(lock), encoding="utf-8")
    for path in run.attempts.glob("*/attempt.json"):
        path.write_text(json.dumps(without(json.loads(path.read_text()), *LATER_ATTEMPT_ENTRIES)), encoding="utf-8")
    for path in run.states.glob(f"*/{MANIFEST}"):
        make_manifest_older(path)
    for _, _, path in list_ledger_files(run.ledger):
        file = read_ledger_file(path)
        header = dataclasses.replace(file.header, version=2)
        path.write_bytes(pack_header(header) + file.records.tobytes())
    if run.metrics.is_file():
        lines = [without(json.loads(line), *LATER_METRICS) for line in run.metrics.read_text().splitlines()]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Run(run.folder)


def make_manifest_older(path: Path) -> None:
    """A manifest of format 1, sealed anew."""
    body = without(json.loads(path.read_text(encoding="utf-8")), "digest")
    body |= {"format": 1, "extra": without(body["extra"], "bad_steps")}
    body["fingerprint"] = without(body["fingerprint"], *LATER_FINGERPRINT)
    path.write_text(json.dumps({**body, "digest": document_digest(body)}), encoding="utf-8")
