"""The layouts in which people keep SD and SDXL models or parts of them, and the single-file names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from kohaku_wrap.formats.network_names import FUSED_PARTS, MODULES_OF_RESBLOCK, MODULES_OF_TEXT_ENCODER_2, split_kind
from kohaku_wrap.formats.safetensors import Header, MalformedFile, TensorSpot
from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_PREFIX

SD1_PREFIX = "cond_stage_model.transformer."
PREFIXES_OF_PART = {
    "unet": (UNET_PREFIX,),
    "te1": ("conditioner.embedders.0.", "cond_stage_model."),
    "te2": ("conditioner.embedders.1.",),
    "vae": (VAE_PREFIX,),
}
"""How single-file names begin, by part; the text encoder of SD 1 and 2, and the refiner's only one, are te1."""

WORDS_OF_PART = {"unet": "UNet", "te1": "text encoder 1", "te2": "text encoder 2", "vae": "VAE"}
WRAPPERS = ("module.", "state_dict.", "model.")
PREFIXES_OF_OTHERS = {
    "diffusion_model.": "unet", "unet.": "unet", "vae.": "vae",
    "text_encoder.": "te1", "text_encoder_2.": "te2",
    "text_encoders.clip_l.transformer.": "te1", "text_encoders.clip_g.transformer.": "te2",
    "clip_l.transformer.": "te1", "clip_g.transformer.": "te2", "clip_l.": "te1", "clip_g.": "te2",
}  # fmt: skip
"""How other programs mark a part."""

SGM_UNET = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)\.|out\.[0-9]+\.")
DIFFUSERS_UNET = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)\."
)
VAE = re.compile(r"(?:encoder|decoder)\.(?:conv_|norm_out|down|up|mid)|(?:post_)?quant_conv\.")
DIFFUSERS_VAE = re.compile(r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block|conv_norm_out)\.")
CLIP = re.compile(r"text_model\.|text_projection\.weight$")
OPEN_CLIP = re.compile(
    r"transformer\.resblocks\.|(?:token_embedding\.weight|positional_embedding|text_projection)$|ln_fi"
)

UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
BLOCK_OF_DIFFUSERS = re.compile(
    r"(?:(down|up)_blocks\.([0-9]+)|(mid)_block)\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]+)\.(.+)"
)
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v",
    "to_out.0": "proj_out", "proj_attn": "proj_out",
}  # fmt: skip
CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.([0-9]+)\.(.+)")
MIDDLE_OF_UNET = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
WIDTH_OF_TEXT_ENCODER_1, WIDTH_OF_TEXT_ENCODER_2 = 768, 1280


@dataclass(frozen=True)
class Layout:
    """A file of a model, its tensors under their single-file names."""

    header: Header
    """With these names; what they are made of lies where it lay."""

    form: str
    """Of the names in the file, in words; empty for a single file's own."""

    parts: tuple[str, ...]
    """Those of PREFIXES_OF_PART that it has tensors of."""

    @property
    def kind(self) -> str:
        """What the file is, in words."""
        keys = self.header.tensors
        whole = self.whole_model()
        if whole:
            return f"{whole}{f' ({self.form})' if self.form else ''}"
        if self.parts == ("unet",):
            return f"UNet {self.form}" if self.form else "UNet of a checkpoint"
        if self.parts:
            words = " and ".join(WORDS_OF_PART[part] for part in self.parts)
            return f"{words} {self.form}" if self.form else words
        return "tensors of no known model" if keys else "no tensors"

    def whole_model(self) -> str:
        """The name of a model with its UNet and text encoders; empty for parts."""
        if any(key.startswith("cond_stage_model.") for key in self.header.tensors):
            return "SD 1 or 2 checkpoint"
        if "unet" not in self.parts:
            return ""
        if any(key.startswith("conditioner.embedders.0.model.transformer.") for key in self.header.tensors):
            return "SDXL refiner checkpoint"
        return "SDXL checkpoint" if "te2" in self.parts else ""

    @property
    def architecture(self) -> str:
        """As modelspec.architecture spells it; empty where the file does not show it."""
        keys = self.header.tensors
        if self.whole_model() == "SDXL refiner checkpoint":
            return "stable-diffusion-xl-v1-refiner"
        if any(key.startswith("cond_stage_model.model.") for key in keys):
            return "stable-diffusion-v2"
        if any(key.startswith("cond_stage_model.") for key in keys):
            return "stable-diffusion-v1"
        is_sdxl = "te2" in self.parts or any(key.startswith(f"{UNET_PREFIX}label_emb.") for key in keys)
        return "stable-diffusion-xl-v1-base" if is_sdxl else ""


