"""What `kwrap verify --deep` asks its helper processes for, and what it says of their answers.

The answers are made here; tests/training/engines recomputes and encodes real images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_runs import write_captions
from written_ledgers import set_record, write_life

from kohaku_wrap.processes import NoAnswer
from kohaku_wrap.training.records.attempts import Attempt, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import SUBSTITUTE
from kohaku_wrap.training.verifying import deep_checks
from kohaku_wrap.training.verifying.deep_checks import (
    TOLERANCE,
    CannotRecompute,
    check_caches,
    choose_samples,
)
from kohaku_wrap.training.verifying.line_checks import Check
from kohaku_wrap.training.verifying.verify import verify_run
from kohaku_wrap.training.verifying.verify_report import VerifyReport

NewRun = Callable[..., Run]


def check_of(report: VerifyReport, name: str) -> tuple[bool, str]:
    found = {check.name: check for check in report.checks}[name]
    return found.is_looked_at, found.detail


def test_what_is_recomputed_is_held_against_the_records(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12, set_record(3, flags=SUBSTITUTE))
    asked: list[list[int]] = []
    wrong: dict[int, int | str] = {}

    def answer(module: str, *words: Path, request: list[list[int]], **settings: Any) -> list[int | str]:
        asked[:] = request
        places = [epoch * run.lock.count.positions_per_epoch + position for epoch, position, _ in request]
        return [wrong.get(place, place * 17) for place in places]

    monkeypatch.setattr(deep_checks, "ask_python", answer)
    report = verify_run(run, deep_samples=1000)
    assert report.is_proved and report.deep_samples == report.records == len(asked)
    assert [(epoch, position) for epoch, position, substituted in asked if substituted] == [(0, 3)]
    wrong |= {7: "its image is gone", 30: "another is gone"}
    report = verify_run(run, deep_samples=1000)
    assert report.is_proved and report.deep_samples == report.records - 2
    deep = {check.name: check for check in report.checks}["deep"]
    assert not deep.is_looked_at and deep.detail == "2 of 48 micro-batches not possible: its image is gone"
    wrong[9] = 1
    report = verify_run(run, deep_samples=1000)
    assert [(fault.kind, fault.optimizer_step, fault.position) for fault in report.faults] == [("deep", 3, 9)]
    chosen = [list(each) for each in asked]
    verify_run(run, deep_samples=5)
    first = list(asked)
    verify_run(run, deep_samples=5)
    assert len(first) == 5 and first == asked and all(each in chosen for each in first)


def test_without_deep_nothing_is_said_of_it(new_run: NewRun) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12)
    report = verify_run(run)
    assert report.deep_samples == 0 and "deep" not in {check.name for check in report.checks}
    assert check_of(report, "losses") == (True, "no position was trained twice")


def test_samples_are_spread_over_the_run_and_drawn_alike() -> None:
    chosen = choose_samples(np.arange(1000, 2000), 100)
    assert np.array_equal(chosen, np.sort(chosen)) and len(set(chosen.tolist())) == 100
    assert np.array_equal(chosen, choose_samples(np.arange(1000, 2000), 100))
    assert set(choose_samples(np.arange(1000, 2000), 10).tolist()) <= set(chosen.tolist()), "more samples, none other"
    assert 5 <= (chosen < 1100).sum() <= 20 and 5 <= (chosen >= 1900).sum() <= 20
    assert choose_samples(np.array([7, 3]), 2).tolist() == [3, 7]


def test_samples_are_recomputed_on_the_cpu_in_the_runs_folder(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    write_life(run, 1, 1, 0, 12)
    asked: list[tuple[Any, ...]] = []

    def answer(module: str, *words: Path, request: list[list[int]], added: dict[str, str], folder: Path) -> list[int]:
        asked.append((module, words, folder, added))
        raise NoAnswer("the images are gone")

    monkeypatch.setattr(deep_checks, "ask_python", answer)
    with pytest.raises(CannotRecompute, match="the samples cannot be recomputed: the images are gone"):
        verify_run(run, deep_samples=2)
    [(module, words, folder, added)] = asked
    assert module == "kohaku_wrap.training.engines.recompute"
    assert (words, folder) == ((run.folder, run.find_images()), run.folder)
    assert added == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_what_cannot_be_recomputed_is_said(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_checks, "ask_python", lambda *words, **settings: pytest.fail("nothing is to be asked"))
    own = new_run("own", run={"data": "sd-scripts"})
    write_life(own, 1, 1, 0, 12)
    report = verify_run(own, deep_samples=1)
    assert check_of(report, "deep") == (False, 'not possible with data = "sd-scripts"') and report.deep_samples == 0
    run = new_run()
    write_life(run, 1, 1, 0, 12)
    write_captions(run.folder.parent.parent / "images", 44)
    report = verify_run(run, deep_samples=1)
    assert check_of(report, "deep") == (False, "not possible: the captions were changed after the run")
    assert report.is_proved and report.deep_samples == 0


class Encoding:
    """Answers as the process does that encodes images again."""

    def __init__(self, difference: float | NoAnswer) -> None:
        self.difference = difference
        self.asked: list[dict[str, Any]] = []

    def __call__(self, module: str, *words: Path, **asked: Any) -> dict[str, float]:
        self.asked.append({"module": module, "words": words, **asked})
        if isinstance(self.difference, NoAnswer):
            raise self.difference
        return {"difference": self.difference, "image": 10}


def cached_run(
    new_run: NewRun, name: str = "r", gpus: int = 0, threads: tuple[int | None, ...] = (2,), **trainer: str
) -> Run:
    """A run of as many attempts as `threads` has numbers, which says that it trained from cached latents."""
    run = new_run(name, cache={"latents": True}, machine={"gpus": gpus})
    for number, each in enumerate(threads, 1):
        environment = {"OMP_NUM_THREADS": str(each)} if each else {}
        write_attempt(Attempt(run, number, 1, run.lock.group, 0, 0, None), environment)
    lines = "".join(f'{name} = "{value}"\n' for name, value in trainer.items())
    run.trainer_config.write_text(f'[training]\npretrained_model_name_or_path = "base.safetensors"\n{lines}')
    return run


def test_latents_are_encoded_again_as_they_were(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cached_run(new_run, threads=(2, 3, None), vae="other.safetensors")
    encoding = Encoding(0.0)
    monkeypatch.setattr(deep_checks, "ask_python", encoding)
    said = "5 images encoded again, bit for bit the same"
    assert check_caches(run, 5) == ([Check("latents", True, said)], [])
    [asked] = encoding.asked
    assert asked["module"] == "kohaku_wrap.training.engines.encode_latents"
    assert asked["words"] == (run.folder, run.find_images()) and asked["folder"] == run.folder
    assert asked["added"] == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    ids = asked["request"].pop("ids")
    assert len(set(ids)) == 5 and set(ids) <= {7 * each + 3 for each in range(45)}
    assert asked["request"] == {
        "kind": "latents",
        "engine": "builtin",
        "base_model": "base.safetensors",
        "vae": "other.safetensors",
        "tokenizers": None,
        "latents": None,
    }
    [check], _ = check_caches(run, 1000)
    assert check.detail.startswith("45 images"), "there are no more"
    assert encoding.asked[1]["request"]["ids"] == [7 * each + 3 for each in range(45)]


def test_latents_of_a_run_on_a_gpu_are_encoded_on_one(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = Encoding(0.0)
    monkeypatch.setattr(deep_checks, "ask_python", encoding)
    check_caches(cached_run(new_run, gpus=1, threads=(None,)), 1)
    check_caches(cached_run(new_run, "of-no-attempt", threads=()), 1)
    assert [asked["added"] for asked in encoding.asked] == [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    ]
    assert encoding.asked[0]["request"]["vae"] is None


@pytest.mark.parametrize(
    ("difference", "is_changed"), [(1e-6, False), (TOLERANCE, False), (0.0501, True), (float("inf"), True)]
)
def test_latents_that_are_far_from_what_they_were_are_told(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, difference: float, is_changed: bool
) -> None:
    monkeypatch.setattr(deep_checks, "ask_python", Encoding(difference))
    said = f"4 images encoded again, the largest difference {difference:.3g}"
    checks, changed = check_caches(cached_run(new_run), 4)
    assert checks == [Check("latents", True, said)]
    assert changed == ([f"latents: {said}, of image 10"] if is_changed else [])


def test_latents_that_cannot_be_encoded_again_are_said(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cached_run(new_run)
    monkeypatch.setattr(deep_checks, "ask_python", Encoding(NoAnswer("the VAE is gone", "Bring it back.")))
    assert check_caches(run, 4) == ([Check("latents", False, "not possible: the VAE is gone")], [])
    run.trainer_config.write_text("[training]\n")
    [check], changed = check_caches(run, 4)
    assert not check.is_looked_at and not changed


def test_nothing_is_said_of_latents_without_deep_or_without_any(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_checks, "ask_python", lambda *words, **settings: pytest.fail("nothing is to be asked"))
    assert check_caches(cached_run(new_run), 0) == ([], [])
    assert check_caches(new_run("plain"), 3) == ([], [])
