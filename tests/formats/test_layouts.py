"""Parts of models in other layouts, against the names that diffusers and transformers give their own modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.formats.layouts import read_layout
from kohaku_wrap.formats.safetensors import Header, MalformedFile, TensorSpot
from kohaku_wrap.formats.sdxl import SDXL_SIZES, list_tensor_names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PARTS = {"unet": "the UNet", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2", "vae": "the VAE"}


def header_of(shapes: Mapping[str, tuple[int, ...]]) -> Header:
    return Header(Path("x"), {key: TensorSpot("F16", shape, 0, 0) for key, shape in shapes.items()}, {}, 0, 0)


def build(part: str) -> Any:
    sizes = SDXL_SIZES[part]
    with torch.device("meta"):
        if part == "unet":
            return diffusers.UNet2DConditionModel(**sizes)
        if part == "vae":
            return diffusers.AutoencoderKL(**sizes)
        kind = transformers.CLIPTextModel if part == "text_encoder" else transformers.CLIPTextModelWithProjection
        return kind(transformers.CLIPTextConfig(**sizes))


def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in build(part).state_dict().items() if "position_ids" not in key}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_a_diffusers_folder_has_all_names_of_the_single_file(part: str, prefix: str) -> None:
    shapes = shapes_of(part)
    layout = read_layout(header_of({prefix + key: shape for key, shape in shapes.items()}))
    assert set(layout.header.tensors) == set(list_tensor_names(SDXL_SIZES)[PARTS[part]])
    assert len(layout.parts) == 1 and layout.form
    attention = layout.header.tensors.get("first_stage_model.encoder.mid.attn_1.q.weight")
    assert attention is None or attention.shape == (512, 512, 1, 1)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_names_of_diffusers_stand_for_the_tensor_that_diffusers_itself_loads(part: str) -> None:
    """Every tensor has its own number of elements times its place; diffusers' own converter says which is which."""
    from diffusers.loaders import single_file_utils as utils

    names = list_tensor_names(SDXL_SIZES)[PARTS[part]]
    with torch.device("meta"):
        numbered = {name: torch.empty(place + 1) for place, name in enumerate(names)}
    if part == "unet":
        config = {**SDXL_SIZES["unet"], "class_embed_type": None, "num_class_embeds": None}
        converted = utils.convert_ldm_unet_checkpoint(dict(numbered), config)
    else:
        converted = utils.convert_ldm_vae_checkpoint(dict(numbered), SDXL_SIZES["vae"])
    layout = read_layout(header_of({key: tuple(tensor.shape) for key, tensor in converted.items()}))
    assert {key: spot.shape for key, spot in layout.header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in numbered.items()
    }


@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "_orig_mod.", "model.model.diffusion_model.", "model._orig_mod.diffusion_model."]
)
def test_a_unet_under_another_prefix_is_one(prefix: str) -> None:
    names = list_tensor_names(SDXL_SIZES)["the UNet"]
    inner = {name.removeprefix("model.diffusion_model."): (1,) for name in names}
    layout = read_layout(header_of({prefix + name: shape for name, shape in inner.items()}))
    assert set(layout.header.tensors) == set(names)
    assert layout.kind.startswith("UNet ")


def test_a_whole_checkpoint_keeps_its_names() -> None:
    names = [name for part in list_tensor_names(SDXL_SIZES).values() for name in part]
    layout = read_layout(header_of(dict.fromkeys(names, (1,))))
    assert list(layout.header.tensors) == names
    assert (layout.form, layout.kind, layout.architecture) == ("", "SDXL checkpoint", "stable-diffusion-xl-v1-base")


@pytest.mark.parametrize(
    ("key", "kind", "architecture"),
    [
        ("cond_stage_model.transformer.text_model.a", "SD 1 or 2 checkpoint", "stable-diffusion-v1"),
        ("cond_stage_model.model.transformer.a", "SD 1 or 2 checkpoint", "stable-diffusion-v2"),
        ("conditioner.embedders.0.model.transformer.a", "SDXL refiner checkpoint", "stable-diffusion-xl-v1-refiner"),
        ("conditioner.embedders.1.model.ln_final.bias", "SDXL checkpoint", "stable-diffusion-xl-v1-base"),
    ],
)
def test_models_are_called_what_they_are(key: str, kind: str, architecture: str) -> None:
    layout = read_layout(header_of({"model.diffusion_model.input_blocks.0.0.weight": (1,), key: (1,)}))
    assert (layout.kind, layout.architecture) == (kind, architecture)


def test_a_single_number_tells_no_width() -> None:
    layout = read_layout(header_of({"text_model.norm.weight": (), "text_model.a.norm.weight": (1280,)}))
    assert layout.parts == ("te2",)


def test_two_tensors_for_one_name_are_refused() -> None:
    header = header_of({"input_blocks.0.0.bias": (1,), "model.diffusion_model.input_blocks.0.0.bias": (1,)})
    with pytest.raises(MalformedFile, match="another tensor that stands for"):
        read_layout(header)
