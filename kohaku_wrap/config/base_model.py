"""Whether a file is a whole SDXL, told from its header alone: which tensors it must hold, and whether it was cut.

Only names are compared here; the trainer compares the shapes when it loads the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.site import Site
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.formats.predictions import find_prediction
from kohaku_wrap.formats.safetensors import Header, MalformedFile, read_header
from kohaku_wrap.formats.sdxl import SDXL_SIZES, list_tensor_names
from kohaku_wrap.wording import name_first

WEIGHT_OPTIONS = ("pretrained_model_name_or_path", "vae", "network_weights", "base_weights")
"""The trainer's options that name files of weights."""

PICKLED_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class UnpickledByName(KwrapError):
    """A file that the trainer would unpickle, whatever it holds."""


class BadBaseModel(KwrapError):
    """The base model's file cannot be read or is not an SDXL of the expected sizes."""


def read_sizes(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The configs of the four parts. Raises BadBaseModel where `config.json` lacks one."""
    config = path.with_name("config.json")
    if not config.is_file():
        return SDXL_SIZES
    with refusing(BadBaseModel, f"{config}: not the sizes of an SDXL", "Restore it, or remove it for a full SDXL."):
        document = parse_json(read_regular(config))
        return {part: dict(document[part]) for part in SDXL_SIZES}


def check_base_model(path: Path, with_vae: bool = True, sizes_of: Path | None = None) -> None:
    """Raise BadBaseModel unless the file is safetensors in full length with every tensor of an SDXL.

    `with_vae`: whether its own VAE is needed. `sizes_of`: the model beside which its sizes stand, where not beside it.
    Raises PickledFile, too.
    """
    try:
        held = require_safetensors(path).tensors
    except MalformedFile as fault:
        raise BadBaseModel(fault.message, fault.next_step) from None
    faults = []
    for part, names in list_tensor_names(read_sizes(sizes_of or path)).items():
        missing = [name for name in names if name not in held]
        if missing and (with_vae or part != "the VAE"):
            faults.append(f"{part} lacks {len(missing):,} of {len(names):,} tensors ({name_first(missing)})")
    if faults:
        is_network = any(name.startswith("lora_") for name in held)
        what = "a network, not a base model" if is_network else "not a whole SDXL"
        raise BadBaseModel(f"{path}: {what}: {'; '.join(faults)}", "Set `base_model` in site.toml to a whole SDXL.")


def require_safetensors(path: Path) -> Header:
    """The header of a file of weights that the trainer will load.

    The trainer goes by the name alone: what is not called `.safetensors` it unpickles, and that can run code. Raises
    PickledFile, also for a pickle of that name, UnpickledByName for another name, MalformedFile.
    """
    header = read_header(path)
    if path.suffix != ".safetensors":
        raise UnpickledByName(
            f"{path}: the trainer would unpickle this file by its name, and that can run code",
            "It is a safetensors file: give it a name that ends in .safetensors.",
        )
    return header


def require_weight_files(options: Mapping[str, Any], folder: Path) -> None:
    """Check all files of weights that the trainer's options name; relative paths lie below `folder`.

    Raises what `require_safetensors` raises, and UnpickledByName where a file is not there under a name that would be
    unpickled.
    """
    for option in WEIGHT_OPTIONS:
        value = options.get(option)
        for text in value if isinstance(value, list) else [value]:
            if not text:
                continue
            path = folder / str(text)
            if path.is_file():
                require_safetensors(path)
            elif path.suffix.lower() in PICKLED_SUFFIXES:
                raise UnpickledByName(
                    f"{option}: {text} would be unpickled, and that can run code", "Name a .safetensors file."
                )
            elif path.is_dir():
                raise UnpickledByName(
                    f"{option}: {text} is a folder, whose files may be pickled", "Name a .safetensors file."
                )


def needs_own_vae(site: Site) -> bool:
    """Whether the base model's VAE is read: sd-scripts reads it even where another one takes its place."""
    return site.paths.vae is None or site.machine.engine != "builtin"


def note_other_prediction(effective: Effective) -> list[str]:
    """A sentence where the site's base model predicts something else than what the template trains."""
    base = effective.site.paths.base_model if effective.site else None
    if base is None or not base.is_file():
        return []
    try:
        prediction = find_prediction(read_header(base))
    except (MalformedFile, OSError):
        return []
    trains_velocity = bool(effective.get("v_parameterization"))
    if prediction.kind == "v" and not trains_velocity:
        return [
            f"{base.name} predicts velocity ({prediction.source}) and this template trains it to predict noise: "
            "v_parameterization = true goes on with velocity, as in the template sdxl-vpred"
        ]
    if trains_velocity and prediction.kind != "v":
        source = prediction.source or "nothing in it says another"
        return [
            f"{base.name} predicts noise ({source}) and this template trains it to predict velocity: the model has to "
            "learn that first; v_parameterization = false goes on with noise"
        ]
    if prediction.zero_terminal_snr and not effective.get("zero_terminal_snr"):
        return [
            f"{base.name} has a noise schedule that ends in pure noise (its key ztsnr) and this template trains "
            "without: zero_terminal_snr = true goes on with it"
        ]
    return []
