"""Keys of networks that other trainers write: applied where they are known, else refused, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kohaku_wrap.cli import program
from kohaku_wrap.errors import KwrapError, ProblemsFound
from kohaku_wrap.merging.coverage import UnfitInputs
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge

from ..conftest import Tensors, WriteModel
from .test_networks import CASES, LINEAR, NAME_OF_LINEAR, WriteNetwork, bake, named, train_module, weight_in_training

lycoris = pytest.importorskip("lycoris")

PROJECTION = "conditioner.embedders.1.model.text_projection"
LORA = {f"{NAME_OF_LINEAR}.lora_up.weight": torch.ones(64, 2), f"{NAME_OF_LINEAR}.lora_down.weight": torch.ones(2, 32)}
BUNDLE = {"bundle_emb.foo.clip_l": torch.ones(2, 8), "bundle_emb.foo.clip_g": torch.ones(2, 8)}
ELSEWHERE = {"lora_te3_encoder_block_0.lora_up.weight": torch.ones(8, 2),
             "lora_unet_joint_blocks_0.lora_up.weight": torch.ones(8, 2),
             "lora_unet_joint_blocks_0.lora_down.weight": torch.ones(2, 8)}  # fmt: skip


def add_projection(tensors: Tensors) -> None:
    """Not square, so that rows and columns cannot be exchanged unseen."""
    kind = next(iter(tensors.values())).dtype
    tensors[PROJECTION] = torch.randn(32, 48, generator=torch.manual_seed(5)).to(kind)


@pytest.mark.parametrize("case", [case for case in CASES if "Tucker" not in case])
def test_the_text_projection_is_changed_as_the_linear_layer_that_was_trained(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork, case: str
) -> None:
    class_name, options = CASES[case]
    base_path = write_model("base", 1, torch.float32, change=add_projection)
    base = load_file(base_path)
    layer = {PROJECTION: base[PROJECTION].T.contiguous()}
    module = train_module(getattr(lycoris, class_name), PROJECTION, layer, **options)
    baked = bake(tmp_path, base_path, write_network("n", named("lora_te2_text_projection", module)))
    wanted = weight_in_training(module, layer[PROJECTION]).T
    assert torch.allclose(baked[PROJECTION], wanted, rtol=0, atol=1e-6 if "DoRA" in case else 0)
    assert not torch.equal(wanted, base[PROJECTION])
    assert all(torch.equal(baked[key], base[key]) for key in base if key != PROJECTION)


def test_flat_norms_of_a_square_projection_are_those_of_its_outputs(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    def add_square(tensors: Tensors) -> None:
        tensors[PROJECTION] = torch.randn(32, 32, generator=torch.manual_seed(5))

    base, name = write_model("base", 1, torch.float32, change=add_square), "lora_te2_text_projection"
    lora = {f"{name}.lora_up.weight": torch.randn(32, 4), f"{name}.lora_down.weight": torch.randn(4, 32)}
    norms = torch.rand(32) + 0.5
    flat, upright = (
        bake(tmp_path, base, write_network("n", {**lora, f"{name}.dora_scale": each}))[PROJECTION]
        for each in (norms, norms[:, None])
    )
    assert torch.equal(flat, upright)


def test_a_projection_of_another_size_is_refused(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    name = "lora_te2_text_projection"
    wrong = {f"{name}.lora_up.weight": torch.ones(32, 2), f"{name}.lora_down.weight": torch.ones(2, 48)}
    base = write_model("base", change=add_projection)
    with pytest.raises(ProblemsFound, match=r"its delta has 32 rows and 1,536 numbers, .* has 48 and 1,536"):
        plan_merge("base + net(n)", {"base": base, "n": write_network("n", wrong)}, MergeOptions(unmatched="skip"))


@pytest.mark.parametrize("foreign", [BUNDLE, ELSEWHERE], ids=["bundle", "elsewhere"])
def test_unknown_keys_are_refused_with_the_option_that_leaves_them_out(
    write_model: WriteModel, write_network: WriteNetwork, foreign: Tensors
) -> None:
    paths = {"base": write_model("base"), "n": write_network("n", LORA | foreign)}
    with pytest.raises(KwrapError) as caught:
        plan_merge("base + net(n)", paths)
    assert next(iter(foreign)).split(".")[0] in str(caught.value) and "--unmatched skip" in caught.value.next_step


def test_unknown_keys_are_left_out_and_counted_by_name(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base, network = write_model("base"), write_network("n", LORA | BUNDLE | ELSEWHERE)
    words = ["-m", f"base={base}", "-m", f"n={network}", "-o", str(tmp_path / "o.safetensors"), "--json"]
    finished = CliRunner().invoke(program, ["merge", "base + net(n)", *words, "--unmatched", "skip"])
    assert finished.exit_code == 0, finished.output
    decisions = json.loads(finished.stdout)["decisions"]
    assert (
        "net(n): left out, named bundle_emb.*, no known network: 2 tensors "
        "(bundle_emb.foo.clip_g, bundle_emb.foo.clip_l)"
    ) in [line for line in decisions if "bundle" in line]
    counted = {line.partition(":")[2].rpartition(" (")[0].strip() for line in decisions if "left out" in line}
    assert "left out, the checkpoint has no weight of that name: 2 tensors" in counted
    assert len(counted) == 3
    plan = plan_merge("base + net(n)", {"base": base, "n": write_network("alone", LORA)})
    run_merge(plan, tmp_path / "alone_out.safetensors", {})
    merged, alone = load_file(tmp_path / "o.safetensors"), load_file(tmp_path / "alone_out.safetensors")
    assert all(torch.equal(merged[key], tensor) for key, tensor in alone.items())
    assert not torch.equal(merged[LINEAR], load_file(base)[LINEAR])


def test_a_network_of_which_nothing_is_known_is_an_error_all_the_same(
    write_model: WriteModel, write_network: WriteNetwork
) -> None:
    paths = {"base": write_model("base"), "n": write_network("n", ELSEWHERE)}
    with pytest.raises(UnfitInputs, match=r"net\(n\): has weight in the formula, but no tensor"):
        plan_merge("base + net(n)", paths, MergeOptions(unmatched="skip"))
