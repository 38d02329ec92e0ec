"""What a run offers to others: whole, and saying only what the run's files say."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.config.render import describe_trainer
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.merging.hashes import hash_files
from kohaku_wrap.merging.inspecting import inspect_file
from kohaku_wrap.publishing.publishing import CannotPublish, publish_run
from kohaku_wrap.trainer.commits import SupportedCommit, digest_sources, write_proof
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import digest_of_ledger

from ..merging.conftest import WriteModel

pytest.importorskip("lycoris")


@pytest.fixture
def run(tmp_path: Path, write_model: WriteModel) -> tuple[Path, dict[str, Any]]:
    """A run's folder with two networks, a ledger and two attempts, and its lock."""
    base = write_model("base", 1, metadata={"modelspec.license": "Fair AI"})
    folder = tmp_path / "runs" / "epsilon"
    (folder / "checkpoints").mkdir(parents=True)
    name = "lora_unet_input_blocks_4_1_proj_in"
    for file in ("epsilon-step00013600", "epsilon"):
        factors = {f"{name}.lokr_w1": torch.randn(8, 8), f"{name}.lokr_w2": torch.randn(8, 4)}
        save_file(factors, folder / "checkpoints" / f"{file}.safetensors")
    (folder / "ledger").mkdir()
    (folder / "ledger" / "attempt-0001-rank-000.bin").write_bytes(b"one")
    for number, (start, end) in enumerate(((0, 15300), (13600, 20354)), 1):
        attempt = folder / "attempts" / str(number)
        attempt.mkdir(parents=True)
        facts: dict[str, Any] = {"number": number, "processes": 4, "accumulation": 16, "start_optimizer_step": start,
                 "workers": 8, "state": None, "allow": []}  # fmt: skip
        (attempt / "attempt.json").write_text(json.dumps(facts))
        (attempt / "end.json").write_text(
            json.dumps({"kind": "crash" if number == 1 else "finished", "optimizer_step": end})
        )
    lock = {
        "run": {
            "name": "epsilon",
            "template": "epsilon",
            "dataset": "epsilon",
            "engine": "sd-scripts",
            "effective_batch": 256,
            "batch_per_gpu": 4,
        },
        "plan": {
            "images": 5210319,
            "batches": 1302656,
            "optimizer_steps_per_epoch": 20354,
            "total_optimizer_steps": 20354,
            "micro_batches_per_epoch": 325664,
            "epochs": 1,
        },
        "values": {"unet_lr": 2e-5, "optimizer_type": "Lion8bit", "seed": 20240131},
        "dataset": {"keep_tokens_separator": "|||", "resolution": [1024, 1024]},
        "network_args": {"algo": "lokr", "factor": 8},
        "preset": {"unet_target_name": [".*time_embed\\..+", "^out\\..+"]},
        "trainer": {"commit": "48d368f"},
        "inputs": {
            "base_model": str(base),
            "base_model_sha256": sha256_of_file(base),
            "captions_dataset": "mine",
            "prompt_format": "<artists>, <general tags>",
        },
    }
    return folder, lock


def test_a_step_is_published_whole(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    out = tmp_path / "out"
    report = publish_run(Run(folder).suppose(lock), out, 13600)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "SHA256SUMS", "epsilon-step00013600-baked.safetensors", "epsilon-step00013600.safetensors",
        "report.html",
    ]  # fmt: skip
    assert not report.no_page and "epsilon" in (out / "report.html").read_text()
    assert "from the template `epsilon`, dataset `mine`, on " in (out / "README.md").read_text()
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest == report.files[name]
    card = (out / "README.md").read_text()
    facts = ["optimizer step 13,600 of 20,354", "5,210,319", "2e-05", "Fair AI", report.ledger_sha256]
    facts += ["| seed | 20240131 |", "| resolution | 1024, 1024 |", "| batches | 1,302,656 |"]
    facts += ["| 1 | 0 | 4 | 16 | crash at optimizer step 15,300 |", "| 2 | 13600 |"]
    facts += [
        "<artists>, <general tags>",
        "`\\|\\|\\|`",
        f"(AutoV2 {lock['inputs']['base_model_sha256'][:10]})",
        "48d368f",
        "`.*time_embed\\..+`, `^out\\..+`",
    ]
    facts += ['license: other\nlicense_name: "fair-ai"\n', '["stable-diffusion-xl", "lycoris", "lokr", "kwrap"]']
    for fact in facts:
        assert fact in card, fact
    assert str(tmp_path) not in card
    assert inspect_file(out / "epsilon-step00013600-baked.safetensors").recipe["formula"] == "base + 1.0 * net(network)"


@pytest.mark.parametrize(
    "support",
    [
        "proved on this machine on 2026-11-25, identical to v0.11.1",
        "exact here on 2026-11-25, not equal to v0.11.1: the two runs differ in the loss of epoch 0, position 0: 1, 2",
    ],
)
def test_the_card_says_how_the_trainers_commit_is_known(
    tmp_path: Path, run: tuple[Path, dict[str, Any]], support: str
) -> None:
    folder, lock = run
    checkout = tmp_path / "checkout"
    (checkout / "networks").mkdir(parents=True)
    (checkout / "networks" / "lora.py").write_text("rank = 4\n")
    write_proof(SupportedCommit("new", "c0ffee" * 6 + "beef", digest_sources(checkout), support=support), {})
    lock = tomllib.loads(toml_text({**lock, "trainer": describe_trainer(checkout)}))
    card = publish_run(Run(folder).suppose(lock), tmp_path / "out", bake=False).card.read_text()
    assert f"| trainer_support | {support} |" in card
    assert "| trainer_commit | c0ffee" in card and str(checkout) not in card


