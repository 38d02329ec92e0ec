"""`kwrap doctor`: what it refuses, and what it really tries."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kohaku_wrap.cli.doctor import command
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import Site
from kohaku_wrap.planning import doctor
from kohaku_wrap.planning.doctor import (
    examine_bitsandbytes,
    examine_builtin_options,
    examine_files,
    examine_versions,
    parse_release,
)
from kohaku_wrap.planning.doctor_torch import (
    count_processes,
    find_reason,
    judge_gpus,
    judge_optimizer,
    judge_processes,
    judge_tokenizers,
    judge_vae,
)

MakeSite = Callable[..., Site]


@pytest.mark.parametrize("version", ["0.36.0", "0.37.2", "0.39.1", "0.41.0", "0.41.0.post2"])
def test_wrong_bitsandbytes_is_refused(version: str) -> None:
    finding = examine_bitsandbytes(version)
    assert finding.status == "broken"
    assert finding.why and "pip install bitsandbytes==" in finding.do


@pytest.mark.parametrize("version", ["0.35.4", "0.41.1", "0.41.3.post2", "0.50.2", ""])
def test_other_bitsandbytes_are_not(version: str) -> None:
    assert examine_bitsandbytes(version).status == "ok"


def test_releases_are_compared_as_numbers() -> None:
    assert parse_release("0.9.0") < parse_release("0.36.0") < parse_release("0.100")
    assert parse_release("0.41.0.post2") == (0, 41, 0)


def test_untested_versions_warn_and_name_the_tested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**doctor.TESTED_SETS[0], **doctor.TESTED_ALONE}
    monkeypatch.setattr(doctor, "find_version", lambda name: found.get(name, ""))
    assert {finding.status for finding in examine_versions()} == {"ok"}
    found["transformers"] = "4.57.5"
    [_, packages] = examine_versions()
    assert packages.status == "warning"
    assert "transformers 4.57.6" in packages.do
    del found["transformers"]
    [_, packages] = examine_versions()
    assert packages.status == "broken"
    assert "transformers" in packages.what


def test_the_second_set_is_tested_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**doctor.TESTED_SETS[1], **doctor.TESTED_ALONE}
    assert found["transformers"].startswith("5.")
    monkeypatch.setattr(doctor, "find_version", lambda name: found.get(name, ""))
    monkeypatch.setattr(doctor, "find_set", lambda: "transformers-5")
    assert {finding.status for finding in examine_versions()} == {"ok"}
    found["diffusers"] = doctor.TESTED_SETS[0]["diffusers"]
    [_, packages] = examine_versions()
    assert packages.status == "warning"
    assert f"diffusers {doctor.TESTED_SETS[1]['diffusers']}" in packages.do
    assert "`make setup SET=transformers-5`" in packages.do


def test_an_optimizer_that_does_not_step_is_broken() -> None:
    facts = {"optimizer": "Lion8bit", "version": "0.50.2", "device": "cpu", "state_dtype": "torch.uint8"}
    assert judge_optimizer({**facts, "finite": True, "moved_share": 1.0}).status == "ok"
    assert judge_optimizer({**facts, "finite": True, "moved_share": 0.5}).status == "broken"
    assert judge_optimizer({**facts, "finite": False, "moved_share": 1.0}).status == "broken"


def test_torch_facts_are_judged(make_site: MakeSite) -> None:
    site = make_site("gpus = 2\nbatch_per_gpu = 4")
    effective = resolve_template("epsilon", site)
    [gpus] = judge_gpus({"version": "2.13.0", "cuda": None, "gpus": []}, effective)
    assert gpus.status == "broken" and "the site says 2" in gpus.what
    assert judge_vae({"finite": False, "precision": "float16", "device": "cuda"}).status == "broken"
    assert judge_tokenizers({"error": "OSError: not there"}).status == "broken"
    one = {"processes": 1, "device": "cpu", "mixed_precision": "no"}
    assert judge_processes(one, effective).status == "broken"


@pytest.mark.parametrize(("hard", "advice"), [(-1, "ulimit -n 2304"), (4096, "ulimit -n 2304"), (512, "limit of 512")])
def test_advice_about_open_files_can_be_followed(monkeypatch: pytest.MonkeyPatch, hard: int, advice: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    assert advice in doctor.examine_open_files(None).do


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from kohaku_wrap.planning.workers.check_machine import run_check

    first = tmp_path / "openai_clip-vit-large-patch14"
    assert run_check("tokenizers", {"tokenizers": str(tmp_path)}) == {"error": f"{first} is not there"}


def test_files_that_are_missing_and_disk_that_is_free(make_site: MakeSite) -> None:
    effective = resolve_template("epsilon", make_site())
    findings = {finding.name: finding for finding in examine_files(effective, None)}
    assert findings["base model"].status == "broken"
    assert findings["free disk"].status == "ok"
    assert findings["state folder"].status in ("ok", "warning")


def test_options_that_the_builtin_engine_lacks_are_found(make_site: MakeSite) -> None:
    on_cpu = make_site("gpus = 0\nbatch_per_gpu = 1")
    findings = list(examine_builtin_options(resolve_template("epsilon", on_cpu)))
    assert {finding.status for finding in findings} == {"broken"}
    assert any(finding.what.startswith("mixed_precision: ") and finding.do for finding in findings)
    [finding] = examine_builtin_options(resolve_template("demo", on_cpu))
    assert "tokenizer_cache_dir" in finding.what and "paths.tokenizers" in finding.what


@pytest.mark.slow
def test_accelerate_follows_the_runs_file_and_not_the_users(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path / "hf" / "accelerate"
    user.mkdir(parents=True)
    (user / "default_config.yaml").write_text("mixed_precision: bf16\nnum_processes: 3\nuse_cpu: true\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    effective = resolve_template("demo", make_site("gpus = 0\nbatch_per_gpu = 1\nprocesses = 2"))
    facts = count_processes(effective)
    assert facts.get("ranks") == [0, 1], facts
    assert (facts["device"], facts["mixed_precision"]) == ("cpu", "no")
    assert judge_processes(facts, effective).status == "ok"


@pytest.mark.slow
def test_processes_are_counted_where_the_gpus_of_the_site_are_hidden(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    effective = resolve_template("demo", make_site("gpus = 2\nbatch_per_gpu = 1"))
    facts = count_processes(effective)
    assert (facts.get("ranks"), facts.get("device")) == ([0, 1], "cpu"), facts
    assert judge_processes(facts, effective).status == "broken"


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("[rank1]: RuntimeError: no device\ntorch.distributed.ChildFailedError: \n", "RuntimeError: no device"),
        ("ChildFailedError: \n  exitcode  : -15 (SIGTERM)\n  exitcode  : -6 (SIGABRT)\n", "exitcode  : -6 (SIGABRT)"),
        ("usage: accelerate\n", "accelerate failed"),
    ],
)
def test_the_reason_is_the_processes_own(stderr: str, reason: str) -> None:
    assert find_reason(stderr).endswith(reason)


@pytest.mark.slow
def test_the_command_really_steps_the_optimizer() -> None:
    result = CliRunner().invoke(command, ["--engine", "builtin", "--json"])
    document = json.loads(result.stdout)
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert findings["optimizer"]["what"].startswith("Lion8bit steps on")
    assert "torch.uint8" in findings["optimizer"]["what"]
    broken = [name for name, finding in findings.items() if finding["status"] == "broken"]
    assert document["ready"] is (not broken)
    assert result.exit_code == (1 if broken else 0)
    for finding in findings.values():
        assert finding["what"]
        assert finding["status"] == "ok" or (finding["why"] and finding["do"])


def test_a_broken_torch_ends_in_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from kohaku_wrap.planning import doctor_torch

    [finding] = doctor_torch.find_torch_faults(None)
    assert finding.status == "broken"
    assert "libcudart" in finding.what


@pytest.mark.parametrize(
    ("installed", "status", "shown"),
    [
        ({"onnxruntime": "1.32.0"}, "ok", "onnxruntime 1.32.0"),
        ({"onnxruntime-gpu": "1.32.0"}, "ok", "onnxruntime-gpu 1.32.0"),
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0"}, "warning", "onnxruntime 1.32.0 and onnxruntime-gpu"),
        ({}, "ok", "not installed"),
    ],
)
def test_which_onnxruntime_is_active(
    installed: dict[str, str], status: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_version", lambda name: installed.get(name, ""))
    finding = doctor.examine_judges()
    assert finding.status == status and shown in finding.what
