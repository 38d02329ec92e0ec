"""Which parts of the anchor each model of a formula covers: none may be named without changing anything."""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.layouts import WORDS_OF_PART, Layout, part_of_key
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.networks.files import describe_network, is_network
from kohaku_wrap.merging.notes import VAE
from kohaku_wrap.merging.plan import TensorPlan

QUANTISED = (".scale_weight", ".weight_scale", ".scale_input", ".absmax", ".SCB", ".comfy_quant")
"""How the names of tensors end that other programs keep beside quantised weights."""


class UnfitInputs(KwrapError):
    """Files that the formula cannot be computed on."""


def describe_file(layout: Layout) -> str:
    """What a file seems to be, in words."""
    return describe_network(layout.header) if is_network(layout.header) else layout.kind


def refuse_unusable(layouts: Mapping[str, Layout], anchor: str) -> None:
    """Raise UnfitInputs for a network without net(…) among checkpoints, and for quantised weights."""
    for name, layout in layouts.items():
        header = layout.header
        if not header.tensors:
            raise UnfitInputs(f"{name} ({header.path}) holds no tensor", "Fetch the file again, or choose another.")
        if is_network(header) and not is_network(layouts[anchor].header):
            advice = f"Write net({name}) where {name} stands in the formula."
            raise UnfitInputs(
                f"{name} ({header.path}) is no checkpoint but a network: {describe_file(layout)}",
                "Give --vae-from a checkpoint or a VAE." if name == VAE else advice,
            )
        scaled = [key for key in header.tensors if key.endswith(QUANTISED) or key == "scaled_fp8"]
        if scaled:
            raise UnfitInputs(
                f"{name} ({header.path}) holds quantised weights with scales beside them ({scaled[0]})",
                "kwrap averages numbers, not codes with scales. Use the file in fp16, bf16 or plain fp8.",
            )


def check_coverage(
    formula: Formula, layouts: Mapping[str, Layout], anchor: str, keys: list[str], lenient: bool
) -> None:
    """Raise UnfitInputs for a model that has weight in a part of the anchor and no tensor there.

    `keys`: those of the anchor that the formula is computed for. `lenient`: the options say what a lacking tensor
    counts as, and only a model that has none at all is refused.
    """
    wanted: dict[str, dict[str, bool]] = {}
    for key in keys:
        part = part_of_key(key)
        for name in formula.reduce_for_key(key).sum.names():
            parts = wanted.setdefault(name, {})
            parts[part] = parts.get(part, False) or key in layouts[name].header.tensors
    for name, parts in wanted.items():
        missing = [words for part, words in WORDS_OF_PART.items() if not parts.get(part, True)]
        held = [part for part, is_held in parts.items() if is_held]
        if (held and lenient) or (held and not missing):
            continue
        layout = layouts[name]
        what = f"{name} ({layout.header.path}) seems to be: {describe_file(layout)}"
        if not held:
            raise UnfitInputs(
                f"{what}. It shares no tensor with {anchor} that the formula uses",
                advise_none(name, layout, anchor, layouts[anchor]),
            )
        call = "te" if set(held) == {"te1", "te2"} else next((part for part in held if part), "")
        raise UnfitInputs(
            f"{what}. It lacks {', '.join(missing)}, where the formula gives it weight",
            f"To use what it has: write {call}({name}) for {name} inside a difference, as in "
            f"`{anchor} + 0.5 * ({call}({name}) - {anchor})`, or add --parts {','.join(filter(None, held))}, which "
            f"copies the other parts from {anchor}.",
        )


def advise_none(name: str, layout: Layout, anchor: str, whole: Layout) -> str:
    """What to do with a file that has no tensor of the checkpoint `whole` that the formula uses."""
    if shared := [part for part in layout.parts if part in whole.parts]:
        part = shared[0]
        return (
            f"Both have {WORDS_OF_PART[part]}, which the formula leaves as it is: write {part}({name}), as in "
            f"`{anchor} + 0.5 * ({part}({name}) - {part}({anchor}))`."
        )
    if layout.parts:
        words = " and ".join(WORDS_OF_PART[part] for part in layout.parts)
        return f"It has {words}: choose a first model (or --like) of the same kind that has these tensors too."
    return f"Give {name} a checkpoint of the same architecture; a network is written net({name})."


def check_contribution(
    formula: Formula, drafts: list[TensorPlan], layouts: Mapping[str, Layout], networks: Mapping[str, object]
) -> None:
    """Raise UnfitInputs for a model or network with weight that changes no tensor of the plan."""
    used = {name for draft in drafts for name in draft.sources}
    added = {name for draft in drafts for name, _, _ in draft.changes}
    weighted: set[str] = set()
    for draft in drafts:
        reduction = formula.reduce_for_key(draft.key)
        weighted |= {name for name in reduction.sum.names() if name in layouts}
        weighted |= {f"net({name})" for name in reduction.networks}
    idle = [name for name in layouts if name in weighted - used]
    idle += [f"net({name})" for name in networks if f"net({name})" in weighted and name not in added]
    if idle:
        advice = (
            "See what it holds with `kwrap inspect FILE`, and what is computed with --dry-run; leave it out of the "
            "formula if that is meant."
        )
        if any(name in layouts and layouts[name].parts == ("vae",) for name in idle):
            advice = "Add --merge-vae: without it the VAE of the first model is copied."
        raise UnfitInputs(
            f"{', '.join(idle)}: has weight in the formula, but no tensor of the output would be made from it", advice
        )
