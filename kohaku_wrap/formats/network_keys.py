"""The keys of network files in the forms that programs write, read as kohya's: a module's name and its tensor."""

from __future__ import annotations

import re

from kohaku_wrap.formats.layouts import part_of_key, place_key, strip_prefix

KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_")
LYCORIS_PREFIX = "lycoris_"
PREFIX_OF_PART = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"}
WRAPPERS = ("base_model.model.", "transformer.")

TENSOR = re.compile(
    r"(?P<module>.+?)\.(?P<tensor>"
    r"lora_(?:up|down|mid)\.weight|lora_[AB](?:\.default\w*)?(?:\.weight)?|lora\.(?:up|down)\.weight|lora_(?:up|down)"
    r"|lora_linear_layer\.(?:up|down)\.weight|lora_magnitude_vector(?:\.default\w*)?(?:\.weight)?"
    r"|(?:hada|lokr)_\w+|oft_\w+|rescale|[ab][12]\.weight|bm\.weight|on_input|dora_scale|diff|diff_b|[wb]_norm|alpha)"
)
ATTENTION_PROCESSOR = re.compile(
    r"(?P<module>.+)\.processor\.(?P<layer>to_(?:q|k|v|out))_lora\.(?P<way>up|down)\.weight"
)
TENSOR_OF_OTHERS = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora.down": "lora_down.weight",
    "lora.up": "lora_up.weight",
    "lora_linear_layer.down": "lora_down.weight",
    "lora_linear_layer.up": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
"""What PEFT and diffusers call a module's tensors, and kohya's word for each."""


def read_network_key(key: str) -> tuple[str, str]:
    """The module and the tensor that a key of a network means, in kohya's words.

    `lora_unet_…` is split at its first dot; `lycoris_…` (SimpleTuner) is the UNet; names with dots (PEFT, diffusers,
    OMI, ComfyUI) get the prefix of their part. What belongs to none keeps its name.
    """
    name, _, tensor = key.partition(".")
    if name.startswith(LYCORIS_PREFIX):
        return f"lora_unet_{name.removeprefix(LYCORIS_PREFIX)}", tensor
    if name.startswith(KOHYA_PREFIXES):
        return name, tensor
    if found := ATTENTION_PROCESSOR.fullmatch(key):
        layer = f"{found['layer']}.0" if found["layer"] == "to_out" else found["layer"]
        return name_module(f"{found['module']}.{layer}"), f"lora_{found['way']}.weight"
    if not (found := TENSOR.fullmatch(key)):
        return name, tensor
    word = found["tensor"].removesuffix(".weight").partition(".default")[0]
    return name_module(found["module"]), TENSOR_OF_OTHERS.get(word, found["tensor"])


def name_module(path: str) -> str:
    """kohya's name of a module by its path; the path itself, with underscores, where its part is not known."""
    for wrapper in WRAPPERS:
        path = path.removeprefix(wrapper)
    part, inner = place_key(f"{path}.weight")
    if not part:
        part = part_of_key(path)
        inner = strip_prefix(path, part)
    return (PREFIX_OF_PART.get(part, "") + inner.removesuffix(".weight")).replace(".", "_")


def is_network_key(key: str) -> bool:
    """Whether a key is of a network in any of these forms, and of no checkpoint."""
    name, _, tensor = key.partition(".")
    if name.startswith((*KOHYA_PREFIXES, LYCORIS_PREFIX)):
        return bool(tensor)
    return any(mark in key for mark in (".lora", "_lora.", ".lokr_", ".hada_", ".oft_blocks"))