def test_the_end_without_baking_and_again(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    first = publish_run(Run(folder).suppose(lock), tmp_path / "out", rights="MIT", bake=False)
    again = publish_run(Run(folder).suppose(lock), tmp_path / "out", rights="MIT", bake=False)
    assert first.files == again.files and set(first.files) == {"epsilon.safetensors", "README.md", "report.html"}
    assert "license: mit\n" in first.card.read_text()
    with pytest.raises(CannotPublish, match=r"another step offers \(epsilon\.safetensors\)"):
        publish_run(Run(folder).suppose(lock), tmp_path / "out", 13600, bake=False)
    assert set(first.files) < {path.name for path in first.folder.iterdir()}, "nothing was removed"
    publish_run(Run(folder).suppose(lock), tmp_path / "out", rights="MIT")
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    with pytest.raises(CannotPublish, match=r"epsilon-baked\.safetensors of an earlier call"):
        publish_run(Run(folder).suppose(lock), tmp_path / "out", rights="MIT", bake=False)
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == sums


def test_what_a_killed_call_left_is_taken_away(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out"
    out.mkdir()
    for name in ("epsilon.safetensors", "README.md"):
        (out / f".{name}.{gone.pid}.part").write_bytes(b"half")
    publish_run(Run(folder).suppose(lock), out, bake=False)
    assert not list(out.glob(".*"))


def test_a_run_without_a_prompt_format_names_none(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    del lock["inputs"]["prompt_format"]
    card = publish_run(Run(folder).suppose(lock), tmp_path / "out", bake=False).card.read_text()
    assert "The captions came with the images" in card and "<general tags>" not in card


def test_what_is_not_there_is_told(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    with pytest.raises(CannotPublish, match="epsilon-step00000001") as caught:
        publish_run(Run(folder).suppose(lock), tmp_path / "out", 1)
    assert "epsilon-step00013600.safetensors" in caught.value.next_step
    with pytest.raises(CannotPublish, match="base model"):
        publish_run(Run(folder).suppose({**lock, "inputs": {"base_model": "/nowhere"}}), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(CannotPublish, match="is not empty"):
        publish_run(Run(folder).suppose(lock), tmp_path / "full")


def test_nothing_published_holds_a_path(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    network = folder / "checkpoints" / "epsilon.safetensors"
    arguments = {"algo": "lokr", "preset": str(folder / "preset.toml"), "note": f"from {folder}/a and ~ann/b.txt"}
    told = {
        "ss_network_args": json.dumps(arguments),
        "ss_optimizer": f"Lion8bit(state={folder}/x.bin,betas=(0.9, 0.99))",
        "ss_sd_model_name": str(tmp_path / "some one" / "base.safetensors"),
        "ss_tag_frequency": json.dumps({"1": {"/v/": 3, ":/": 1, "\\||/": 2}}),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "kept": "C:\\Users\\ann\\x.toml",
    }
    save_file(load_file(network), network, metadata=told)
    before = read_header(network)
    end = {"kind": "crash", "message": f"no room in {folder} of {platform.node()}", "optimizer_step": 15300}
    (folder / "attempts" / "1" / "end.json").write_text(json.dumps({**end, "exit_code": 1, "unix_seconds": 1.7e9}))
    publish_run(Run(folder).suppose(lock), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for word in (str(tmp_path), tmp_path.name, str(Path.home()) + "/", "ann", "some one", platform.node()):
            assert word.encode() not in content, (path.name, word)
    after = read_header(tmp_path / "out" / "epsilon.safetensors")
    assert json.loads(after.metadata["ss_network_args"]) == {
        "algo": "lokr", "preset": "preset.toml", "note": "from a and b.txt",
    }  # fmt: skip
    assert after.metadata["ss_optimizer"] == "Lion8bit(state=x.bin,betas=(0.9, 0.99))"
    for name in ("ss_tag_frequency", "modelspec.implementation"):
        assert after.metadata[name] == told[name]
    assert after.tensors == before.tensors
    assert hash_files([network])[0].data_sha256 == hash_files([after.path])[0].data_sha256
    assert after.metadata["sshs_model_hash"] == hash_files([after.path])[0].data_sha256


def test_a_run_without_a_whole_record_is_published_without_its_page(
    tmp_path: Path, run: tuple[Path, dict[str, Any]]
) -> None:
    folder, lock = run
    publish_run(Run(folder).suppose(lock), tmp_path / "out")
    (folder / "attempts" / "2" / "attempt.json").write_text("torn {")
    report = publish_run(Run(folder).suppose(lock), tmp_path / "out")
    assert "attempt.json" in report.no_page and not (tmp_path / "out" / "report.html").exists()
    assert "report.html" not in (tmp_path / "out" / "SHA256SUMS").read_text()


def test_another_base_model_is_not_baked(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    folder, lock = run
    base = Path(lock["inputs"]["base_model"])
    hash_files([base])
    status = base.stat()
    with base.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CannotPublish, match="was trained on"):
        publish_run(Run(folder).suppose(lock), tmp_path / "out")


def test_the_ledgers_digest_depends_on_names_and_bytes(tmp_path: Path) -> None:
    assert digest_of_ledger(tmp_path / "none") == ""
    (tmp_path / "a").write_bytes(b"xy")
    first = digest_of_ledger(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = digest_of_ledger(tmp_path)
    (tmp_path / "b").write_bytes(b"xz")
    assert len({first, second, digest_of_ledger(tmp_path)}) == 3
