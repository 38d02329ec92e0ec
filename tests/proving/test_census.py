"""The option census finds rows that say otherwise than what is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_wrap.config.fates import FATES_FILE, Fate, load_fates
from kohaku_wrap.proving.census import main, set_other, try_refused, what_it_needs
from kohaku_wrap.proving.census_bench import CensusBench


@pytest.fixture
def bench(tmp_path: Path) -> CensusBench:
    """One that trains nothing."""
    return CensusBench(tmp_path, 0)


def test_every_refused_row_is_refused_by_template_check(bench: CensusBench) -> None:
    refused = {row: fate for row, fate in load_fates().items() if fate.kind == "refused"}
    assert len(refused) > 50
    assert [seen.line() for row, fate in refused.items() if (seen := try_refused(bench, row, fate)).is_wrong] == []


def test_a_row_that_says_refused_of_what_is_trained_is_wrong(bench: CensusBench) -> None:
    seen = try_refused(bench, ("option", "min_snr_gamma"), Fate("refused", reason="does nothing", other=5.0))
    assert seen.is_wrong
    assert seen.detail == "template check does not refuse it"


def test_a_row_with_another_reason_is_wrong(bench: CensusBench) -> None:
    seen = try_refused(bench, ("option", "masked_loss"), Fate("refused", reason="is slow", other=True))
    assert seen.is_wrong
    assert seen.detail.endswith("has no effect: the images of kwrap have no masks")


def test_a_row_brings_what_it_needs() -> None:
    row = ("option", "multires_noise_discount")
    assert what_it_needs(row, load_fates()[row]) == {"multires_noise_iterations": 4}
    row = ("preset", "map.factor")
    assert what_it_needs(row, load_fates()[row]) == {"map.algo": "lokr"}
    row = ("option", "lr_scheduler_args")
    assert set_other(row, load_fates()[row]) == {"lr_scheduler_args.num_cycles": 2.5}


@pytest.mark.slow
@pytest.mark.sd_scripts
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("use_trainer")
def test_a_planted_row_makes_the_census_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = FATES_FILE.read_text(encoding="utf-8")
    right = 'min_snr_gamma = {fate = "weights"'
    assert right in table
    planted = tmp_path / "planted.toml"
    planted.write_text(table.replace(right, 'min_snr_gamma = {fate = "files"'), encoding="utf-8")
    asked = ["--folder", str(tmp_path / "census"), "--processes", "1", "--row", "option.min_snr_gamma"]
    assert main([*asked, "--fates", str(planted)]) == 1
    assert "WRONG: 0.5 changes network and ledger" in capsys.readouterr().out
    assert main(asked) == 0
