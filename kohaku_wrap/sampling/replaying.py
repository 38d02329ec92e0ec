"""The command that draws a picture again, and where the files lie that it was drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kohaku_wrap.errors import command_line
from kohaku_wrap.file_hashes import find_by_hash
from kohaku_wrap.sampling.pictures import VAE, Record, compose_parameters, describe_record
from kohaku_wrap.training.records.samples import read_sheet_record

SAID_BY_FILE = ("its key", "modelspec")
"""How the source of a prediction begins that the checkpoint itself gives again."""

AGAIN = "again"
"""The folder that the command draws into."""


def find_file(sha256: str, name: str, known: dict[str, Any]) -> tuple[str, bool]:
    """The path of a file by its hash, and whether it was found: by the sheet's record or the kept hashes.

    Where neither knows it, its bare name.
    """
    listed = known.get(sha256)
    if isinstance(listed, str) and Path(listed).is_file():
        return listed, True
    kept = find_by_hash(sha256)
    return str(kept or name), kept is not None


def compose_command(picture: Path, record: Record) -> tuple[str, list[str]]:
    """The command, quoted for the shell, and the names of the files that are not known here."""
    cell, held = record.cell, read_sheet_record(picture.parent)
    paths, lost = [], []
    for each in record.files:
        path, is_found = find_file(each.sha256, each.name, held.get("files", {}))
        paths.append(path)
        lost += [] if is_found else [f"{each.name} (sha256 {each.sha256[:10]}…)"]
    words: list[object] = ["sample", paths[0]]
    for path, each in zip(paths[1:], record.files[1:], strict=True):
        words += ["--vae", path] if each.part == VAE else ["--network", f"{path}:{each.weight}"]
    words += [f"--prompt={cell.prompt}", *([f"--negative={cell.negative}"] if cell.negative else [])]
    words += ["--seed", cell.seed, "--size", f"{cell.width}x{cell.height}", "--guidance", repr(cell.guidance)]
    words += ["--sampler", cell.sampler, "--schedule", cell.schedule, "--sampler-steps", cell.steps]
    words += ["--clip-skip", cell.clip_skip, "--emphasis", cell.emphasis]
    if record.prediction_from and not record.prediction_from.startswith(SAID_BY_FILE):
        words += ["--prediction", cell.prediction]
    words += ["--zero-terminal-snr"] if cell.zero_terminal_snr else []
    words += ["--hires", f"{cell.hires.scale!r}:{cell.hires.strength!r}"] if cell.hires else []
    words += ["--lenient"] if cell.lenient else []
    compute = cell.compute
    words += ["--device", compute.device, "--dtype", compute.dtype, "--vae-dtype", compute.vae_dtype]
    words += ["--batch", compute.batch, "--threads", compute.threads]
    folders = held.get("tokenizers", {}).get(cell.tokenizers)
    if isinstance(folders, list) and folders:
        words += ["--tokenizers", common_folder([Path(str(folder)) for folder in folders])]
    return command_line(*words, "--out", AGAIN), lost


def common_folder(folders: list[Path]) -> Path:
    """The folder to name for both tokenizers: their own where it is one, else the one above."""
    return folders[0] if len(set(folders)) == 1 else folders[0].parent


def describe_picture(picture: Path, record: Record, pixels: str) -> dict[str, Any]:
    """What `kwrap inspect` tells of a picture, as JSON."""
    command, lost = compose_command(picture, record)
    return {
        "file": str(picture),
        "kind": "picture of kwrap",
        **describe_record(record),
        "pixels_sha256": pixels,
        "pixels_as_drawn": pixels == record.pixels_sha256,
        "parameters": compose_parameters(record),
        "replay": command,
        "unknown_files": lost,
    }  # fmt: skip
