"""Networks that change a weight by what it is, and the names of other programs, against LyCORIS' own forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris.modules
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.formats.network_keys import read_network_key
from kohaku_wrap.formats.safetensors import MalformedFile, read_header
from kohaku_wrap.merging.inspecting import inspect_file
from kohaku_wrap.merging.networks.files import is_network
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge

from ..conftest import Tensors, WriteModel
from .test_networks import CONV, LINEAR, NAME_OF_CONV, NAME_OF_LINEAR

WriteNetwork = Callable[[str, Tensors], Path]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "OFT": ("DiagOFTModule", {"lora_dim": 4}),
    "OFT, rescaled and constrained": ("DiagOFTModule", {"lora_dim": 8, "constraint": 0.001, "rescaled": True}),
    "BOFT": ("ButterflyOFTModule", {"lora_dim": 4}),
    "BOFT, rescaled": ("ButterflyOFTModule", {"lora_dim": 8, "rescaled": True, "constraint": 0.01}),
    "GLoRA": ("GLoRAModule", {"lora_dim": 4, "alpha": 2}),
    "IA3 of outputs": ("IA3Module", {}),
    "IA3 of inputs": ("IA3Module", {"train_on_input": True}),
}


def put_on(class_name: str, options: dict[str, Any], weight: torch.Tensor, multiplier: float) -> tuple[Any, nn.Module]:
    """A LyCORIS module with random parameters on a layer with this weight, and the layer that it acts on."""
    torch.manual_seed(3)
    rows, columns, *kernel = weight.shape
    layer: Any = nn.Conv2d(columns, rows, kernel[0], padding=1) if kernel else nn.Linear(columns, rows)
    layer.weight.data.copy_(weight)
    module = getattr(lycoris.modules, class_name)("module", layer, multiplier, **options)
    for name, parameter in module.named_parameters():
        if "org" not in name:
            parameter.data.copy_(parameter.data + torch.randn_like(parameter) * 0.1)
    module.eval()
    module.apply_to()
    return module, layer


@pytest.mark.parametrize("multiplier", ["1.0", "0.6"])
@pytest.mark.parametrize("case", CASES)
def test_baked_weights_do_what_the_forward_does(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork, case: str, multiplier: str
) -> None:
    base_path = write_model("base", 1, torch.float32)
    base = load_file(base_path)
    layers: dict[str, Any] = {}
    tensors: Tensors = {}
    for key, name in ((LINEAR, NAME_OF_LINEAR), (CONV, NAME_OF_CONV)):
        module, layers[key] = put_on(*CASES[case], base[key], float(multiplier))
        state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else {}
        state = state or {key: value for key, value in module.state_dict().items() if "org" not in key}
        tensors |= {f"{name}.{suffix}": value.detach().clone() for suffix, value in state.items()}
        layers[f"{key} merged"] = module
    network = write_network("n", tensors)
    plan = plan_merge(f"base + {multiplier} * net(n)", {"base": base_path, "n": network})
    result = run_merge(plan, tmp_path / "o.safetensors", {}, threads=2, verify_elements=300)
    baked = load_file(tmp_path / "o.safetensors")
    assert result.verified > 0 and not torch.equal(baked[LINEAR], base[LINEAR])
    for key in (LINEAR, CONV):
        with torch.no_grad():
            own, _ = layers[f"{key} merged"].get_merged_weight(float(multiplier))
            assert torch.equal(baked[key], own.reshape(base[key].shape)), key
            x = torch.randn(2, 32, 5, 5) if base[key].dim() == 4 else torch.randn(7, 32)
            forward = layers[key](x)
            layer = layers[key]
            ours = (
                nn.functional.conv2d(x, baked[key], layer.bias, padding=1)
                if base[key].dim() == 4
                else nn.functional.linear(x, baked[key], layer.bias)
            )
        assert torch.allclose(ours, forward, atol=2e-5, rtol=1e-4)
    others = [key for key in base if key not in (LINEAR, CONV)]
    assert all(torch.equal(baked[key], base[key]) for key in others)
    kinds = inspect_file(network, hashed=False).kind
    assert case.split(",")[0].split()[0].removeprefix("B") in kinds


def test_what_does_not_fit_or_add_is_refused(write_model: WriteModel, write_network: WriteNetwork) -> None:
    base = write_model("base", 1)
    oft = {f"{NAME_OF_LINEAR}.oft_blocks": torch.zeros(16, 4, 4), f"{NAME_OF_LINEAR}.alpha": torch.tensor(0.0)}
    lora = {
        f"{NAME_OF_LINEAR}.lora_up.weight": torch.ones(64, 2),
        f"{NAME_OF_LINEAR}.lora_down.weight": torch.ones(2, 32),
    }
    wrong = {f"{NAME_OF_LINEAR}.oft_blocks": torch.zeros(15, 4, 4)}
    with pytest.raises(ProblemsFound, match=r"its tensors \(oft_blocks \[15, 4, 4\]\) do not fit"):
        plan_merge("base + net(n)", {"base": base, "n": write_network("w", wrong)})
    paths = {"base": base, "n": write_network("n", oft), "m": write_network("m", lora)}
    with pytest.raises(ProblemsFound, match="n is no sum"):
        plan_merge("base + net(n) + net(m)", paths)
    twice = {**lora, "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(64, 2),
             "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(2, 32)}  # fmt: skip
    with pytest.raises(ProblemsFound, match="names the same layer as lora_unet_"):
        plan_merge("base + net(n)", {"base": base, "n": write_network("t", twice)})
    same = {**lora, "diffusion_model.input_blocks.4.1.proj_in.lora_up.weight": torch.ones(64, 2)}
    with pytest.raises(MalformedFile, match="another key for lora_unet_input_blocks_4_1_proj_in"):
        plan_merge("base + net(n)", {"base": base, "n": write_network("s", same)})


LAYERS = {
    NAME_OF_LINEAR: ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", (64, 32)),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q", (64, 64)),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_model.encoder.layers.0.mlp.fc1", "", (64, 32)),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_model.encoder.layers.1.mlp.fc1", "", (64, 32)),
}  # fmt: skip


def test_an_alpha_of_0_is_told(write_model: WriteModel, write_network: WriteNetwork) -> None:
    tensors = {
        f"{NAME_OF_LINEAR}.lora_up.weight": torch.ones(64, 2),
        f"{NAME_OF_LINEAR}.lora_down.weight": torch.ones(2, 32),
    }
    for alpha, count in ((torch.tensor(0), 1), (torch.tensor(0.0).half(), 1), (torch.tensor(0.5), 0)):
        network = write_network("n", {**tensors, f"{NAME_OF_LINEAR}.alpha": alpha})
        plan = plan_merge("base + net(n)", {"base": write_model("base", 1), "n": network})
        assert sum("ComfyUI and A1111 would add nothing" in line for line in plan.decisions) == count


@pytest.mark.parametrize(
    ("name", "metadata", "config", "told"),
    [
        ("a", {"unet.lora_alpha": 16, "unet.r": 4}, None, ["16 and r 4: PEFT adds 4 times"]),
        ("a", {"unet.lora_alpha": 16, "unet.r": 4, "unet.use_rslora": True}, None, ["PEFT adds 8 times"]),
        ("a", {"unet.lora_alpha": 4, "unet.r": 4, "text_encoder.lora_alpha": "x", "text_encoder.r": 4}, None, []),
        ("a", {}, {"lora_alpha": 8, "r": 4}, []),
        ("adapter_model", {}, {"lora_alpha": 8, "r": 4}, ["adapter_config.json says lora_alpha 8 and r 4"]),
        ("adapter_model", {}, {"lora_alpha": 4, "r": 4}, []),
        ("adapter_model", {}, ["odd"], []),
        ("adapter_model", {}, {"lora_alpha": 10**400, "r": 4}, []),
        ("a", {"unet.lora_alpha": 8, "unet.r": math.inf}, None, []),
    ],
)
def test_a_scale_that_only_peft_reads_is_named(
    tmp_path: Path, write_model: WriteModel, name: str, metadata: dict[str, Any], config: object, told: list[str]
) -> None:
    path = "base_model.model.down_blocks.1.attentions.0.proj_in"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 32), f"{path}.lora_B.weight": torch.ones(64, 4)}
    network = tmp_path / f"{name}.safetensors"
    (tmp_path / "adapter_config.json").write_text("{" if config is None else json.dumps(config))
    for alpha in ({}, {f"{path}.alpha": torch.tensor(4.0)}):
        save_file(tensors | alpha, network, {"lora_adapter_metadata": json.dumps(metadata)})
        decisions = plan_merge("base + net(n)", {"base": write_model("base", 1), "n": network}).decisions
        found = [line for line in decisions if "so the scale is 1" in line]
        assert len(found) == (len(told) if not alpha else 0)
        assert all(text in line for text, line in zip(told, found, strict=False))


DIFFUSERS_PARTS = {"unet": "unet.{path}", "te1": "text_encoder.{path}", "te2": "text_encoder_2.{path}"}
FORMS: dict[str, tuple[dict[str, str], str]] = {
    "PEFT in diffusers": (DIFFUSERS_PARTS, ".lora_A.weight"),
    "diffusers of old": (DIFFUSERS_PARTS, ".lora_linear_layer.down.weight"),
    "OMI": ({"unet": "unet.{path}", "te1": "clip_l.{path}", "te2": "clip_g.{path}"}, ".lora_down.weight"),
    "ComfyUI": (
        {"unet": "diffusion_model.{own}", "te1": "text_encoders.clip_l.transformer.{path}",
         "te2": "text_encoders.clip_g.transformer.{path}"}, ".lora_A.weight"),
    "SimpleTuner": (
        {"unet": "lycoris_{flat}", "te1": "lora_te1_{flat}", "te2": "lora_te2_{flat}"}, ".lora_down.weight"),
}  # fmt: skip
"""How other programs name a module of each part, and the tensor that kohya calls lora_down.weight."""


@pytest.mark.parametrize("form", FORMS)
def test_names_of_other_programs_are_read_as_what_they_are(
    tmp_path: Path, write_model: WriteModel, write_network: WriteNetwork, form: str
) -> None:
    base = write_model("base", 1, torch.float32)
    torch.manual_seed(1)
    kohya: Tensors = {}
    theirs: Tensors = {}
    for name, (path, own, (rows, columns)) in LAYERS.items():
        part = name.split("_")[1]
        down, up = torch.randn(4, columns), torch.randn(rows, 4)
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        key = FORMS[form][0][part].format(path=path, own=own, flat=path.replace(".", "_")) + FORMS[form][1]
        theirs |= {key: down, key.replace("lora_A", "lora_B").replace("down.weight", "up.weight"): up}
    found = []
    for tensors in (kohya, theirs):
        network = write_network("n", tensors)
        assert is_network(read_header(network)) and "LoRA" in inspect_file(network, hashed=False).kind
        plan = plan_merge("base + 0.5 * net(n)", {"base": base, "n": network})
        run_merge(plan, tmp_path / "o.safetensors", {}, threads=1)
        found.append(load_file(tmp_path / "o.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert sum(not torch.equal(found[0][key], value) for key, value in load_file(base).items()) == len(LAYERS)


def test_keys_of_checkpoints_and_of_unknown_kinds_keep_their_names() -> None:
    assert read_network_key("bundle_emb.abc.clip_l") == ("bundle_emb", "abc.clip_l")
    assert read_network_key("base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.default_0.weight") == (
        "lora_unet_down_blocks_1_attentions_0_proj_in", "lora_down.weight")  # fmt: skip
    assert read_network_key("unet.down_blocks.0.x.processor.to_out_lora.up.weight")[1] == "lora_up.weight"
