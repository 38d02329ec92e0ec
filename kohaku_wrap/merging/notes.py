"""What a merge decides where the files leave a choice, one line each, with the keys that it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.formats.layouts import WORDS_OF_PART, Layout
from kohaku_wrap.formats.predictions import MARKS
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.merging.blocks import blocks_of_key
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.formula.tree import Blocks, Only, walk_formula
from kohaku_wrap.merging.networks.files import Change, is_network
from kohaku_wrap.merging.plan import TensorPlan
from kohaku_wrap.wording import count_of, name_first

LIKE = "(like)"
VAE = "(vae)"
ADAPTER_METADATA = "lora_adapter_metadata"
ADAPTER_CONFIG = "adapter_config.json"
SCALED = ("LoRA", "LoHa", "LoKr", "GLoRA")
"""Algorithms that alpha / rank scales."""

MOST = 1 << 32
"""Of an alpha and of a rank that a config means."""


def find_scales(header: Header) -> Iterator[tuple[str, float, float, float]]:
    """What the configs of PEFT and diffusers say other than a scale of 1: where, alpha, rank, and the scale."""
    texts = {ADAPTER_METADATA: header.metadata.get(ADAPTER_METADATA, "")}
    if header.path.name == "adapter_model.safetensors":
        with suppress(OSError, ValueError):
            texts[ADAPTER_CONFIG] = read_regular(header.path.with_name(ADAPTER_CONFIG))
    for where, text in texts.items():
        document: Any = {}
        with suppress(ValueError):
            document = parse_json(text)
        for part in ("", "unet.", "text_encoder.", "text_encoder_2.") if isinstance(document, dict) else ():
            alpha, rank = (document.get(f"{part}{key}") for key in ("lora_alpha", "r"))
            if all(isinstance(each, int | float) and 0 < each < MOST for each in (alpha, rank)) and alpha != rank:
                yield where, alpha, rank, alpha / (rank**0.5 if document.get(f"{part}use_rslora") else rank)


class Notes:
    """Lines and their keys, in the order in which they were first added."""

    def __init__(self, formula: Formula, layouts: Mapping[str, Layout], anchor: str) -> None:
        self.formula, self.layouts, self.anchor = formula, layouts, anchor
        self.files = {name: layout.header for name, layout in layouts.items()}
        self.noted: dict[str, list[str]] = {}

    def add(self, line: str, key: str) -> None:
        self.noted.setdefault(line, []).append(key)

    def lines(self) -> list[str]:
        lines = []
        for line, keys in self.noted.items():
            lines.append(f"{line}: {count_of(len(keys), 'tensor')} ({name_first(keys)})" if any(keys) else line)
        return lines

    def shown(self, name: str) -> str:
        return str(self.files[name].path) if name in (LIKE, VAE) else name

    def tell_names_without_keys(self) -> None:
        """Say which patterns and blocks of the formula no key of the anchor matches; a pattern must match one."""
        keys = self.files[self.anchor].tensors
        present = {block for key in keys for block in blocks_of_key(key)}
        for part in walk_formula(self.formula.tree):
            if isinstance(part, Only) and not any(fnmatchcase(key, part.pattern) for key in keys):
                raise self.formula.error(f"no key of {self.shown(self.anchor)} matches the pattern", part.span)
            if isinstance(part, Blocks):
                for weight in part.weights:
                    if not any(weight.first <= block <= weight.last for block in present):
                        self.add(f"blocks: {weight.first} has no tensor in {self.shown(self.anchor)}", "")

    def tell_lost_changes(self, drafts: list[TensorPlan], changes: Mapping[str, list[tuple[str, Change]]]) -> None:
        """Say which changes of networks are left out because their tensor is copied."""
        for draft in drafts:
            kept = {name for name, _, _ in draft.changes}
            asked = self.formula.reduce_for_key(draft.key, frozenset()).networks if draft.key in changes else {}
            for name in sorted({name for name, _ in changes.get(draft.key, [])} & set(asked) - kept):
                self.add(f"net({name}) is left out where the tensor is copied", draft.key)

    def tell_zero_alphas(self, networks: Mapping[str, Header], changes: Mapping[str, list[tuple[str, Change]]]) -> None:
        """Say which modules have an alpha of 0, which programs read in two ways; these numbers are read."""
        for name, header in networks.items():
            modules = {
                change.module.name: change.module for each in changes.values() for its, change in each if its == name
            }
            with header.path.open("rb") as stream:
                for module in modules.values():
                    alpha = module.tensors.get("alpha")
                    if alpha is None or module.algorithm not in SCALED:
                        continue
                    stream.seek(header.data_start + alpha.begin)
                    if not any(stream.read(alpha.size_bytes)):
                        line = f"net({name}): alpha is 0, read as the rank, as LyCORIS and sd-scripts do; "
                        self.add(f"{line}ComfyUI and A1111 would add nothing", module.name)

    def tell_other_scales(self, networks: Mapping[str, Header]) -> None:
        """Say which networks without alphas have one in a config, which only PEFT and diffusers read."""
        for name, header in networks.items():
            if not any(key.endswith(".alpha") for key in header.tensors):
                for where, alpha, rank, factor in find_scales(header):
                    said = f"its {where} says lora_alpha {alpha:g} and r {rank:g}: PEFT adds {factor:g} times as much"
                    self.add(f"net({name}): no tensor is an alpha, so the scale is 1, as in ComfyUI; {said}", "")

    def tell_layouts(self) -> None:
        """Say which files are read under other names than they have, and what the output lacks of a whole model."""
        for name, layout in self.layouts.items():
            if layout.form:
                self.add(f"{self.shown(name)} is read as what it seems to be: {layout.kind}", "")
        anchor = self.layouts[self.anchor]
        lost = [
            WORDS_OF_PART[part]
            for part in WORDS_OF_PART
            if part not in anchor.parts and any(part in layout.parts for layout in self.layouts.values())
        ]
        if lost:
            self.add(f"the output has the parts of {self.shown(self.anchor)} alone: no {', no '.join(lost)}", "")

    def tell_extra_keys(self, models: list[str]) -> None:
        keys = self.files[self.anchor].tensors
        for name, header in self.files.items():
            if name in (self.anchor, VAE):
                continue
            for key in header.tensors:
                if key not in keys and key not in MARKS:
                    self.add(f"left out: only in {self.shown(name)}, not in {self.shown(self.anchor)}", key)
        for name in models:
            if is_network(self.files[name]):
                self.add(f"{name} is a network: mixing its factors is not mixing what they do; use net({name})", "")