def part_of_key(key: str) -> str:
    """The part that a single-file name belongs to; empty where to none."""
    return next((part for part, prefixes in PREFIXES_OF_PART.items() if key.startswith(prefixes)), "")


def read_layout(header: Header, sd1: bool = False) -> Layout:
    """The file with its tensors under single-file names; those of no known layout keep their own.

    `sd1`: whether a CLIP without prefix is SD 1's. Raises MalformedFile where two tensors would have one name.
    """
    placed = {key: place_key(key) for key in header.tensors}
    inner = {part: [path for its_part, path in placed.values() if its_part == part] for part in PREFIXES_OF_PART}
    renamers: dict[str, Callable[[str, TensorSpot], tuple[str, TensorSpot]]] = {
        "unet": UnetNames(inner["unet"]).rename,
        "vae": VaeNames(inner["vae"]).rename,
        "te1": partial(name_in_clip, SD1_PREFIX if sd1 else TEXT_ENCODER_PREFIX),
    }
    clip_part = part_of_clip(header.tensors)
    tensors: dict[str, TensorSpot] = {}
    fused: dict[str, dict[int, tuple[str, TensorSpot]]] = {}
    forms: list[str] = []
    for key, spot in header.tensors.items():
        part, path = placed[key]
        part = clip_part if part == "clip" else part
        name, new_spot = key, spot
        if part == "te2":
            name, new_spot, place = name_in_open_clip(path, spot)
            if place is not None:
                fused.setdefault(name, {})[place] = key, spot
                forms.append("in diffusers' form")
                continue
        elif part in renamers and path:
            name, new_spot = renamers[part](path, spot)
        if name != key:
            forms.append(form_of(key, path))
        if name in tensors:
            raise MalformedFile(header.path, [f"{key!r} is another tensor that stands for {name!r}"])
        tensors[name] = new_spot
    for name, spots in fused.items():
        if name in tensors:
            raise MalformedFile(header.path, [f"two tensors stand for {name!r}"])
        tensors.update(join_fused(name, spots))
    form = max(set(forms), key=forms.count) if forms else ""
    found_parts = {part_of_key(name) for name in tensors}
    return Layout(
        replace(header, tensors=tensors), form, tuple(part for part in PREFIXES_OF_PART if part in found_parts)
    )


def place_key(key: str) -> tuple[str, str]:
    """The part that a key belongs to, and its name inside that; the part is empty for a single file's own names.

    The part `clip` is a text encoder whose place among the two the file must tell.
    """
    path = key.replace("_orig_mod.", "")
    while True:
        if part_of_key(path) or path.startswith(("model_ema.", "denoiser.")):
            part = part_of_key(path)
            return ("", "") if path == key else (part, strip_prefix(path, part))
        for prefix, part in PREFIXES_OF_OTHERS.items():
            if path.startswith(prefix):
                return part, path.removeprefix(prefix)
        if SGM_UNET.match(path) or DIFFUSERS_UNET.match(path):
            return "unet", path
        if VAE.match(path):
            return "vae", path
        if CLIP.match(path):
            return "clip", path
        if OPEN_CLIP.match(path):
            return "te2", path
        wrapper = next((prefix for prefix in WRAPPERS if path.startswith(prefix)), "")
        if not wrapper:
            return "", ""
        path = path.removeprefix(wrapper)


