"""The contact sheet: no side is longer than a viewer can show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from kohaku_wrap.sampling.cells import Cell
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.contact_sheet import MOST_PIXELS, write_contact_sheet
from kohaku_wrap.sampling.expanding import PlacedCell
from kohaku_wrap.sampling.sheets import AXES


def test_hundreds_of_rows_are_lower_ones(tmp_path: Path, cell: Cell) -> None:
    colours = {"1girl": "red", "hat": "blue"}
    cells = []
    for number in range(700):
        own = replace(cell, prompt=f"{number}", width=64, height=64)
        Image.new("RGB", (64, 64), colours["hat" if number % 2 else "1girl"]).save(tmp_path / own.name)
        labels = {**dict.fromkeys(AXES, "one"), "prompt": f"{number}: a prompt of more words than a line of it holds"}
        cells.append(PlacedCell(own, Model(Path("model.safetensors")), labels))
    with Image.open(write_contact_sheet(tmp_path, cells)) as sheet:
        assert sheet.height <= MOST_PIXELS
        at = [sheet.getpixel((sheet.width - 12, int((number + 0.5) * sheet.height / 700))) for number in (0, 1, 699)]
    assert at == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
