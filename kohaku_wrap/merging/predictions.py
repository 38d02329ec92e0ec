"""What a merged model predicts: what the models do that have weight in its UNet, or what is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kohaku_wrap.formats.predictions import MARKS, Prediction, find_prediction
from kohaku_wrap.formats.safetensors import Header, TensorSpot
from kohaku_wrap.merging.blocks import is_in_part
from kohaku_wrap.merging.plan import TensorPlan

WORDS = {"eps": "epsilon", "v": "v"}
"""What --prediction takes, and how modelspec.prediction_type spells it."""


@dataclass(frozen=True)
class MergedPrediction:
    """How the output is marked."""

    kind: str
    """epsilon or v; empty where no file says it."""

    drafts: list[TensorPlan]
    """The tensors, with the empty ones that mark v-prediction where it is v, and without them where it is epsilon."""

    notes: list[tuple[str, str]]
    """Lines for the report, each with its key or an empty string."""


def find_kinds(drafts: Sequence[TensorPlan], said: Mapping[str, Prediction]) -> dict[str, list[str]]:
    """The models and networks with weight in the UNet by what they predict.

    A kind counts where its coefficients do not sum to 0: a difference of two v models changes no prediction. A network
    counts where its file says what it was trained for.
    """
    sums = {
        (tuple(draft.sum.shares().items()), tuple(name for name, _, _ in draft.changes)): None
        for draft in drafts
        if is_in_part(draft.key, "unet")
    }
    kinds: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for weighted, networks in sums:
        totals: defaultdict[str, Fraction] = defaultdict(Fraction)
        for name, value in weighted:
            totals[said[name].kind] += value
        kinds_here = {kind for kind, total in totals.items() if total}
        names = [name for name, _ in weighted if said[name].kind in kinds_here]
        for name in [*names, *(name for name in networks if said[name].source)]:
            kinds[said[name].kind][name] = None
    return {kind: list(names) for kind, names in kinds.items()}


def describe_kinds(kinds: Mapping[str, list[str]], said: Mapping[str, Prediction]) -> str:
    """Each model with what it predicts, and where that stands."""
    return ", ".join(
        f"{name} predicts {kind} ({said[name].source or 'nothing says it; epsilon is assumed'})"
        for kind, names in kinds.items()
        for name in names
    )


def decide_kind(
    kinds: Mapping[str, list[str]], said: Mapping[str, Prediction], first: str, asked: str
) -> tuple[str, list[str]]:
    """What is predicted: as `asked`, as the files of one kind do, or as `first` where they differ; and a warning."""
    usual = next(iter(kinds)) if len(kinds) == 1 else said[first].kind
    kind = WORDS[asked] if asked else usual
    if asked and set(kinds) - {kind}:
        return kind, [f"warning: marked as --prediction {asked} asks: {describe_kinds(kinds, said)}"]
    if len(kinds) > 1 and not asked:
        line = f"warning: prediction types are mixed: {describe_kinds(kinds, said)}. The output is marked as {kind}, "
        return kind, [f"{line}as {first} is; --prediction eps or --prediction v decides"]
    return kind, []


def mark_change(headers: Mapping[str, Header], asked: str) -> tuple[str, list[str]]:
    """As decide_kind, for a change that becomes a network: of all its files that say it; empty where none does."""
    said = {name: found for name, header in headers.items() if (found := find_prediction(header)).source}
    if not said:
        return WORDS.get(asked, ""), []
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name, each in said.items():
        kinds[each.kind].append(name)
    return decide_kind(kinds, said, next(iter(said)), asked)


def mark_prediction(
    drafts: list[TensorPlan], files: Mapping[str, Header], networks: Mapping[str, Header], anchor: str, asked: str
) -> MergedPrediction:
    """Decide how the output is marked: as `asked` (eps or v), as its models are, or as the anchor where they differ."""
    said = {name: find_prediction(header) for name, header in {**files, **networks}.items()}
    kinds = find_kinds(drafts, said)
    if not (kinds or asked):
        return MergedPrediction(said[anchor].kind if said[anchor].source else "", drafts, [])
    kind, warnings = decide_kind(kinds, said, anchor, asked)
    told = {each.kind for each in said.values() if each.source}
    notes = [(line, "") for line in warnings]
    givers = [files[name] for name in files if name == anchor or name in kinds.get("v", [])]
    marks = [mark for mark in MARKS if any(mark in header.tensors for header in givers)] if kind == "v" else []
    if kind == "v" and asked and "v_pred" not in marks:
        marks.insert(0, "v_pred")
    present = {draft.key for draft in drafts}
    added = [TensorPlan(mark, TensorSpot("F32", (0,), 0, 0), (), ()) for mark in marks if mark not in present]
    notes += [("added: empty markers, since the output predicts v", draft.key) for draft in added]
    lost = [mark for mark in MARKS if mark in present and mark not in marks]
    notes += [(f"left out: markers of v-prediction, since the output predicts {kind}", mark) for mark in lost]
    kept = [draft for draft in drafts if draft.key not in lost]
    return MergedPrediction(kind if asked or kind in told else "", [*added, *kept], notes)
