"""The page of a grid: what the scores say of each merge in all, however many characters were scored."""

from __future__ import annotations

import json
from pathlib import Path

from kohaku_wrap.reporting.grid import GridPoint, write_grid_page


def write_point(folder: Path, value: str, mean: float) -> GridPoint:
    own = folder / f"A{value}"
    own.mkdir()
    scores = {f"character {number}": {"score": mean, "upper_bound": 1.0, "seen": None} for number in range(300)}
    model = {"title": own.name, "characters": 300, "score": {"mean": mean, "low": 0.1, "high": 0.9}, "scores": scores}
    document = {"format": 1, "measure": "ccip", "models": [model], "pairs": []}
    (own / "ccip.json").write_text(json.dumps(document), encoding="utf-8")
    return GridPoint(own.name, {"A": value}, "kwrap merge", own / "pictures", (own / "ccip.json",), True)


def test_scores_of_single_characters_are_no_columns(tmp_path: Path) -> None:
    points = [write_point(tmp_path, value, mean) for value, mean in (("0.5", 0.25), ("1", 0.75))]
    write_grid_page("a + A*(b - a)", points, tmp_path / "grid.html", 0)
    page = (tmp_path / "grid.html").read_text(encoding="utf-8")
    assert '<td data-sort="0.25">' in page and '<td data-sort="0.75">' in page
    assert "ccip: score: mean" in page and "character 7" not in page