def strip_prefix(path: str, part: str) -> str:
    """The name inside its part, where `rename` would put the same prefix before it again."""
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "te1": TEXT_ENCODER_PREFIX, "te2": TEXT_ENCODER_2_PREFIX}
    return path.removeprefix(prefixes.get(part, ""))


def form_of(key: str, path: str) -> str:
    """How a key differs from a single file's, in words."""
    if "_orig_mod." in key:
        return "of a compiled model (`_orig_mod.`)"
    if DIFFUSERS_UNET.match(path) or DIFFUSERS_VAE.match(path) or CLIP.match(path):
        return "in diffusers' form"
    return "without its prefix" if key == path else "under another prefix"


def part_of_clip(tensors: Mapping[str, TensorSpot]) -> str:
    """Which text encoder the tensors of a CLIP without prefix are, by its width, else by its projection."""
    widths = {
        size
        for key, spot in tensors.items()
        if key.endswith(("self_attn.q_proj.weight", "norm.weight"))
        for size in spot.shape[-1:]
    }
    if WIDTH_OF_TEXT_ENCODER_1 in widths:
        return "te1"
    projects = any(key.endswith("text_projection.weight") for key in tensors)
    return "te2" if projects or WIDTH_OF_TEXT_ENCODER_2 in widths else "te1"


class UnetNames:
    """Names of a UNet in sgm's terms, from diffusers' or its own."""

    def __init__(self, paths: Iterable[str]) -> None:
        """`paths`: all names inside the UNet, which tell how many layers a block has and where it attends."""
        found = [match.groups() for path in paths if (match := BLOCK_OF_DIFFUSERS.match(path))]
        layers = [int(number) for way, _, _, kind, number, _ in found if way == "down" and kind == "resnets"]
        self.stride = max(layers, default=1) + 2
        self.attends = {int(block) for way, block, _, kind, _, _ in found if way == "up" and kind == "attentions"}

    def rename(self, path: str, spot: TensorSpot) -> tuple[str, TensorSpot]:
        """The single-file name of a tensor."""
        module, kind = split_kind(path)
        if module in UNET_ENDS:
            return f"{UNET_PREFIX}{UNET_ENDS[module]}.{kind}", spot
        match = BLOCK_OF_DIFFUSERS.match(path)
        return f"{UNET_PREFIX}{self.name_in_block(*match.groups()) if match else path}", spot

    def name_in_block(self, way: str | None, block: str | None, _: str, kind: str, number: str, rest: str) -> str:
        place, at = int(number), int(block or 0)
        if kind == "resnets":
            module, ending = split_kind(rest)
            rest = f"{UNET_RESNET.get(module, module)}.{ending}"
        if way is None:
            return f"middle_block.{MIDDLE_OF_UNET.get((kind, place), 3)}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{self.stride * (at + 1)}.0.{rest.replace('conv.', 'op.')}"
        if kind == "upsamplers":
            return f"output_blocks.{self.stride * at + self.stride - 1}.{2 if at in self.attends else 1}.{rest}"
        row = (
            f"input_blocks.{1 + self.stride * at + place}"
            if way == "down"
            else f"output_blocks.{self.stride * at + place}"
        )
        return f"{row}.{int(kind == 'attentions')}.{rest}"


