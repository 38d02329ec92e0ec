"""No model of a formula is named without changing anything; parts of models in other layouts are used as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.merging.binding import UnboundName
from kohaku_wrap.merging.coverage import UnfitInputs
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge

from .conftest import TE1, TE2, UNET, Tensors, WriteModel, make_tensors

OPEN_CLIP = "conditioner.embedders.1.model."


def write(folder: Path, name: str, tensors: Tensors) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def unet_of(tensors: Tensors, prefix: str = UNET) -> Tensors:
    return {prefix + key.removeprefix(UNET): value for key, value in tensors.items() if key.startswith(UNET)}


def merge(folder: Path, formula: str, options: MergeOptions | None = None, **paths: Path) -> Tensors:
    output = folder / "out.safetensors"
    plan = plan_merge(formula, paths, options)
    run_merge(plan, output, {}, threads=2, verify_elements=2000)
    return load_file(output)


STRANGERS = {
    "a LoRA": {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(64, 2),
               "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 32)},
    "a PEFT LoRA": {"base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight": torch.ones(2, 32),
                    "base_model.model.down_blocks.1.attentions.0.proj_in.lora_B.weight": torch.ones(64, 2)},
    "a UNet in diffusers' form": {"conv_in.weight": torch.ones(32, 4, 3, 3)},
    "a UNet without prefix": {"input_blocks.0.0.weight": torch.ones(32, 4, 3, 3)},
    "a UNet with a prefix": {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 4, 3, 3)},
    "a CLIP": {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(64, 32)},
    "another CLIP": {f"text_model.encoder.layers.0.{name}.weight": torch.ones(32, 32)
                     for name in ("self_attn.out_proj", "self_attn.q_proj", "text_projection")},
    "a VAE": {"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)},
    "something else": {"double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8)},
    "integers": {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 4, 3, 3, dtype=torch.int8)},
}  # fmt: skip


@pytest.mark.parametrize("formula", ["a + 0.8 * (x - a)", "0.5 * a + 0.5 * x", 'a + only("*", 0.1 * (x - a))'])
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_that_would_change_nothing_or_only_a_part_is_refused(
    tmp_path: Path, write_model: WriteModel, kind: str, formula: str
) -> None:
    other = write(tmp_path, "x", STRANGERS[kind])
    with pytest.raises(KwrapError) as caught:
        plan_merge(formula, {"a": write_model("a"), "x": other})
    assert "x" in str(caught.value) and caught.value.next_step


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a LoRA", "LoRA network"),
        ("a UNet in diffusers' form", "UNet in diffusers' form. It lacks text encoder 1, text encoder 2"),
        ("a UNet without prefix", "UNet without its prefix. It lacks text encoder 1, text encoder 2"),
        ("a CLIP", "text encoder 1 in diffusers' form. It lacks UNet, text encoder 2"),
        ("a VAE", "VAE without its prefix. It shares no tensor"),
        ("something else", "tensors of no known model. It shares no tensor"),
    ],
)
def test_the_refusal_says_what_the_file_is_and_lacks(
    tmp_path: Path, write_model: WriteModel, kind: str, text: str
) -> None:
    with pytest.raises(UnfitInputs) as caught:
        plan_merge("a + 0.8 * (x - a)", {"a": write_model("a"), "x": write(tmp_path, "x", STRANGERS[kind])})
    assert text in str(caught.value)


@pytest.mark.parametrize("formula", ["a", "a + 0.5 * (b - a)", "b + 0.5 * (a - b)"])
def test_a_file_without_tensors_is_refused(tmp_path: Path, write_model: WriteModel, formula: str) -> None:
    paths = {"a": write(tmp_path, "a", {}), "b": write_model("b", 1)}
    with pytest.raises(UnfitInputs, match=r"a \(\S+\) holds no tensor"):
        plan_merge(formula, {name: path for name, path in paths.items() if name in formula})


def test_networks_mixed_as_files_are_named(tmp_path: Path) -> None:
    paths = {name: write(tmp_path, name, STRANGERS["a LoRA"]) for name in "ab"}
    decisions = plan_merge("0.5 * a + 0.5 * b", paths).decisions
    assert [line.partition(" is a network")[0] for line in decisions if "mixing its factors" in line] == ["a", "b"]


@pytest.mark.parametrize("option", ["like", "vae_from"])
def test_an_anchor_is_a_model_of_the_formula_or_a_file(write_model: WriteModel, option: str) -> None:
    named: dict[str, Any] = {option: "nothing"}
    with pytest.raises(UnboundName, match="nothing is neither a model of the formula nor a file"):
        plan_merge("a", {"a": write_model("a", 1)}, MergeOptions(**named))


def test_two_vaes_are_averaged_where_that_is_asked_for(tmp_path: Path) -> None:
    key = "first_stage_model.encoder.conv_in.weight"
    paths = {
        name: write(tmp_path, name, {key: torch.full((16, 3, 3, 3), value)}) for name, value in (("a", 1.0), ("b", 3.0))
    }
    with pytest.raises(UnfitInputs, match="Add --merge-vae"):
        plan_merge("0.5 * a + 0.5 * b", paths)
    assert (merge(tmp_path, "0.5 * a + 0.5 * b", MergeOptions(merge_vae=True), **paths)[key] == 2).all()


@pytest.mark.parametrize("prefix", [UNET, "", "_orig_mod.", "model.model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("way", ["unet(x)", "--parts"])
def test_a_unet_alone_is_merged_where_the_formula_says_so(
    tmp_path: Path, write_model: WriteModel, prefix: str, way: str
) -> None:
    a, other = write_model("a", 1), unet_of(make_tensors(2), prefix)
    formula = "a + 0.5 * (unet(x) - a)" if way == "unet(x)" else "0.5 * a + 0.5 * x"
    options = MergeOptions(parts="unet") if way == "--parts" else None
    merged = merge(tmp_path, formula, options, a=a, x=write(tmp_path, "x", other))
    old, new = load_file(a), make_tensors(2)
    for key, tensor in old.items():
        wanted = (tensor.double() + new[key].double()).div(2).to(tensor.dtype) if key.startswith(UNET) else tensor
        assert torch.equal(merged[key], wanted), key


def test_a_part_that_is_no_difference_is_refused_elsewhere(tmp_path: Path, write_model: WriteModel) -> None:
    x = write(tmp_path, "x", unet_of(make_tensors(2)))
    with pytest.raises(KwrapError, match="sums to 1/2; write a difference in brackets"):
        plan_merge("0.5 * a + 0.5 * unet(x)", {"a": write_model("a"), "x": x})


def test_a_model_put_together_of_parts(tmp_path: Path, write_model: WriteModel) -> None:
    paths: dict[str, Any] = {name: write_model(name, seed) for seed, name in enumerate("abcd", 1)}
    merged = merge(tmp_path, "unet(a) + te1(b) + te2(c) + vae(d)", **paths)
    for key, tensor in merged.items():
        name = "a" if key.startswith(UNET) else "b" if key.startswith(TE1) else "c" if key.startswith(TE2) else "d"
        if not key.endswith("position_ids"):
            assert torch.equal(tensor, load_file(paths[name])[key]), key


def test_the_second_text_encoder_of_a_diffusers_folder(tmp_path: Path, write_model: WriteModel) -> None:
    """Query, key and value lie apart there, and the projection is transposed."""

    def add(tensors: Tensors) -> None:
        tensors[f"{OPEN_CLIP}text_projection"] = torch.randn(32, 48, generator=torch.manual_seed(5)).half()

    a = write_model("a", 1, change=add)
    new = make_tensors(2)
    add(new)
    apart: Tensors = {"text_projection.weight": new[f"{OPEN_CLIP}text_projection"].T}
    for layer in (0, 1):
        for kind in ("weight", "bias"):
            shares = new[f"{TE2}{layer}.attn.in_proj_{kind}"].chunk(3)
            names = (f"text_model.encoder.layers.{layer}.self_attn.{name}_proj.{kind}" for name in "qkv")
            apart |= dict(zip(names, shares, strict=True))
    apart["text_model.encoder.layers.0.self_attn.out_proj.weight"] = new[f"{TE2}0.attn.out_proj.weight"]
    apart["text_model.encoder.layers.1.mlp.fc1.weight"] = new[f"{TE2}1.mlp.c_fc.weight"]
    merged = merge(tmp_path, "a + 0.5 * (te2(x) - a)", a=a, x=write(tmp_path, "x", apart))
    for key, tensor in load_file(a).items():
        is_changed = key.startswith(OPEN_CLIP)
        wanted = (tensor.double() + new[key].double()).div(2).to(tensor.dtype) if is_changed else tensor
        assert torch.equal(merged[key], wanted), key
    whole = merge(tmp_path, "x", x=tmp_path / "x.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in whole.items()} == {
        key: tuple(tensor.shape) for key, tensor in new.items() if key.startswith(OPEN_CLIP)
    }
    assert all(torch.equal(tensor, new[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("formula", ["a + 0 * x", "a + x - x"])
def test_a_model_without_weight_may_share_nothing(tmp_path: Path, write_model: WriteModel, formula: str) -> None:
    plan_merge(formula, {"a": write_model("a"), "x": write(tmp_path, "x", STRANGERS["something else"])})


def test_a_model_whose_shapes_never_fit_is_refused_although_copies_were_asked_for(
    tmp_path: Path, write_model: WriteModel
) -> None:
    other = write(tmp_path, "x", {key: torch.ones(3, 3).half() for key in make_tensors(1)})
    with pytest.raises(UnfitInputs, match="no tensor of the output would be made from it"):
        plan_merge("a + 0.5 * (x - a)", {"a": write_model("a"), "x": other}, MergeOptions(shapes="anchor"))


def test_scaled_float8_is_refused(tmp_path: Path, write_model: WriteModel) -> None:
    tensors = {**make_tensors(1), "scaled_fp8": torch.zeros(2), f"{UNET}out.2.scale_weight": torch.ones(1)}
    with pytest.raises(UnfitInputs, match="quantised weights with scales"):
        plan_merge("a + 0.5 * (x - a)", {"a": write_model("a"), "x": write(tmp_path, "x", tensors)})


def test_an_unknown_part_is_refused(write_model: WriteModel) -> None:
    with pytest.raises(UnboundName, match="'unett' is no part"):
        plan_merge("a", {"a": write_model("a")}, MergeOptions(parts="unett"))
