"""A run's kernels are chosen once, stand in its lock, and hold for every attempt whatever the shell says later."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_runs import write_base_model, write_captions

from kohaku_wrap.config.kernels import SWITCHES, choose_kernels, dropped_variables, list_other_switches
from kohaku_wrap.errors import UsageError
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.documents import read_json_files
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.create import create_run, plan_new_run
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume

VARIABLES = ("LYCORIS_KERNEL_BACKEND", "LYCORIS_KERNEL_TUNE", "LYCORIS_KERNEL_CACHE_DIR", "KWRAP_DETERMINISTIC")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *SWITCHES):
        monkeypatch.delenv(name, raising=False)


def new_run(folder: Path, gpus: int) -> Run:
    write_captions(folder / "images", 30)
    write_base_model(folder / "model.safetensors")
    (folder / "tokenizers").mkdir()
    site = folder / "site.toml"
    site.write_text(
        '[paths]\nimages = "images"\nbase_model = "model.safetensors"\ntokenizers = "tokenizers"\n'
        f'[machine]\nengine = "builtin"\ngpus = {gpus}\nbatch_per_gpu = 2\n'
    )
    return create_run(plan_new_run("demo", site, "r", overrides=["effective_batch=4"]), ["kwrap"])


def environment_of(run: Run, number: int) -> dict[str, str]:
    folder = list_attempts(run)[number - 1].folder
    environment: dict[str, str] = read_json_files(folder, "attempt.json")[0]["environment"]
    return {name: environment[name] for name in VARIABLES}


@pytest.mark.parametrize("gpus", [0, 1])
def test_every_attempt_keeps_the_kernels_of_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    run = new_run(tmp_path, gpus)
    assert run.lock.tables["kernels"] == {
        "lycoris_backend": "torch",
        "lycoris_tuning": False,
        "deterministic": gpus == 0,
        "switches": {},
    }
    begin_attempt(plan_resume(run))
    for name, value in zip(VARIABLES, ("triton", "on", str(tmp_path / "elsewhere"), str(gpus)), strict=True):
        monkeypatch.setenv(name, value)
    _, launch = begin_attempt(plan_resume(run))
    told = environment_of(run, 2)
    assert told == environment_of(run, 1)
    assert told == {
        "LYCORIS_KERNEL_BACKEND": "torch",
        "LYCORIS_KERNEL_TUNE": "off",
        "LYCORIS_KERNEL_CACHE_DIR": str(run.folder / "kernels"),
        "KWRAP_DETERMINISTIC": "1" if gpus == 0 else "0",
    }
    assert told.items() <= launch.environment.items(), "kwrap's settings win over the caller's variables"


def test_the_caller_chooses_when_the_run_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "Triton")
    monkeypatch.setenv("KWRAP_DETERMINISTIC", "1")
    run = new_run(tmp_path, 1)
    monkeypatch.delenv("LYCORIS_KERNEL_BACKEND")
    monkeypatch.delenv("KWRAP_DETERMINISTIC")
    begin_attempt(plan_resume(run))
    told = environment_of(run, 1)
    assert (told["LYCORIS_KERNEL_BACKEND"], told["KWRAP_DETERMINISTIC"]) == ("triton", "1")
    assert choose_kernels(on_cpu=True)["lycoris_backend"] == "torch"


@pytest.mark.parametrize(
    ("name", "value"),
    [("LYCORIS_KERNEL_BACKEND", "auto"), ("LYCORIS_KERNEL_BACKEND", "tritn"), ("KWRAP_DETERMINISTIC", "yes")],
)
def test_what_would_leave_the_choice_open_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name}={value}"):
        choose_kernels(on_cpu=False)


def test_switches_of_the_shell_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("OMP_DYNAMIC", "")
    run = new_run(tmp_path, 1)
    assert run.lock.table("kernels")["switches"] == {"NVIDIA_TF32_OVERRIDE": "0", "OMP_DYNAMIC": ""}
    assert plan_resume(run).notes == ()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.delenv("OMP_DYNAMIC")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("KEPT", "yes")
    plan = plan_resume(run)
    kept = "when the run was made: the run keeps it as it was"
    assert plan.notes == (
        f"NVIDIA_TF32_OVERRIDE is 1 here and was 0 {kept}",
        f"CUBLAS_WORKSPACE_CONFIG is :16:8 here and was not set {kept}",
        f"OMP_DYNAMIC is not set here and was empty {kept}",
    )
    attempt, launch = begin_attempt(plan)
    environment = launch.full_environment()
    assert environment["NVIDIA_TF32_OVERRIDE"] == "0" and environment["OMP_DYNAMIC"] == ""
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment and environment["KEPT"] == "yes"
    assert " env -u CUBLAS_WORKSPACE_CONFIG " in launch.text()
    recorded = read_json_files(attempt.folder, "attempt.json")[0]["environment"]
    assert recorded["NVIDIA_TF32_OVERRIDE"] == "0", "what the attempt got is in its record too"


def test_a_run_that_recorded_no_switches_takes_those_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    before = {"lycoris_backend": "torch", "lycoris_tuning": False, "deterministic": False}
    assert not dropped_variables(before) and not dropped_variables({}) and not list_other_switches(before)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert list_other_switches(before) == [
        "MKL_CBWR=AVX2 is set here and can change bits; whether it was when the run was made is not recorded"
    ]
    assert len(set(SWITCHES)) == len(SWITCHES) == len(dropped_variables({**before, "switches": {}}))


def test_threads_stay_those_of_the_attempt_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run = new_run(tmp_path, 1)
    assert begin_attempt(plan_resume(run))[1].environment["OMP_NUM_THREADS"] == "3"
    assert plan_resume(run).notes == ()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    plan = plan_resume(run)
    assert plan.notes == ("OMP_NUM_THREADS is 5 here and was 3 in the attempt before: the run keeps it as it was",)
    assert begin_attempt(plan)[1].environment["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert plan_resume(run).notes == ()


def test_a_choice_that_has_no_effect_any_more_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides when a run is made, and not between two attempts."""
    kernels = {"lycoris_backend": "torch", "lycoris_tuning": False, "deterministic": False, "switches": {}}
    monkeypatch.setenv("KWRAP_DETERMINISTIC", "1")
    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "triton")
    assert [note for note in list_other_switches(kernels) if "the run keeps" in note and "as it was made" in note] == [
        "LYCORIS_KERNEL_BACKEND is triton here: the run keeps torch, as it was made",
        "KWRAP_DETERMINISTIC is 1 here: the run keeps 0, as it was made",
    ]
    monkeypatch.setenv("KWRAP_DETERMINISTIC", "0")
    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "Torch")
    assert not [note for note in list_other_switches(kernels) if "as it was made" in note]
