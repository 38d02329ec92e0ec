"""The layers that networks change, told by the networks alone, where no checkpoint is at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.formats.network_names import Target, checkpoint_name, is_diffusers_name, table_of_targets
from kohaku_wrap.formats.safetensors import FLOAT_DTYPES, Header, TensorSpot
from kohaku_wrap.formats.sdxl import SDXL_SIZES, list_tensor_names
from kohaku_wrap.merging.networks.files import LeaveOut, read_modules
from kohaku_wrap.merging.networks.modules import Module, Shape

CONVOLUTIONS = (
    (re.compile(r"lora_unet_.*(_in_layers_2|_out_layers_3|_op|_conv)|lora_unet_(input_blocks_0_0|out_2)"), (3, 3)),
    (re.compile(r"lora_unet_.*_skip_connection"), (1, 1)),
)
"""SD's and SDXL's convolutions by name: factors that are flat matrices do not say their kernel."""


@dataclass(frozen=True)
class OwnShapes:
    """What stands in for a checkpoint."""

    header: Header
    """The keys that the networks change, with their shapes and the type of the network's numbers; no file."""

    targets: dict[str, dict[str, Target]]
    """By module name, as table_of_targets gives them; a name that SDXL lacks is a key itself."""


def shapes_of_networks(networks: Mapping[str, Header], lenient: bool) -> OwnShapes:
    """The layers of all modules of `networks`, whose names become sgm's.

    `lenient`: leave out modules of unknown kinds. Raises what read_modules does.
    """
    known = table_of_targets(key for names in list_tensor_names(SDXL_SIZES).values() for key in names)
    targets: dict[str, dict[str, Target]] = {}
    spots: dict[str, TensorSpot] = {}
    ignore: LeaveOut | None = (lambda reason, key: None) if lenient else None
    for header in networks.values():
        for module in read_modules(header, ignore):
            name = checkpoint_name(module.name) if is_diffusers_name(module.name) else module.name
            for kind, shape in shapes_of_module(name, module):
                target = known.get(name, {}).get(kind) or Target(f"{name}.{kind}")
                targets.setdefault(name, {})[kind] = target
                whole = (shape[0] * target.parts, *shape[1:]) if shape else shape
                whole = whole[::-1] if target.is_transposed else whole
                first = next(spot.dtype for spot in module.tensors.values() if spot.dtype in FLOAT_DTYPES)
                before = spots.get(target.key)
                if before is None or len(whole) > len(before.shape):
                    spots[target.key] = TensorSpot(before.dtype if before else first, whole, 0, 0)
    return OwnShapes(Header(Path("the networks' own layers"), spots, {}, 0, 0), targets)


def shapes_of_module(name: str, module: Module) -> Iterator[tuple[str, Shape]]:
    """What a module changes, weight or bias, and its shape: (out, in, kernel…)."""
    spots = module.tensors
    for suffix in ("diff_b", "b_norm"):
        if suffix in spots:
            yield "bias", spots[suffix].shape
    if module.algorithm in ("full", "norm"):
        yield "weight", spots["diff" if module.algorithm == "full" else "w_norm"].shape
    elif module.algorithm != "bias":
        try:
            rows, elements = module.delta_size()
        except (KeyError, IndexError, ValueError):
            rows, elements = 1, 1  # match_modules says what is wrong with it
        kernel = kernel_of_module(name, module)
        area = kernel[0] * kernel[1] if kernel else 1
        yield "weight", (rows, elements // max(rows, 1) // max(area, 1), *kernel)


def kernel_of_module(name: str, module: Module) -> Shape:
    """The size of a convolution's kernel, by the shapes of its factors, else by the layer's name."""
    for suffix in ("lora_mid.weight", "lora_down.weight", "lokr_t2", "hada_t1", "lokr_w2"):
        shape = module.tensors[suffix].shape if suffix in module.tensors else ()
        if len(shape) == 4:
            return shape[2:]
    if "lora_down.weight" in module.tensors or "lokr_w2" in module.tensors:
        return ()
    return next((kernel for pattern, kernel in CONVOLUTIONS if pattern.fullmatch(name)), ())
