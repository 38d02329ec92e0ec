"""Networks baked into weights, against the weights that LyCORIS's modules train with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kohaku_wrap.errors import KwrapError, ProblemsFound
from kohaku_wrap.formats.network_names import checkpoint_name, find_targets, table_of_targets
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.merging.networks.files import NotANetwork, match_modules
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge

from ..conftest import SHAPES, TE2, UNET, Tensors, WriteModel

lycoris = pytest.importorskip("lycoris")

LINEAR = f"{UNET}input_blocks.4.1.proj_in.weight"
CONV = f"{UNET}input_blocks.4.0.in_layers.2.weight"
NORM = f"{UNET}middle_block.0.in_layers.0"
NAME_OF_LINEAR = "lora_unet_input_blocks_4_1_proj_in"
NAME_OF_CONV = "lora_unet_input_blocks_4_0_in_layers_2"
NAME_OF_NORM = "lora_unet_middle_block_0_in_layers_0"

WriteNetwork = Callable[[str, Tensors], Path]


def train_module(algorithm: Any, key: str, base: Tensors, **options: Any) -> nn.Module:
    """A LyCORIS module on a layer with the checkpoint's weight, with random parameters."""
    torch.manual_seed(3)
    weight = base[key].float()
    layer: nn.Linear | nn.Conv2d = nn.Linear(weight.shape[1], weight.shape[0]) if weight.dim() == 2 else nn.Conv2d(
        weight.shape[1], weight.shape[0], weight.shape[2], padding=1
    )  # fmt: skip
    layer.weight.data.copy_(weight)
    module = algorithm("module", layer, 1.0, **options)
    for name, parameter in module.named_parameters():
        if "dora" not in name and "org" not in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.1)
    module.eval()
    return module


def weight_in_training(module: Any, base: torch.Tensor) -> torch.Tensor:
    """The weight that the module's forward computes with: its outputs for unit inputs give it row by row."""
    own = module.get_weight(base.shape) if hasattr(module, "get_weight") else module.make_weight() * module.scale
    delta = own.detach().reshape(base.shape)
    if module.wd:
        return module.apply_weight_decompose(base + delta, 1.0).detach()
    return base + delta


def named(name: str, module: Any) -> Tensors:
    return {f"{name}.{suffix}": tensor.detach().clone() for suffix, tensor in module.custom_state_dict().items()}


def bake(tmp_path: Path, base: Path, network: Path, formula: str = "base + 1.0 * net(n)") -> Tensors:
    plan = plan_merge(formula, {"base": base, "n": network})
    run_merge(plan, tmp_path / "baked.safetensors", {}, threads=2, verify_elements=500)
    return load_file(tmp_path / "baked.safetensors")


