"""Which cases `make prove` has."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_wrap.proving.killing import Kill
from kohaku_wrap.proving.prove import choose_cases, read_case
from kohaku_wrap.trainer.commits import SUPPORTED, SupportedCommit, write_proof


def test_a_case_is_read_by_the_fields_of_its_classes() -> None:
    case = read_case({"name": "a", "says": "b", "kills": [{"epochs": 0.5}], "workers": [0, 2], "processes": 2,
                      "both": ["c=1"], "longer": {"2": ["--epochs", "1"]}})  # fmt: skip
    assert case.kills == (Kill(0.5),) and case.workers == (0, 2) and case.longer == {2: ("--epochs", "1")}
    assert (case.configuration.processes, case.configuration.both) == (2, ("c=1",))
    with pytest.raises(TypeError, match="killz"):
        read_case({"name": "a", "says": "b", "kills": [], "killz": 1})


def test_every_installed_commit_has_a_case_one_proved_on_this_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KWRAP_HOME", str(tmp_path))
    proved = SupportedCommit("v9", "9" * 40, "0" * 64)
    write_proof(proved, {})
    for commit in (SUPPORTED[0].commit, SUPPORTED[1].commit, proved.commit):
        (tmp_path / "trainer" / commit).mkdir(parents=True)
        (tmp_path / "trainer" / commit / "sdxl_train_network.py").touch()
    names = [case.name for case in choose_cases("sd-scripts", None)]
    assert {f"commit-{SUPPORTED[1].name}", "commit-v9"} <= set(names)
