"""What there is to compute with."""

from __future__ import annotations

import pytest

from kohaku_wrap.sampling.devices import hides_gpus


@pytest.mark.parametrize(
    ("visible", "hidden"),
    [(None, False), ("", True), ("-1", True), (" -1 ", True), ("-1,0", True), ("0", False), ("1,-1", False)],
)
def test_hidden_gpus_are_none(visible: str | None, hidden: bool) -> None:
    assert hides_gpus(visible) == hidden