CASES = {
    "LoKr, both whole": ("LokrModule", {"lora_dim": 10000, "alpha": 1, "factor": 8}),
    "LoKr, second in two": ("LokrModule", {"lora_dim": 4, "alpha": 2, "factor": 4}),
    "LoKr, both in two": ("LokrModule", {"lora_dim": 1, "alpha": 3, "factor": 8, "decompose_both": True}),
    "LoKr, Tucker": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 4, "use_tucker": True}),
    "LoKr, DoRA over outputs": ("LokrModule", {"lora_dim": 10000, "factor": 8, "weight_decompose": True}),
    "LoKr, DoRA over inputs": (
        "LokrModule",
        {"lora_dim": 4, "factor": 4, "weight_decompose": True, "wd_on_out": False},
    ),
    "LoHa": ("LohaModule", {"lora_dim": 4, "alpha": 2}),
    "LoHa, Tucker": ("LohaModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "LoRA": ("LoConModule", {"lora_dim": 4, "alpha": 2}),
    "LoRA, rank-stabilised": ("LoConModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "LoRA, Tucker": ("LoConModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "LoRA, DoRA": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_baked_weights_are_those_of_the_training_forward(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork, case: str
) -> None:
    """In float32, bit for bit: linear and convolution."""
    class_name, options = CASES[case]
    base_path = write_model("base", 1, torch.float32)
    base = load_file(base_path)
    algorithm = getattr(lycoris, class_name)
    linear, conv = train_module(algorithm, LINEAR, base, **options), train_module(algorithm, CONV, base, **options)
    network = write_network("n", named(NAME_OF_LINEAR, linear) | named(NAME_OF_CONV, conv))
    baked = bake(tmp_path, base_path, network)
    for key, module in ((LINEAR, linear), (CONV, conv)):
        assert not torch.equal(baked[key], base[key])
        assert torch.equal(baked[key], weight_in_training(module, base[key])), key
    untouched = [key for key in base if key not in (LINEAR, CONV)]
    assert all(torch.equal(baked[key], base[key]) for key in untouched)


def test_norms_full_differences_and_biases(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base_path = write_model("base", 1, torch.float32)
    base = load_file(base_path)
    bias = f"{UNET}input_blocks.0.0"
    tensors = {
        f"{NAME_OF_NORM}.w_norm": torch.randn(32),
        f"{NAME_OF_NORM}.b_norm": torch.randn(32),
        "lora_unet_input_blocks_0_0.diff": torch.randn(32, 4, 3, 3),
        "lora_unet_input_blocks_0_0.diff_b": torch.randn(32),
    }
    baked = bake(tmp_path, base_path, write_network("n", tensors))
    assert torch.equal(baked[f"{NORM}.weight"], base[f"{NORM}.weight"] + tensors[f"{NAME_OF_NORM}.w_norm"])
    assert torch.equal(baked[f"{NORM}.bias"], base[f"{NORM}.bias"] + tensors[f"{NAME_OF_NORM}.b_norm"])
    assert torch.equal(baked[f"{bias}.weight"], base[f"{bias}.weight"] + tensors["lora_unet_input_blocks_0_0.diff"])
    assert torch.equal(baked[f"{bias}.bias"], base[f"{bias}.bias"] + tensors["lora_unet_input_blocks_0_0.diff_b"])


def fused_network(layers: tuple[int, ...], parts: str = "qkv") -> Tensors:
    torch.manual_seed(5)
    return {
        f"lora_te2_text_model_encoder_layers_{layer}_self_attn_{part}_proj.{name}": torch.randn(*shape) * 0.1
        for layer in layers
        for part in parts
        for name, shape in {"lokr_w1": (4, 4), "lokr_w2": (8, 8)}.items()
    }


def test_query_key_and_value_are_rows_of_the_fused_tensor(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base_path = write_model("base", 1, torch.float32)
    base, tensors = load_file(base_path), fused_network((0, 1))
    baked = bake(tmp_path, base_path, write_network("n", tensors))
    for layer in (0, 1):
        key = f"{TE2}{layer}.attn.in_proj_weight"
        deltas = [
            torch.kron(*(tensors[f"lora_te2_text_model_encoder_layers_{layer}_self_attn_{part}_proj.{w}"]
                         for w in ("lokr_w1", "lokr_w2")))
            for part in "qkv"
        ]  # fmt: skip
        assert torch.equal(baked[key], base[key] + torch.cat(deltas))


def test_parts_of_a_fused_tensor_must_be_alike_in_all_layers(
    write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base = read_header(write_model("base", 1))
    table = table_of_targets(base.tensors)
    same = read_header(write_network("same", fused_network((0, 1), "qv")))
    assert len(match_modules(same, table, base.tensors)) == 4
    torn = read_header(write_network("torn", fused_network((0,)) | fused_network((1,), "qv")))
    with pytest.raises(ProblemsFound, match=r"resblocks\.1\.attn\.in_proj_weight +only 2 of the 3 parts"):
        match_modules(torn, table, base.tensors)


def test_a_module_without_a_key_is_an_error(write_model: WriteModel, write_network: WriteNetwork) -> None:
    name = "lora_unet_no_such_module"
    network = write_network("n", {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(2, 2)})
    with pytest.raises(ProblemsFound, match=r"lora_unet_no_such_module +the checkpoint has no weight of that name"):
        plan_merge("base + net(n)", {"base": write_model("base"), "n": network})


def test_a_change_that_a_copied_tensor_loses_is_told(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    a, b = write_model("a", 1), write_model("b", 2)
    odd = load_file(b)
    odd[LINEAR] = torch.zeros(32, 32)
    save_file(odd, b)
    network = write_network(
        "n", {f"{NAME_OF_LINEAR}.diff": torch.ones(64, 32), f"{NAME_OF_CONV}.diff": torch.ones(64, 32, 3, 3)}
    )
    formula = "a + 0.5 * (b - a) + net(n)"
    plan = plan_merge(formula, {"a": a, "b": b, "n": network}, MergeOptions(shapes="anchor"))
    assert f"net(n) is left out where the tensor is copied: 1 tensor ({LINEAR})" in plan.decisions
    whole = plan_merge("a + net(n)", {"a": a, "n": network}, MergeOptions(shapes="anchor"))
    assert not [line for line in whole.decisions if "left out where" in line]


def test_wrong_shapes_and_unknown_algorithms_are_errors(write_model: WriteModel, write_network: WriteNetwork) -> None:
    base = write_model("base")
    name = NAME_OF_LINEAR
    wrong = write_network("wrong", {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(2, 2)})
    with pytest.raises(ProblemsFound, match="its delta has 4 rows"):
        plan_merge("base + net(n)", {"base": base, "n": wrong})
    oft = write_network("oft", {f"{NAME_OF_LINEAR}.oft_blocks": torch.ones(2, 2, 2)})
    with pytest.raises(ProblemsFound, match="oft_blocks"):
        plan_merge("base + net(n)", {"base": base, "n": oft})
    with pytest.raises(NotANetwork):
        plan_merge("base + net(n)", {"base": base, "n": write_model("other")})


@pytest.mark.parametrize(
    "shapes",
    [
        {"lora_up.weight": (64, 4), "lora_down.weight": (3, 32)},
        {"lora_up.weight": (64, 0), "lora_down.weight": (0, 32)},
        {"lora_up.weight": (64, 4, 1, 1), "lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (3, 3, 1, 1)},
        {"lora_up.weight": (64, 4), "lora_down.weight": (4, 32), "alpha": (2,)},
        {"hada_w1_a": (64, 4), "hada_w1_b": (4, 32), "hada_w2_a": (1, 4), "hada_w2_b": (4, 32)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (32, 4), "lokr_w2_b": (3, 16)},
        {"lokr_w1": (2, 2), "lokr_t2": (2, 2, 1, 1), "lokr_w2_a": (3, 32), "lokr_w2_b": (2, 16)},
        {"lokr_w1": (2, 2, 3), "lokr_w2": (32, 16)},
        {"lokr_w1": (2, 2), "lokr_w2": (32, 16), "dora_scale": (5,)},
        {"lokr_w1": (2, 2), "lokr_w2": (32, 16), "dora_scale": (64, 32)},
        {"lora_up.weight": (0, 4), "lora_down.weight": (4, 32)},
        {"oft_blocks": (16, 4, 4), "alpha": (2,)},
        {"weight": (64,), "on_input": (2,)},
        {"a1.weight": (), "a2.weight": (4, 32), "b1.weight": (64, 4), "b2.weight": (4, 32)},
        {"a1.weight": (32, 4), "a2.weight": (4, 32), "b1.weight": (64, 4), "b2.weight": (4, 77)},
        {"a1.weight": (32, 4), "a2.weight": (4, 32), "b1.weight": (64, 4), "b2.weight": (4, 32), "bm.weight": (3, 4)},
    ],
    ids=lambda shapes: " ".join(f"{name}{list(shape)}" for name, shape in shapes.items()),
)
def test_factors_that_do_not_fit_together_are_refused_from_the_header(
    write_model: WriteModel, write_network: WriteNetwork, shapes: dict[str, tuple[int, ...]]
) -> None:
    network = write_network("n", {f"{NAME_OF_LINEAR}.{name}": torch.ones(shape) for name, shape in shapes.items()})
    said = r"do not make a whole delta|do not fit|its (alpha|on_input) has 2|its dora_scale|its delta has 0 rows"
    with pytest.raises(ProblemsFound, match=said):
        plan_merge("base + net(n)", {"base": write_model("base"), "n": network})
    with pytest.raises(KwrapError, match=f"{said}|no sum|no tensor of the output would be made"):
        plan_merge("net(n)", {"n": network}, MergeOptions(network="lora"))


def test_an_alpha_of_whole_numbers_and_flat_norms(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base = write_model("base", 1, torch.float32)
    factors = {f"{NAME_OF_CONV}.lora_up.weight": torch.randn(64, 4, 1, 1)}
    factors[f"{NAME_OF_CONV}.lora_down.weight"] = torch.randn(4, 32, 3, 3)
    norms = torch.rand(64)
    baked = []
    for alpha, shape in ((torch.tensor(2.0), (64, 1, 1, 1)), (torch.tensor(2), (64,))):
        added = {f"{NAME_OF_CONV}.alpha": alpha, f"{NAME_OF_CONV}.dora_scale": norms.reshape(shape)}
        baked.append(bake(tmp_path, base, write_network("n", factors | added))[CONV])
    assert torch.equal(*baked)


def test_dora_does_not_share_a_tensor(write_model: WriteModel, write_network: WriteNetwork) -> None:
    base_path = write_model("base", 1, torch.float32)
    module = train_module(
        lycoris.LokrModule, LINEAR, load_file(base_path), lora_dim=10000, factor=8, weight_decompose=True
    )
    one = write_network("one", named(NAME_OF_LINEAR, module))
    other = write_network("other", {f"{NAME_OF_LINEAR}.diff": torch.ones(64, 32)})
    with pytest.raises(ProblemsFound, match="DoRA"):
        plan_merge("base + net(one) + net(other)", {"base": base_path, "one": one, "other": other})


def test_alpha_zero_or_absent_means_the_rank(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base_path = write_model("base", 1, torch.float32)
    up, down = torch.randn(64, 4), torch.randn(4, 32)
    factors = {f"{NAME_OF_LINEAR}.lora_up.weight": up, f"{NAME_OF_LINEAR}.lora_down.weight": down}
    without = bake(tmp_path, base_path, write_network("n", factors))
    zero = bake(tmp_path, base_path, write_network("m", {**factors, f"{NAME_OF_LINEAR}.alpha": torch.tensor(0.0)}))
    assert torch.equal(without[LINEAR], zero[LINEAR])
    assert torch.equal(without[LINEAR], load_file(base_path)[LINEAR] + up @ down)


def test_a_network_of_sd_1_finds_its_keys() -> None:
    keys = ["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    keys.append(f"{UNET}input_blocks.1.1.proj_in.weight")
    table = table_of_targets(keys)
    names = ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_down_blocks_0_attentions_0_proj_in"]
    assert [(find_targets(name, table) or {})["weight"].key for name in names] == keys


@pytest.mark.parametrize(
    ("diffusers", "sgm"),
    [
        ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
        ("lora_unet_conv_out", "lora_unet_out_2"),
        ("lora_unet_conv_norm_out", "lora_unet_out_0"),
        ("lora_unet_time_embedding_linear_1", "lora_unet_time_embed_0"),
        ("lora_unet_add_embedding_linear_2", "lora_unet_label_emb_0_2"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("lora_unet_down_blocks_1_resnets_0_conv1", "lora_unet_input_blocks_4_0_in_layers_2"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "lora_unet_input_blocks_3_0_op"),
        ("lora_unet_mid_block_resnets_1_conv2", "lora_unet_middle_block_2_out_layers_3"),
        ("lora_unet_up_blocks_0_attentions_2_proj_out", "lora_unet_output_blocks_2_1_proj_out"),
    ],
)
def test_diffusers_names_are_told_in_the_checkpoints_terms(diffusers: str, sgm: str) -> None:
    assert checkpoint_name(diffusers) == sgm


def test_a_network_in_diffusers_names_bakes_the_same(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork
) -> None:
    base = write_model("base", 1)
    factors = {"lokr_w1": torch.randn(8, 8) * 0.1, "lokr_w2": torch.randn(8, 4) * 0.1}
    sgm = bake(
        tmp_path, base, write_network("s", {f"{NAME_OF_LINEAR}.{name}": value for name, value in factors.items()})
    )
    name = "lora_unet_down_blocks_1_attentions_0_proj_in"
    diffusers = bake(
        tmp_path, base, write_network("d", {f"{name}.{suffix}": value for suffix, value in factors.items()})
    )
    assert all(torch.equal(sgm[key], diffusers[key]) for key in SHAPES)


@pytest.mark.slow
def test_the_baked_tiny_sdxl_predicts_like_base_and_live_network(tmp_path: Path) -> None:
    """The noise prediction and both text encoders agree to 1e-4 of their size, and differ from the base's."""
    script = Path(__file__).with_name("baked_prediction.py")
    environment = {**os.environ, "LYCORIS_KERNEL_BACKEND": "torch", "LYCORIS_KERNEL_TUNE": "off"}
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    figures = dict(line.split() for line in finished.stdout.splitlines() if len(line.split()) == 2)
    for part in ("noise", "text", "pooled"):
        assert float(figures[f"{part}_baked"]) < 1e-4
        assert float(figures[f"{part}_base"]) > 1e-2
