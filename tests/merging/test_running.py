"""Whole merges: exact bytes, the rules of missing keys, and files that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.errors import KwrapError, ProblemsFound
from kohaku_wrap.merging import open_files, pieces, worker
from kohaku_wrap.merging.arithmetic.kernels import Kernel
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, round_fraction
from kohaku_wrap.merging.binding import UnboundName
from kohaku_wrap.merging.coverage import UnfitInputs
from kohaku_wrap.merging.formula.tokens import FormulaError
from kohaku_wrap.merging.open_files import BadOutput, new_file
from kohaku_wrap.merging.pieces import cut_pieces
from kohaku_wrap.merging.plan import MergeOptions, MergePlan
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge
from kohaku_wrap.merging.verifying import MismatchFound

from .conftest import SHAPES, UNET, Tensors, WriteModel

GAMMA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
GAMMA_SUM = {"beta7": Fraction(1, 2), "anxl3": Fraction(4, 5), "anxl2": Fraction(-4, 5), "base7": Fraction(1, 2)}
KEY = f"{UNET}input_blocks.4.1.proj_in.weight"
VAE_KEY = "first_stage_model.encoder.conv_in.weight"
STRIDE = 17
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def merge(plan: MergePlan, output: Path, threads: int = 2) -> Tensors:
    run_merge(plan, output, {"k": "v"}, threads, verify_elements=300)
    return load_file(output)


def exact_tensor(parts: list[tuple[Fraction, torch.Tensor]], to: torch.dtype) -> torch.Tensor:
    """The sum in rationals, rounded once."""
    form = FORMATS[NAMES[to]]
    columns = [(weight, tensor.double().reshape(-1).tolist()) for weight, tensor in parts]
    sums = [
        round_fraction(sum((weight * Fraction(values[place]) for weight, values in columns), Fraction(0)), form)
        for place in range(parts[0][1].numel())
    ]
    flat = torch.tensor([float(value) if value is not None else float("inf") for value in sums], dtype=torch.float64)
    return flat.to(torch.float32).to(to).reshape(parts[0][1].shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gamma_equals_rational_arithmetic(tmp_path: Path, write_model: WriteModel, dtype: torch.dtype) -> None:
    paths = {name: write_model(name, seed, dtype) for seed, name in enumerate(GAMMA_SUM)}
    merged = merge(plan_merge(GAMMA, paths), tmp_path / "out.safetensors")
    inputs = {name: load_file(path) for name, path in paths.items()}
    assert list(merged) and merged.keys() == inputs["beta7"].keys()
    for key in SHAPES:
        found, wanted = merged[key].reshape(-1)[::STRIDE], inputs["beta7"][key].reshape(-1)[::STRIDE]
        if key != VAE_KEY:
            parts = [(weight, inputs[name][key].reshape(-1)[::STRIDE]) for name, weight in GAMMA_SUM.items()]
            wanted = exact_tensor(parts, dtype)
        assert torch.equal(found, wanted), key
    assert torch.equal(merged["v_pred"], torch.zeros(0))
    assert merged["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"].dtype == torch.int64


def test_the_bytes_do_not_depend_on_threads_or_runs(
    tmp_path: Path, four_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(worker, "CHUNK_ELEMENTS", 1000)
    plan = plan_merge(GAMMA, four_models)
    digests = set()
    for threads in (1, 2, 5):
        output = tmp_path / f"{threads}.safetensors"
        run_merge(plan, output, {"k": "v"}, threads)
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_neighbours_are_read_in_one_piece(four_models: dict[str, Path]) -> None:
    plan = plan_merge(GAMMA, four_models)
    assert len(cut_pieces(plan)) < len(plan.tensors) / 2


def test_output_types(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1), "b": write_model("b", 2, torch.bfloat16)}
    merged = merge(plan_merge("0.5 * a + 0.5 * b", paths, MergeOptions(dtype="F32")), tmp_path / "o.safetensors")
    assert {merged[key].dtype for key in SHAPES} == {torch.float32}
    assert torch.equal(merged[VAE_KEY], load_file(paths["a"])[VAE_KEY].float())
    plan = plan_merge("0.5 * a + 0.5 * b", paths)
    assert any("b has BF16 where a has F16" in line for line in plan.decisions)


def remove(*keys: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in keys:
            del tensors[key]

    return change


def test_a_difference_with_a_missing_member_is_reported(
    tmp_path: Path, four_models: dict[str, Path], write_model: WriteModel
) -> None:
    four_models["anxl2"] = write_model("anxl2", 9, change=remove(KEY))
    plan = plan_merge(GAMMA, four_models)
    assert any(line.startswith("(anxl3 - anxl2) counts as 0") and KEY in line for line in plan.decisions)
    merged = merge(plan, tmp_path / "o.safetensors")
    inputs = {name: load_file(path) for name, path in four_models.items()}
    half = Fraction(1, 2)
    assert torch.equal(
        merged[KEY], exact_tensor([(half, inputs["beta7"][KEY]), (half, inputs["base7"][KEY])], torch.float16)
    )


def test_a_missing_model_with_weight_fails_unless_told_otherwise(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1), "b": write_model("b", 2, change=remove(KEY))}
    with pytest.raises(ProblemsFound, match="b lacks it and has weight") as caught:
        plan_merge("0.5 * a + 0.5 * b", paths)
    assert "--missing" in caught.value.next_step
    own = load_file(paths["a"])[KEY]
    copied = merge(plan_merge("0.5 * a + 0.5 * b", paths, MergeOptions(missing="anchor")), tmp_path / "c.safetensors")
    assert torch.equal(copied[KEY], own)
    plan = plan_merge("0.5 * a + 0.5 * b", paths, MergeOptions(missing="zero"))
    assert torch.equal(merge(plan, tmp_path / "z.safetensors")[KEY], own / 2)
    assert any("counts as 0" in line for line in plan.decisions) and any(
        "sum to 1/2" in line for line in plan.decisions
    )


def test_extra_keys_are_left_out_and_told(write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1, change=remove(KEY)), "b": write_model("b", 2)}
    plan = plan_merge("a + 0.5 * (b - a)", paths)
    assert KEY not in [tensor.key for tensor in plan.tensors]
    assert any(line.startswith("left out: only in b") for line in plan.decisions)


def test_shapes_that_differ_fail_unless_told_otherwise(tmp_path: Path, write_model: WriteModel) -> None:
    def reshape(tensors: Tensors) -> None:
        tensors[KEY] = torch.zeros(64, 33, dtype=torch.float16)

    paths = {"a": write_model("a", 1), "b": write_model("b", 2, change=reshape)}
    with pytest.raises(ProblemsFound, match=r"shape \[64, 33\] in b, \[64, 32\] in a"):
        plan_merge("0.5 * a + 0.5 * b", paths)
    plan = plan_merge("0.5 * a + 0.5 * b", paths, MergeOptions(shapes="anchor"))
    assert torch.equal(merge(plan, tmp_path / "o.safetensors")[KEY], load_file(paths["a"])[KEY])


def test_sums_other_than_one_are_told_or_refused(write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1), "b": write_model("b", 2)}
    assert any("sum to 3/2, not 1" in line for line in plan_merge("a + 0.5 * b", paths).decisions)
    with pytest.raises(ProblemsFound, match="sum to 3/2"):
        plan_merge("a + 0.5 * b", paths, MergeOptions(sums="fail"))


def test_the_vae_is_the_anchors_unless_asked(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1), "b": write_model("b", 2)}
    a, b = (load_file(path)[VAE_KEY] for path in paths.values())
    half = "0.5 * a + 0.5 * b"
    average = exact_tensor([(Fraction(1, 2), a), (Fraction(1, 2), b)], torch.float16)
    output = tmp_path / "o.safetensors"
    assert torch.equal(merge(plan_merge(half, paths), output)[VAE_KEY], a)
    assert torch.equal(merge(plan_merge(half, paths, MergeOptions(vae_from="b")), output)[VAE_KEY], b)
    assert torch.equal(merge(plan_merge(half, paths, MergeOptions(vae_from=str(paths["b"]))), output)[VAE_KEY], b)
    bare = write_model("bare", 5, change=lambda tensors: tensors.pop(VAE_KEY))
    with pytest.raises(ProblemsFound, match="whose VAE was asked for, lacks it") as caught:
        plan_merge(half, paths, MergeOptions(vae_from=str(bare)))
    assert "--missing" not in caught.value.next_step
    network = {"lora_unet_a.lora_up.weight": torch.ones(4, 2), "lora_unet_a.lora_down.weight": torch.ones(2, 4)}
    save_file(network, tmp_path / "n.safetensors")
    with pytest.raises(UnfitInputs, match="Give --vae-from a checkpoint"):
        plan_merge(half, paths, MergeOptions(vae_from=str(tmp_path / "n.safetensors")))
    assert torch.equal(merge(plan_merge(half, paths, MergeOptions(merge_vae=True)), output)[VAE_KEY], average)
    named = "a + blocks(VAE=0.5) * (b - a)"
    assert torch.equal(merge(plan_merge(named, paths), output)[VAE_KEY], average)


def test_like_chooses_the_anchor(write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1), "b": write_model("b", 2, torch.bfloat16, change=remove(KEY))}
    plan = plan_merge("a + 0.5 * (b - a)", paths, MergeOptions(like="b"))
    assert (plan.anchor, {tensor.spot.dtype for tensor in plan.tensors if tensor.coefficients}) == ("b", {"BF16"})
    assert KEY not in [tensor.key for tensor in plan.tensors]


def test_patterns_must_match_a_key(four_models: dict[str, Path]) -> None:
    with pytest.raises(FormulaError, match="no key of beta7 matches"):
        plan_merge('beta7 + only("typo*", base7 - anxl2) + 0 * anxl3', four_models)


def test_names_and_paths_must_fit(four_models: dict[str, Path]) -> None:
    with pytest.raises(UnboundName, match="no file is given for x"):
        plan_merge("beta7 + x", {"beta7": four_models["beta7"]})
    with pytest.raises(UnboundName, match="base7 does not stand in the formula"):
        plan_merge("beta7", {name: four_models[name] for name in ("beta7", "base7")})


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[KEY][3, 4] = value

    return change


def test_infinite_inputs_fail_by_key_and_leave_nothing(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1, change=spoil(float("nan"))), "b": write_model("b", 2)}
    output = tmp_path / "o.safetensors"
    with pytest.raises(ProblemsFound, match=f"{KEY} +1 numbers of the inputs are infinite or NaN"):
        run_merge(plan_merge("0.5 * a + 0.5 * b", paths), output, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    kept = merge(plan_merge("0.5 * a + 0.5 * b", paths, MergeOptions(non_finite="keep")), output)
    assert torch.isnan(kept[KEY]).sum() == 1


def test_overflow_fails_by_key(tmp_path: Path, write_model: WriteModel) -> None:
    paths = {"a": write_model("a", 1, change=spoil(60000)), "b": write_model("b", 2, change=spoil(60000))}
    output = tmp_path / "o.safetensors"
    with pytest.raises(ProblemsFound, match=f"{KEY} +1 results are too large"):
        run_merge(plan_merge("a + b", paths), output, {})
    assert not output.exists()
    kept = merge(plan_merge("a + b", paths, MergeOptions(overflow="keep")), output)
    assert torch.isinf(kept[KEY]).sum() == 1
    assert torch.isfinite(merge(plan_merge("a + b", paths, MergeOptions(dtype="F32")), output)[KEY]).all()


def test_verification_finds_a_wrong_kernel(
    tmp_path: Path, four_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_bit(self: object, inputs: object, output: np.ndarray, scratch: object) -> tuple[np.ndarray, np.ndarray]:
        output[:] = 0
        return np.empty(0, dtype=int), np.empty(0, dtype=int)

    monkeypatch.setattr(Kernel, "run", lose_a_bit)
    output = tmp_path / "o.safetensors"
    with pytest.raises(MismatchFound, match="rational arithmetic gives"):
        run_merge(plan_merge(GAMMA, four_models), output, {}, verify_elements=50)
    assert not output.exists() and not list(tmp_path.glob("*.part"))


def test_inputs_are_never_overwritten(tmp_path: Path, four_models: dict[str, Path]) -> None:
    plan = plan_merge(GAMMA, four_models)
    link = tmp_path / "link.safetensors"
    link.symlink_to(four_models["anxl2"])
    hard = tmp_path / "hard.safetensors"
    os.link(four_models["base7"], hard)
    for output, name in ((four_models["beta7"], "beta7"), (link, "anxl2"), (hard, "base7")):
        before = output.read_bytes()
        with pytest.raises(BadOutput, match=f"is the input {name}"):
            run_merge(plan, output, {})
        assert output.read_bytes() == before


def test_outputs_that_cannot_be(tmp_path: Path, four_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(GAMMA, four_models)
    with pytest.raises(BadOutput, match="does not exist"):
        run_merge(plan, tmp_path / "no" / "o.safetensors", {})
    with pytest.raises(BadOutput, match=r"kwrap writes \.safetensors"):
        run_merge(plan, tmp_path / "o.ckpt", {})
    monkeypatch.setattr(open_files, "DISK_RESERVE_BYTES", 1 << 62)
    with pytest.raises(BadOutput, match=r"only .* are free"):
        run_merge(plan, tmp_path / "o.safetensors", {})
    assert not (tmp_path / "o.safetensors.part").exists()


def test_an_input_cut_short_meanwhile_is_an_error(tmp_path: Path, four_models: dict[str, Path]) -> None:
    plan = plan_merge(GAMMA, four_models)
    os.truncate(four_models["base7"], 5000)
    with pytest.raises(KwrapError, match="became shorter"):
        run_merge(plan, tmp_path / "o.safetensors", {})
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    for name in ("a", "b"):
        save_file({f"{UNET}w{place}": torch.rand(1 << 20) for place in range(24)}, tmp_path / f"{name}.safetensors")
    command = [sys.executable, "-m", "kohaku_wrap", "merge", "0.123456789 * a + 0.876543211 * b", "--threads", "1"]
    command += [word for name in ("a", "b") for word in ("-m", f"{name}={tmp_path / name}.safetensors")]
    child = subprocess.Popen([*command, "-o", str(tmp_path / "o.safetensors")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "o.safetensors.part").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert not list(tmp_path.glob("o.*"))


def test_a_part_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "o.safetensors.part").symlink_to(tmp_path / "precious")
    with pytest.raises(BadOutput, match="is a link to another file"), new_file(tmp_path / "o.safetensors", 10):
        pass
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "o.safetensors").exists()


def test_a_part_that_was_just_given_its_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, part = tmp_path / "o.safetensors", tmp_path / "o.safetensors.part"
    part.write_text("whole")
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (part.replace(output), lock(*arguments)))
    with pytest.raises(BadOutput, match="another merge"), new_file(output, 10):
        pass
    assert output.read_text() == "whole"


def test_what_a_killed_merge_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "o.safetensors.part"
    part.write_bytes(bytes(100))
    measure = shutil.disk_usage

    def usage(folder: Path) -> object:
        free = open_files.DISK_RESERVE_BYTES + 100 - (part.stat().st_size if part.exists() else 0)
        return measure(folder)._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with new_file(tmp_path / "o.safetensors", 100):
        pass
    with pytest.raises(BadOutput, match="takes 101 bytes and only"), new_file(tmp_path / "p.safetensors", 101):
        pass


@pytest.mark.parametrize("verify_elements", [0, 500])
def test_progress_ends_at_the_total(tmp_path: Path, four_models: dict[str, Path], verify_elements: int) -> None:
    plan, told = plan_merge(GAMMA, four_models), []
    run_merge(plan, tmp_path / "o.safetensors", {}, 2, verify_elements, lambda done, total: told.append((done, total)))
    whole = plan.data_bytes * (2 if verify_elements else 1)
    assert told[-1] == (whole, whole) and told == sorted(told)
    assert not verify_elements or any(plan.data_bytes < done < whole for done, _ in told)
