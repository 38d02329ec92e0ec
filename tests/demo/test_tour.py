"""What the tour says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_wrap.demo.tour import print_next


def test_the_way_to_the_command_is_told_where_it_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    print_next(Path("my demo/runs/epsilon"), demo=True)
    first, way, *_ = capsys.readouterr().out.splitlines()
    assert first == "Next: kwrap status 'my demo/runs/epsilon'"
    assert ". .venv/bin/activate" in way
    (tmp_path / "kwrap").touch(0o755)
    print_next(Path("runs/epsilon"), demo=False)
    assert capsys.readouterr().out == "Next: kwrap status runs/epsilon\n"
