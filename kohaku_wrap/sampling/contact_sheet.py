"""All pictures of a sheet on one: rows and columns of its axes, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kohaku_wrap.errors import UsageError
from kohaku_wrap.files import atomic_write
from kohaku_wrap.sampling.expanding import PlacedCell
from kohaku_wrap.sampling.sheets import AXES
from kohaku_wrap.training.records.samples import CONTACT_SHEET

THUMB_PIXELS = 256
"""The longer side of a picture on the sheet, unless it is smaller itself or the sheet would be too large."""

MOST_PIXELS = 16_000
"""Of a side of the sheet, up to some seven hundred rows: a row is never lower than a line of its label."""

FONT_PIXELS = 13
GAP = 6
LABEL_WIDTH = 200
LABEL_LINES = 4
PAPER, INK = "white", "black"


def choose_axes(
    cells: Sequence[PlacedCell], rows: Sequence[str], columns: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The axes of rows and columns: as asked for, and every other one that has several values where it is shorter.

    Raises UsageError for an axis that stands twice.
    """
    if twice := sorted({axis for axis in (*rows, *columns) if [*rows, *columns].count(axis) > 1}):
        raise UsageError(f"{twice[0]} is named twice in rows and columns", f"Name each of {', '.join(AXES)} once.")
    several = [axis for axis in AXES if len({cell.labels[axis] for cell in cells}) > 1]
    left = [axis for axis in several if axis not in (*rows, *columns)]
    chosen_rows, chosen_columns = list(rows), list(columns)
    for axis in left:
        wide = axis in ("model", "seed", "guidance", "size") if not (rows or columns) else not columns or bool(rows)
        (chosen_columns if wide else chosen_rows).append(axis)
    return chosen_rows, chosen_columns


def label_of(cell: PlacedCell, axes: Sequence[str]) -> tuple[str, ...]:
    """What a cell is called on these axes."""
    return tuple(cell.labels[axis] for axis in axes)


def write_contact_sheet(
    out: Path, cells: Sequence[PlacedCell], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Path:
    """Write the contact sheet of drawn cells into their folder."""
    row_axes, column_axes = choose_axes(cells, rows, columns)
    row_labels = list(dict.fromkeys(label_of(cell, row_axes) for cell in cells))
    column_labels = list(dict.fromkeys(label_of(cell, column_axes) for cell in cells))
    largest = max(max(cell.cell.width, cell.cell.height) for cell in cells)
    most = max(len(row_labels), len(column_labels))
    side = max(16, min(THUMB_PIXELS, largest, (MOST_PIXELS - LABEL_WIDTH) // most - GAP))
    font = ImageFont.load_default(FONT_PIXELS)
    line = FONT_PIXELS + 3
    room = (MOST_PIXELS - LABEL_WIDTH) // len(row_labels) - GAP
    step = max(side, min(LABEL_LINES * line, room)) + GAP
    left = LABEL_WIDTH if any(row_labels[0]) or len(row_labels) > 1 else GAP
    top = GAP + LABEL_LINES * line if any(column_labels[0]) or len(column_labels) > 1 else GAP
    width, height = left + len(column_labels) * (side + GAP), top + len(row_labels) * step
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, label in enumerate(row_labels):
        write_label(pen, font, label, (GAP, top + number * step), left - 2 * GAP, min(LABEL_LINES, step // line))
    for number, label in enumerate(column_labels):
        write_label(pen, font, label, (left + number * (side + GAP), GAP), side)
    for cell in cells:
        x = left + column_labels.index(label_of(cell, column_axes)) * (side + GAP)
        y = top + row_labels.index(label_of(cell, row_axes)) * step
        with Image.open(out / cell.cell.name) as picture:
            small = picture.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (x, y))
    path = out / CONTACT_SHEET
    with atomic_write(path, "wb") as stream:
        sheet.save(stream, "PNG")
    return path


def write_label(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, label: Sequence[str],
    place: tuple[int, int], width: int, most: int = LABEL_LINES,
) -> None:  # fmt: skip
    """Write the parts of a label below each other, broken to the width, in `most` lines; the rest is three dots."""
    lines: list[str] = []
    for part in label:
        lines += break_text(pen, font, " ".join(part.split()), width)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]
    for number, text in enumerate(lines):
        pen.text((place[0], place[1] + number * (FONT_PIXELS + 3)), text, fill=INK, font=font)


def break_text(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int
) -> list[str]:
    """Lines that are not wider than `width`, broken between characters where a word is."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if pen.textlength(joined, font=font) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for sign in word:
            if lines[-1] and pen.textlength(lines[-1] + sign, font=font) > width:
                lines.append("")
            lines[-1] += sign
    return lines
