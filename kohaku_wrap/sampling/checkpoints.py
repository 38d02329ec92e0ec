"""The models to draw with: checkpoints, baked or with networks added as they are baked; told from headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.base_model import BadBaseModel, check_base_model, read_sizes
from kohaku_wrap.errors import KwrapError, ProblemsFound, UsageError
from kohaku_wrap.files import Progress, describe_absence
from kohaku_wrap.formats.safetensors import Header, read_header
from kohaku_wrap.formats.sdxl import VAE_PREFIX, list_tensor_names
from kohaku_wrap.merging.hashes import FileHashes, hash_files
from kohaku_wrap.merging.networks.files import is_network
from kohaku_wrap.merging.plan import MergePlan
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.sampling.sizes import find_sizes

WEIGHTED = re.compile(r"(?P<file>.+):(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))")
DIFFUSERS_VAE = "decoder.up_blocks.0.resnets.0.conv1.weight"


class NoModel(UsageError):
    """Nothing to draw with, or a file that is none."""


@dataclass(frozen=True)
class AddedNetwork:
    """A network and how strongly it is added."""

    path: Path
    """The file."""

    weight: str = "1"
    """A plain decimal, as it was written."""


@dataclass(frozen=True)
class Model:
    """A checkpoint and the networks that are added to it."""

    path: Path
    """The checkpoint."""

    networks: tuple[AddedNetwork, ...] = ()
    """In the order in which they were named."""

    label: str = ""
    """What contact sheets call it; empty for the files' names."""

    optimizer_step: int | None = None
    """The step of the run that the network was saved at, where it is a run's."""

    vae: Path | None = None
    """A file whose VAE takes the place of the checkpoint's own."""

    @property
    def title(self) -> str:
        """Its label, or the names of its files."""
        added = [f"{each.path.stem}:{each.weight}" if each.weight != "1" else each.path.stem for each in self.networks]
        return self.label or " + ".join([self.path.stem, *added])

    def describe(self) -> dict[str, Any]:
        """Its files, for a process that computes with it."""
        networks = [[str(each.path), each.weight] for each in self.networks]
        return {"path": str(self.path), "networks": networks, "vae": str(self.vae) if self.vae else None}

    @classmethod
    def of_files(cls, document: Mapping[str, Any]) -> Model:
        """The model of a description."""
        networks = tuple(AddedNetwork(Path(path), weight) for path, weight in document["networks"])
        return cls(Path(document["path"]), networks, vae=Path(document["vae"]) if document["vae"] else None)

    def plan(self) -> MergePlan:
        """The merge that adds the networks. Raises what `plan_merge` raises."""
        names = {f"n{place}": each for place, each in enumerate(self.networks)}
        terms = [f"{'-' if each.weight.startswith('-') else '+'} {each.weight.lstrip('+-')} * net({name})"
                 for name, each in names.items()]  # fmt: skip
        paths = {"base": self.path, **{name: each.path for name, each in names.items()}}
        return plan_merge(" ".join(["base", *terms]), paths)


def read_network(text: str) -> AddedNetwork:
    """A network of `FILE` or `FILE:WEIGHT`. Raises NoModel where there is no such file."""
    found = WEIGHTED.fullmatch(text)
    network = AddedNetwork(Path(found["file"]), found["weight"]) if found and not Path(text).exists() else None
    network = network or AddedNetwork(Path(text))
    if not network.path.is_file():
        absence = describe_absence(network.path, "network file")
        raise NoModel(f"{network.path}: {absence}", "Check the path: --network FILE[:WEIGHT].")
    return network


def check_model(model: Model) -> Header:
    """Raise NoModel, or what merging raises, unless pictures can be drawn with it; its checkpoint's header."""
    if not model.path.is_file():
        raise NoModel(
            f"{model.path}: {describe_absence(model.path)}", "Give the path of an SDXL checkpoint (.safetensors)."
        )
    header = read_header(model.path)
    if is_network(header):
        raise NoModel(
            f"{model.path}: this is a network, not a checkpoint",
            f"Give the checkpoint that it was trained on, and --network {model.path}.",
        )
    try:
        sizes_of = find_sizes(header)
        check_base_model(model.path, with_vae=model.vae is None, sizes_of=sizes_of)
    except BadBaseModel as error:
        raise KwrapError(error.message, "Give a whole SDXL checkpoint; its VAE may be another file: --vae.") from None
    if model.vae:
        check_vae(
            model.vae, [name.removeprefix(VAE_PREFIX) for name in list_tensor_names(read_sizes(sizes_of))["the VAE"]]
        )
    if model.networks:
        try:
            model.plan()
        except ProblemsFound as found:
            raise KwrapError(
                found.message,
                "Give a network for this checkpoint. To leave out what the checkpoint has no key for, bake it by "
                "`kwrap merge --unmatched skip`, and draw the baked file.",
            ) from None
    return header


def check_vae(path: Path, wanted: Sequence[str]) -> None:
    """Raise NoModel, or what reading a header raises, unless the file holds these tensors or diffusers' ones."""
    if not path.is_file():
        raise NoModel(f"{path}: {describe_absence(path)}", "Give the path of a VAE (.safetensors).")
    held = {name.removeprefix(VAE_PREFIX) for name in read_header(path).tensors}
    missing = [] if DIFFUSERS_VAE in held else [name for name in wanted if name not in held]
    if missing:
        raise NoModel(f"{path}: no VAE of SDXL: it lacks {len(missing):,} of {len(wanted):,} tensors ({missing[0]}, …)",
                      "Give a VAE, or an SDXL checkpoint whose VAE is wanted.")  # fmt: skip


def hash_models(models: Sequence[Model], on_progress: Progress) -> dict[Path, FileHashes]:
    """The hashes of every file of the models."""
    files = list(dict.fromkeys(path for model in models for path in files_of(model)))
    return dict(zip(files, hash_files(files, on_progress=on_progress), strict=True))


def files_of(model: Model) -> list[Path]:
    """The checkpoint, its networks, and a VAE of its own file."""
    return [model.path, *(each.path for each in model.networks), *([model.vae] if model.vae else [])]


def identify_model(model: Model, hashes: Mapping[Path, FileHashes]) -> str:
    """What a cell knows of the model: hashes and weights."""
    added = "".join(f"+{each.weight}*{hashes[each.path].sha256}" for each in model.networks)
    return hashes[model.path].sha256 + added + (f"+vae*{hashes[model.vae].sha256}" if model.vae else "")
