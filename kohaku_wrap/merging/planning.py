"""A merge worked out from headers alone: what every tensor of the output is made of, and every decision taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from kohaku_wrap.errors import Problem
from kohaku_wrap.formats.layouts import Layout, read_layout
from kohaku_wrap.formats.network_names import Target, table_of_targets
from kohaku_wrap.formats.predictions import MARKS
from kohaku_wrap.formats.safetensors import FLOAT_DTYPES, Header, TensorSpot, lay_out_tensors, read_header
from kohaku_wrap.merging.binding import bind_names, choose_file, split_parts
from kohaku_wrap.merging.blocks import is_in_part
from kohaku_wrap.merging.coverage import UnfitInputs, check_contribution, check_coverage, refuse_unusable
from kohaku_wrap.merging.formula.calls import WeightedSum
from kohaku_wrap.merging.formula.coefficients import Formula, Reduction
from kohaku_wrap.merging.formula.parser import parse_formula
from kohaku_wrap.merging.formula.tree import Blocks, Part, names_of_models, names_of_networks, walk_formula
from kohaku_wrap.merging.networks.files import Change, is_network, match_modules, raise_problems
from kohaku_wrap.merging.networks.shapes import shapes_of_networks
from kohaku_wrap.merging.notes import LIKE, VAE, Notes
from kohaku_wrap.merging.plan import MergeOptions, MergePlan, TensorPlan
from kohaku_wrap.merging.predictions import mark_change, mark_prediction


def plan_merge(source: str, paths: Mapping[str, Path], options: MergeOptions | None = None) -> MergePlan:
    """The merge of `source` over the files in `paths`, worked out from their headers.

    Raises FormulaError, UnboundName, MalformedFile, PickledFile, ProblemsFound or UnfitInputs.
    """
    options = options or MergeOptions()
    formula = Formula(source, parse_formula(source, options.layout))
    bind_names(formula, paths)
    models = names_of_models(formula.tree)
    if not (models or options.network):
        raise UnfitInputs(
            "the formula names networks but no checkpoint",
            "Write, for example, `base + 1.0 * net(epsilon)`; or add --as lora for a network of these networks.",
        )
    headers = {name: read_header(paths[name]) for name in models}
    networks = {name: read_header(paths[name]) for name in names_of_networks(formula.tree)}
    if not (models or options.like):
        own = shapes_of_networks(networks, lenient=options.unmatched == "skip")
        own_layout = {LIKE: Layout(own.header, "", ())}
        return Planner(formula, own_layout, networks, LIKE, LIKE, options, own.targets).plan()
    anchor = choose_file(options.like, LIKE, headers) if options.like else models[0]
    vae = choose_file(options.vae_from, VAE, headers) if options.vae_from else anchor
    sd1 = any(key.startswith("cond_stage_model.") for header in headers.values() for key in header.tensors)
    layouts = {
        name: Layout(header, "", ()) if is_network(header) else read_layout(header, sd1)
        for name, header in headers.items()
    }
    refuse_unusable(layouts, anchor)
    targets = table_of_targets(layouts[anchor].header.tensors) if networks or options.network else {}
    return Planner(formula, layouts, networks, anchor, vae, options, targets).plan()


STORED_AS = {"F64": "F32", "F8_E4M3": "F16", "F8_E5M2": "F16"}
"""What a network's tensors are where the checkpoint's are of a type that networks have not."""


@dataclass
class Planner:
    """Collects plans, decisions and problems over the keys of the anchor."""

    formula: Formula
    """What to compute."""

    layouts: dict[str, Layout]
    """The checkpoints by name."""

    networks: dict[str, Header]
    """The networks by name."""

    anchor: str
    """The checkpoint that gives key set and types."""

    vae: str
    """The one that gives the VAE."""

    options: MergeOptions
    """What to do where the files leave a choice."""

    targets: Mapping[str, dict[str, Target]]
    """What the names of a network's modules mean on the anchor."""

    def __post_init__(self) -> None:
        self.files = {name: layout.header for name, layout in self.layouts.items()}
        self.models = names_of_models(self.formula.tree)
        self.parts = split_parts(self.options.parts)
        self.problems: list[Problem] = []
        self.notes = Notes(self.formula, self.layouts, self.anchor)
        self.combinations: Counter[WeightedSum] = Counter()
        self.changes: dict[str, list[tuple[str, Change]]] = {}
        blocks = [part for part in walk_formula(self.formula.tree) if isinstance(part, Blocks)]
        named = {part.part for part in walk_formula(self.formula.tree) if isinstance(part, Part)}
        self.vae_named = any(weight.first == "VAE" for part in blocks for weight in part.weights)
        self.vae_named |= "vae" in named or "vae" in self.parts

    def plan(self) -> MergePlan:
        tensors = self.files[self.anchor].tensors
        for name, header in self.networks.items():
            leave_out = partial(self.leave_out, name) if self.options.unmatched == "skip" else None
            for change in match_modules(header, self.targets, tensors, leave_out):
                self.changes.setdefault(change.target.key, []).append((name, change))
        self.notes.tell_zero_alphas(self.networks, self.changes)
        self.notes.tell_other_scales(self.networks)
        self.notes.tell_layouts()
        computed = [key for key, spot in tensors.items() if self.is_computed(key, spot)]
        check_coverage(self.formula, self.layouts, self.anchor, computed, self.options.missing != "fail")
        drafts = [self.plan_tensor(key, spot) for key, spot in tensors.items()]
        self.notes.tell_lost_changes(drafts, self.changes)
        self.notes.tell_names_without_keys()
        self.notes.tell_extra_keys(self.models)
        raise_problems("the files do not fit the formula", self.problems, self.advice())
        check_contribution(self.formula, drafts, {name: self.layouts[name] for name in self.models}, self.networks)
        if self.options.network:
            kind, warnings = mark_change({**self.files, **self.networks}, self.options.prediction)
            for line in warnings:
                self.notes.add(line, "")
            return self.finish([draft for draft in drafts if draft.stored], kind)
        marked = mark_prediction(drafts, self.files, self.networks, self.anchor, self.options.prediction)
        for note in marked.notes:
            self.notes.add(*note)
        return self.finish(marked.drafts, marked.kind)

    def finish(self, drafts: list[TensorPlan], prediction: str) -> MergePlan:
        """The plan, its tensors placed one after another."""
        spots = lay_out_tensors((draft.key, draft.spot.dtype, draft.spot.shape) for draft in drafts)
        placed = {draft.key: draft for draft in drafts}
        return MergePlan(
            self.formula,
            {name: header for name, header in self.files.items() if header.size_bytes},
            self.networks,
            self.anchor,
            tuple(replace(placed[key], spot=spot) for key, spot in spots.items()),
            self.options,
            tuple(self.notes.lines()),
            prediction,
            dict(self.combinations.most_common()),
            self.targets,
        )

    def leave_out(self, network: str, reason: str, key: str) -> None:
        """Note a tensor of a network that is not used."""
        self.notes.add(f"net({network}): left out, {reason}", key)

    def advice(self) -> str:
        kinds = {problem.what.split(":")[0] for problem in self.problems}
        if any("no sum" in kind for kind in kinds):
            return "Bake it first (`base + net(x)`); then write the difference of both files as a network."
        if any("not 0" in kind for kind in kinds):
            return "With --as, write a change, such as `tuned - base` or `net(x)`; without it a checkpoint is made."
        if any("whose VAE" in kind for kind in kinds):
            return (
                "Give --vae-from a checkpoint of the same kind: its VAE under `first_stage_model.`, in the same shapes."
            )
        if any("lacks" in kind for kind in kinds):
            return "`--missing anchor` copies such tensors from the anchor, `--missing zero` counts the model as 0."
        if any("shape" in kind for kind in kinds):
            return "`--shapes anchor` copies such tensors from the anchor."
        return "Correct the formula, or choose other files."

    def takes_vae_whole(self, key: str) -> bool:
        """Whether a key is of the VAE, and that is copied as one."""
        return is_in_part(key, "vae") and bool(self.options.vae_from or not (self.options.merge_vae or self.vae_named))

    def is_asked_for(self, key: str) -> bool:
        """Whether --parts leaves a key to the formula."""
        return not self.parts or any(is_in_part(key, part) for part in self.parts)

    def is_computed(self, key: str, spot: TensorSpot) -> bool:
        """Whether the formula decides a tensor."""
        is_weight = spot.dtype in FLOAT_DTYPES and spot.elements and not key.endswith("position_ids")
        return bool(is_weight) and self.is_asked_for(key) and not self.takes_vae_whole(key)

    def plan_tensor(self, key: str, spot: TensorSpot) -> TensorPlan:
        """The plan of one key, at its place in the anchor for now."""
        if self.options.network and not self.is_computed(key, spot):
            if spot.dtype not in FLOAT_DTYPES and not key.endswith("position_ids"):
                self.check_integers(key, spot)
            return self.copy(key, self.anchor, spot)
        if self.takes_vae_whole(key):
            return self.plan_vae(key, spot)
        if not self.is_asked_for(key):
            self.notes.add(f"copied from {self.anchor}: not of --parts {self.options.parts}", key)
            return self.copy_float(key, self.anchor, spot)
        if not self.is_computed(key, spot):
            what = "empty marker" if not spot.elements else f"{spot.dtype}, which is not averaged"
            what = "positions, which are not averaged" if key.endswith("position_ids") else what
            if key not in MARKS:  # they follow what the output predicts
                self.notes.add(f"copied from {self.anchor}: {what}", key)
            if what.startswith(spot.dtype):
                self.check_integers(key, spot)
            return self.copy(key, self.anchor, spot)
        lacking = frozenset(name for name in self.models if key not in self.files[name].tensors)
        reduction = self.formula.reduce_for_key(key, lacking)
        for group in reduction.dropped:
            self.notes.add(f"{group} counts as 0 where a member lacks the key", key)
        used = reduction.sum.names()
        weighted = {name: reduction.models.get(name, Fraction(0)) for name in used if name not in lacking}
        absent = [name for name in used if name in lacking]
        inside = [name for call in reduction.calls for name in WeightedSum((), (), ((call, Fraction(1)),)).names()]
        if absent and (self.options.missing == "fail" or (self.options.missing == "zero" and {*absent} & {*inside})):
            where = "weight in the formula" if self.options.missing == "fail" else "no zeros to give to a function"
            self.problems.append(Problem(key, f"{', '.join(absent)} lacks it and has {where}"))
            return self.copy(key, self.anchor, spot)
        if absent and self.options.missing == "anchor":
            self.notes.add(f"copied from {self.anchor}: {', '.join(absent)} lacks the key", key)
            return self.copy_float(key, self.anchor, spot)
        if absent:
            self.notes.add(f"{', '.join(absent)} lacks the key and counts as 0", key)
        if not self.fits(key, spot, list(weighted)):
            return self.copy_float(key, self.anchor, spot)
        return self.combine(key, spot, weighted, reduction)

    def check_integers(self, key: str, spot: TensorSpot) -> None:
        """A weight in whole numbers, or in floats that cannot be computed with, would be left out of the merge."""
        if self.formula.reduce_for_key(key).sum == WeightedSum(((self.anchor, Fraction(1)),)):
            return
        others = [name for name in self.models if key in self.files[name].tensors]
        floats = [name for name in others if self.files[name].tensors[key].dtype in FLOAT_DTYPES]
        is_weight = key.endswith(".weight") and len(spot.shape) > 1
        if floats or is_weight or spot.dtype.startswith(("F", "C")):
            self.problems.append(Problem(key, f"{self.anchor} has {spot.dtype}, which kwrap cannot compute with"))

    def fits(self, key: str, spot: TensorSpot, names: list[str]) -> bool:
        """Whether all members have the anchor's shape and a type that can be computed with."""
        for name in names:
            other = self.files[name].tensors[key]
            if other.dtype not in FLOAT_DTYPES:
                self.problems.append(Problem(key, f"{name} has {other.dtype} where {self.anchor} has {spot.dtype}"))
                return False
            if other.shape != spot.shape:
                if self.options.shapes == "anchor":
                    self.notes.add(f"copied from {self.anchor}: {name} has another shape", key)
                else:
                    self.problems.append(
                        Problem(key, f"shape {list(other.shape)} in {name}, {list(spot.shape)} in {self.anchor}")
                    )
                return False
            if other.dtype != spot.dtype:
                self.notes.add(f"{name} has {other.dtype} where {self.anchor} has {spot.dtype}; computed exactly", key)
        return True

    def combine(self, key: str, spot: TensorSpot, weighted: dict[str, Fraction], reduction: Reduction) -> TensorPlan:
        """A tensor that the formula is computed for."""
        changes = [
            (name, reduction.networks[name], change)
            for name, change in self.changes.get(key, [])
            if name in reduction.networks
        ]
        setting = [name for name, _, change in changes if change.sets_weight]
        if setting and len({name for name, _, _ in changes}) > 1:
            what = f"{setting[0]} is no sum (DoRA, OFT, GLoRA, IA3)"
            self.problems.append(Problem(key, f"{what}; no other network can be added to it"))
        if not (weighted or self.options.network):
            self.problems.append(Problem(key, "the formula gives it no checkpoint; add `else=…` to only(…)"))
            return self.copy(key, self.anchor, spot)
        calls, added = tuple(reduction.calls.items()), {name: value for name, value, _ in changes}
        to = "F32" if self.options.network else self.options.dtype or spot.dtype
        typed = TensorSpot(to, spot.shape, spot.begin, spot.end)
        plan = TensorPlan(key, typed, tuple(weighted), tuple(weighted.values()), tuple(changes), "", calls)
        self.combinations[replace(plan.sum, networks=tuple(added.items()))] += 1
        if self.options.network:
            return self.plan_change(plan, spot.dtype)
        total = plan.sum.total
        if reduction.outside and total != 1:
            names = ", ".join(reduction.outside)
            what = (
                f"{names} is left out here, and the rest of the formula sums to {total}; write a difference in brackets"
            )
            self.problems.append(Problem(key, what))
        elif total != 1:
            line = f"the coefficients sum to {total}, not 1: the weights are scaled"
            if self.options.sums == "fail":
                self.problems.append(Problem(key, line))
            self.notes.add(line, key)
        if not (changes or plan.calls) and list(weighted.values()) == [Fraction(1)]:
            return self.copy_float(key, plan.sources[0], self.files[plan.sources[0]].tensors[key])
        return plan

    def plan_change(self, plan: TensorPlan, dtype: str) -> TensorPlan:
        """A tensor of a change, whose numbers are computed in float32 and become a module of a network.

        `dtype`: the anchor's.
        """
        if total := plan.sum.total:
            what = f"the coefficients sum to {total}, not 0: no change but a checkpoint"
            self.problems.append(Problem(plan.key, what))
        if any(change.sets_weight for _, _, change in plan.changes):
            self.problems.append(Problem(plan.key, "DoRA, OFT, GLoRA and IA3 change a weight by what it is: no sum"))
        return replace(plan, stored=self.options.dtype or STORED_AS.get(dtype, dtype))

    def plan_vae(self, key: str, spot: TensorSpot) -> TensorPlan:
        source = self.vae
        other = self.files[source].tensors.get(key)
        if other is None or other.shape != spot.shape:
            what = "lacks it" if other is None else "has another shape"
            self.problems.append(Problem(key, f"{self.notes.shown(source)}, whose VAE was asked for, {what}"))
            return self.copy(key, self.anchor, spot)
        self.notes.add(f"VAE copied from {self.notes.shown(source)}", key)
        return self.copy_float(key, source, other)

    def copy(self, key: str, source: str, spot: TensorSpot) -> TensorPlan:
        """The bytes as they are."""
        return TensorPlan(key, spot, (source,), ())

    def copy_float(self, key: str, source: str, spot: TensorSpot) -> TensorPlan:
        """The numbers as they are, in the output's type."""
        if spot.dtype not in FLOAT_DTYPES or not spot.elements or key.endswith("position_ids"):
            return self.copy(key, source, spot)
        wanted = self.options.dtype or self.files[self.anchor].tensors[key].dtype
        typed = TensorSpot(wanted if wanted in FLOAT_DTYPES else spot.dtype, spot.shape, spot.begin, spot.end)
        return TensorPlan(key, typed, (source,), (Fraction(1),))
