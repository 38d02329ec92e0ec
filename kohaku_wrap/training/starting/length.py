"""The length of a run in its files: what `kwrap extend` wrote into the lock, brought to all that reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from kohaku_wrap.config.reading import LENGTHS
from kohaku_wrap.files import read_regular, write_text
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import STEP_ENDING, note_new_name, shorter_end


def settle_length(run: Run, abandons: Collection[Path]) -> None:
    """Give trainer.toml the length of the lock, and the network of a shorter run the name of its step.

    `kwrap extend` writes the lock alone, so that a crash after it loses nothing. `abandons`: networks that move away.
    """
    chapters = run.lock.chapters
    if len(chapters) < 2:
        return
    text = read_regular(run.trainer_config)
    if (longer := with_length(text, chapters[-1].length)) != text:
        write_text(run.trainer_config, longer)
    if step := shorter_end(run):
        for path in run.networks:
            if path not in abandons:
                name = f"{path.stem}{STEP_ENDING.format(step)}{path.suffix}"
                note_new_name(list_attempts(run)[-1], path.name, name)
                path.replace(path.with_name(name))


def with_length(text: str, length: Mapping[str, int]) -> str:
    """The text of trainer.toml with these options of length and no others; the same text where it has them."""
    document = parse_toml(text)
    tables = [document, *(table for table in document.values() if isinstance(table, dict))]
    home = next((table for table in tables if any(name in table for name in LENGTHS)), document)
    there = {name: table.pop(name) for table in tables for name in LENGTHS if name in table}
    if there == dict(length):
        return text
    home.update(length)
    return toml_text(document)