class VaeNames:
    """Names of a VAE in sgm's terms, from diffusers' or its own."""

    def __init__(self, paths: Iterable[str]) -> None:
        """`paths`: all names inside the VAE; the levels of its decoder count the other way in diffusers."""
        found = [re.match(r"decoder\.up_blocks\.([0-9]+)\.", path) for path in paths]
        self.last_level = max((int(match.group(1)) for match in found if match), default=0)

    def rename(self, path: str, spot: TensorSpot) -> tuple[str, TensorSpot]:
        """The single-file name of a tensor; an attention's matrices are convolutions of size 1 there."""
        half, _, rest = path.partition(".")
        match = BLOCK_OF_DIFFUSERS.match(rest)
        if rest.startswith("conv_norm_out."):
            return f"{VAE_PREFIX}{half}.{rest.replace('conv_norm_out', 'norm_out')}", spot
        if not match:
            return f"{VAE_PREFIX}{path}", spot
        way, block, _, kind, number, inner = match.groups()
        module, ending = split_kind(inner)
        level = int(block or 0) if way == "down" else self.last_level - int(block or 0)
        if kind == "attentions":
            shape = (*spot.shape, 1, 1) if len(spot.shape) == 2 else spot.shape
            name = f"mid.attn_1.{VAE_ATTENTION.get(module, module)}"
            return f"{VAE_PREFIX}{half}.{name}.{ending}", replace(spot, shape=shape)
        module = "nin_shortcut" if module == "conv_shortcut" else module
        place = f"mid.block_{int(number) + 1}" if way is None else f"{way}.{level}.block.{number}"
        if kind in ("downsamplers", "upsamplers"):
            place = f"{way}.{level}.{'downsample' if way == 'down' else 'upsample'}"
        return f"{VAE_PREFIX}{half}.{place}.{module}.{ending}", spot


def name_in_clip(prefix: str, path: str, spot: TensorSpot) -> tuple[str, TensorSpot]:
    """The name of a tensor of the first text encoder, which is the same everywhere behind the single file's prefix."""
    return (path if path.startswith("con") else f"{prefix}{path}"), spot


def name_in_open_clip(path: str, spot: TensorSpot) -> tuple[str, TensorSpot, int | None]:
    """The single-file name of a tensor of the second text encoder, from transformers' names or OpenCLIP's.

    Behind it the place among query, key and value of one that is part of a fused tensor, whose name it then is.
    """
    if path == "text_projection.weight":
        swapped = replace(spot, shape=spot.shape[::-1], is_transposed=True)
        return f"{TEXT_ENCODER_2_PREFIX}text_projection", swapped, None
    layer = CLIP_LAYER.fullmatch(path)
    if not layer:
        module, kind = split_kind(path)
        named = {name.removeprefix("text_model_"): key for key, name in MODULES_OF_TEXT_ENCODER_2.items()}
        found = (
            named.get(module.removeprefix("text_model.").replace(".", "_")) if path.startswith("text_model.") else None
        )
        ending = "" if found == "positional_embedding" else f".{kind}"
        return f"{TEXT_ENCODER_2_PREFIX}{f'{found}{ending}' if found else path}", spot, None
    block = f"{TEXT_ENCODER_2_PREFIX}transformer.resblocks.{layer.group(1)}"
    module, kind = split_kind(layer.group(2))
    for place, name in enumerate(FUSED_PARTS):
        if module == f"self_attn.{name}":
            return f"{block}.attn.in_proj_{kind}", spot, place
    named = {name: key for key, name in MODULES_OF_RESBLOCK.items()}
    return f"{block}.{named.get(module.replace('.', '_'), module)}.{kind}", spot, None


def join_fused(key: str, shares: Mapping[int, tuple[str, TensorSpot]]) -> dict[str, TensorSpot]:
    """The fused tensor of query, key and value; they themselves where one is missing or unlike the others."""
    listed = [spot for _, (_, spot) in sorted(shares.items())]
    if len(listed) != len(FUSED_PARTS) or len({(spot.dtype, spot.shape) for spot in listed}) > 1:
        return dict(shares.values())
    shape = (len(listed) * listed[0].shape[0], *listed[0].shape[1:])
    return {key: TensorSpot(listed[0].dtype, shape, 0, sum(spot.size_bytes for spot in listed), tuple(listed))}
