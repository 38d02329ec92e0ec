"""All pictures of a sheet on one, or on several where they are many: rows and columns of its axes, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kohaku_wrap.errors import UsageError
from kohaku_wrap.files import atomic_write, match_names
from kohaku_wrap.sampling.expanding import PlacedCell
from kohaku_wrap.sampling.sheets import AXES
from kohaku_wrap.training.records.samples import CONTACT_SHEETS, name_contact_sheet

THUMB_PIXELS = 256
"""The longer side of a picture on the sheet, unless it is smaller itself or the sheet would be too large."""

MOST_PIXELS = 16_000
"""Of a side of a sheet: viewers show little more."""

MOST_LABELS = 225
"""Rows, and columns, of one sheet: so that its pictures have 64 pixels at least, and its labels all their lines."""

FONT_PIXELS = 13
LINE_PIXELS = FONT_PIXELS + 3
GAP = 6
LABEL_WIDTH = 200
LABEL_LINES = 4
PAPER, INK = "white", "black"

Label = tuple[str, ...]


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


def label_of(cell: PlacedCell, axes: Sequence[str]) -> Label:
    """What a cell is called on these axes."""
    return tuple(cell.labels[axis] for axis in axes)


def write_contact_sheets(
    out: Path, cells: Sequence[PlacedCell], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> list[Path]:
    """Write the contact sheet of drawn cells into their folder, and further ones where it does not hold all of them.

    Those of an earlier call are replaced; the first one is written last.
    """
    axes = choose_axes(cells, rows, columns)
    labels = [list(dict.fromkeys(label_of(cell, each) for cell in cells)) for each in axes]
    places = [{label: place for place, label in enumerate(each)} for each in labels]
    sheets: dict[tuple[int, ...], list[PlacedCell]] = {}
    for cell in cells:
        part = tuple(places[side][label_of(cell, axes[side])] // MOST_LABELS for side in range(2))
        sheets.setdefault(part, []).append(cell)
    files = [out / name_contact_sheet(number) for number in range(1, len(sheets) + 1)]
    for _, path in match_names(out, CONTACT_SHEETS):
        if path not in files:
            path.unlink()
    largest = max(max(cell.cell.width, cell.cell.height) for cell in cells)
    most = min(MOST_LABELS, max(map(len, labels)))
    side = min(THUMB_PIXELS, largest, (MOST_PIXELS - LABEL_WIDTH) // most - GAP)
    for path, (parts, own) in reversed(list(zip(files, sorted(sheets.items()), strict=True))):
        shown = [each[part * MOST_LABELS :][:MOST_LABELS] for each, part in zip(labels, parts, strict=True)]
        write_sheet(path, own, axes, shown, side)
    return files


def write_sheet(
    path: Path, cells: Sequence[PlacedCell], axes: Sequence[Sequence[str]], labels: Sequence[Sequence[Label]], side: int
) -> None:
    """Write one sheet; `axes`, `labels`: of rows and of columns; `side`: the longest of a picture, in pixels."""
    row_labels, column_labels = labels
    height_of_row = max(side, LABEL_LINES * LINE_PIXELS) + GAP
    left = LABEL_WIDTH if axes[0] else GAP
    top = GAP + LABEL_LINES * LINE_PIXELS if axes[1] else GAP
    font = ImageFont.load_default(FONT_PIXELS)
    xs = {label: left + number * (side + GAP) for number, label in enumerate(column_labels)}
    ys = {label: top + number * height_of_row for number, label in enumerate(row_labels)}
    sheet = Image.new("RGB", (left + len(xs) * (side + GAP), top + len(ys) * height_of_row), PAPER)
    pen = ImageDraw.Draw(sheet)
    for label, y in ys.items():
        write_label(pen, font, label, (GAP, y), left - 2 * GAP)
    for label, x in xs.items():
        write_label(pen, font, label, (x, GAP), side)
    for cell in cells:
        with Image.open(path.parent / cell.cell.name) as picture:
            small = picture.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (xs[label_of(cell, axes[1])], ys[label_of(cell, axes[0])]))
    with atomic_write(path, "wb") as stream:
        sheet.save(stream, "PNG")


def write_label(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, label: Label, place: tuple[int, int],
    width: int,
) -> None:  # fmt: skip
    """Write the parts of a label below each other, broken to the width; dots stand for more than LABEL_LINES lines."""
    lines = [line for part in label for line in break_text(pen, font, " ".join(part.split()), width)]
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], f"{lines[LABEL_LINES - 1][:-1]}…"]
    for number, text in enumerate(lines):
        pen.text((place[0], place[1] + number * LINE_PIXELS), text, fill=INK, font=font)


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
