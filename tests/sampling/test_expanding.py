"""A sheet and its models made into cells."""

from __future__ import annotations

from pathlib import Path

from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.expanding import name_models


def test_models_of_one_name_stay_apart_on_the_sheet() -> None:
    one, *alike = [Model(Path(place) / "last.safetensors") for place in ("a", "r1/out", "r2/out", "r3/out")]
    other = Model(Path("a/other.safetensors"))
    assert name_models([other, one, one]) == {other: "other", one: "last"}
    assert list(name_models([one, *alike]).values()) == ["a/last", "out/last", "out/last (2)", "out/last (3)"]
