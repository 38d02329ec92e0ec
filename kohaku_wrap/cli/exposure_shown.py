"""How often tags of a run were trained, counted and shown: what `evaluate` and `status --tag` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kohaku_wrap.cli.options import open_run
from kohaku_wrap.cli.output import print_note, progress_bar

if TYPE_CHECKING:
    from kohaku_wrap.evaluation.exposure import Exposure


def find_exposure(name: str, step: int | None, site_file: Path | None, threads: int) -> Exposure:
    """The counts of a run, made now or before."""
    from kohaku_wrap.evaluation.exposure import measure_exposure
    from kohaku_wrap.metadata.parallel import usable_threads

    run = open_run(name, site_file)
    with progress_bar("captions", "captions") as report:
        found = measure_exposure(run, step, threads or usable_threads(), report)
    if found.not_kept:
        print_note(f"note: not kept for the next time ({found.not_kept})")
    return found


def describe_exposure(found: Exposure) -> dict[str, Any]:
    """What is true of all tags."""
    file = None if found.not_kept else found.file
    return {"run": found.run.folder, "optimizer_step": found.optimizer_step, **found.facts, "file": file}


def list_facts(found: Exposure) -> list[tuple[str, Any]]:
    """The same as rows; what is not known is among them."""
    facts, unknown = found.facts, found.facts["unknown"]
    rows: list[tuple[str, Any]] = [
        ("up to step", found.optimizer_step),
        ("captions trained", facts["images_trained"]),
        ("without tags", facts["captions_without_tags"]),
        ("different tags", facts["different_tags"]),
    ]
    if facts["captions_with_text"]:
        rows.append(("with a text", facts["captions_with_text"]))
    for before in facts["before"]:
        what = f"run {before['run']} up to step {before['optimizer_step']:,}"
        rows.append(("before it", f"{what}, {'counted' if before['counted'] else 'NOT counted: it is not at hand'}"))
    for name, count in unknown.items():
        if count:
            rows.append(("NOT counted", f"{count:,} {name.replace('_', ' ')}"))
    if not found.not_kept:
        rows.append(("kept in", found.file))
    return rows


def list_counts(title: str, rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Each tag's numbers in columns: how often it was trained, in how many images, and what would come to that."""
    lines = [(title, ("times", "images", "next epoch", "one repeat more"))]
    for row in rows:
        more = f"{row['next_epoch']:+,}", f"{row['one_more_repeat']:+,}"
        lines.append((row["tag"], (f"{row['trained']:,}", f"{row['images']:,}", *more)))
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    return [
        (name, "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        for name, cells in lines
    ]
