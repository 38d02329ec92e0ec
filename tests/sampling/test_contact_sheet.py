"""Contact sheets: no side is longer than a viewer can show, and each picture is large enough to be looked at."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kohaku_wrap.sampling.cells import Cell
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.contact_sheet import MOST_LABELS, MOST_PIXELS, write_contact_sheets
from kohaku_wrap.sampling.expanding import PlacedCell
from kohaku_wrap.sampling.sheets import AXES

RED, BLUE = (255, 0, 0), (0, 0, 255)


def draw_cells(folder: Path, cell: Cell, prompts: int, seeds: int = 1) -> list[PlacedCell]:
    """Cells whose pictures are red and blue by turns of the prompt."""
    cells = []
    for number, seed in itertools.product(range(prompts), range(seeds)):
        own = replace(cell, prompt=f"{number}", seed=seed, width=64, height=64)
        Image.new("RGB", (64, 64), BLUE if number % 2 else RED).save(folder / own.name)
        labels = {**dict.fromkeys(AXES, "one"), "prompt": f"{number}: a prompt of more words than a line of it holds"}
        cells.append(PlacedCell(own, Model(Path("model.safetensors")), {**labels, "seed": f"seed {seed}"}))
    return cells


def test_hundreds_of_rows_are_on_one_sheet(tmp_path: Path, cell: Cell) -> None:
    cells = draw_cells(tmp_path, cell, MOST_LABELS)
    (path,) = write_contact_sheets(tmp_path, cells)
    with Image.open(path) as sheet:
        assert sheet.height <= MOST_PIXELS
        at = [sheet.getpixel((sheet.width - 12, int((row + 0.5) * sheet.height / MOST_LABELS))) for row in (0, 1, 224)]
    assert at == [RED, BLUE, RED]


@pytest.mark.parametrize(("prompts", "seeds", "sheets"), [(MOST_LABELS + 2, 1, 2), (2, 2 * MOST_LABELS + 1, 3)])
def test_more_rows_or_columns_go_on_in_further_sheets(
    tmp_path: Path, cell: Cell, prompts: int, seeds: int, sheets: int
) -> None:
    cells = draw_cells(tmp_path, cell, prompts, seeds)
    written = write_contact_sheets(tmp_path, cells)
    assert [path.name for path in written] == [
        "contact-sheet.png", *(f"contact-sheet-{number}.png" for number in range(2, sheets + 1))
    ]  # fmt: skip
    seen = 0
    for path in written:
        with Image.open(path) as sheet:
            assert max(sheet.size) <= MOST_PIXELS
            colours = sheet.getcolors(1 << 24) or []
        seen += sum(count for count, colour in colours if colour in (RED, BLUE))
    assert seen == prompts * seeds * 64 * 64
    # The sheets of an earlier call with more pictures are none of this one.
    assert write_contact_sheets(tmp_path, cells[:1]) == written[:1]
    assert not any(path.exists() for path in written[1:])
