"""Network files: which modules they hold and which tensors of a checkpoint those change, read from headers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.formats.network_keys import KOHYA_PREFIXES, is_network_key, read_network_key
from kohaku_wrap.formats.network_names import Target, find_targets, is_diffusers_name
from kohaku_wrap.formats.safetensors import FLOAT_DTYPES, Header, MalformedFile, TensorSpot
from kohaku_wrap.merging.networks.modules import (
    ALGORITHMS,
    MADE_OF_WEIGHT,
    Module,
    algorithm_of,
    describe_shapes,
    fits_weight,
    is_norm_of,
)

PROBLEMS_SHOWN = 12
FLOATS_SHOWN = ", ".join(FLOAT_DTYPES)
ALPHA_DTYPES = (*FLOAT_DTYPES, "I64", "I32")
"""An alpha that was never converted is what Python made of a number: sd-scripts saves a whole one as I64."""

NUMBERS = {"alpha", "on_input"}
"""The tensors of a module that are one number each."""

LeaveOut = Callable[[str, str], None]
"""Is given the reason and a tensor of the network's file."""


class NotANetwork(KwrapError):
    """A file in net(…) that holds no network."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: this is not a network: none of its keys is one of LoRA, LyCORIS or PEFT",
            "Bind net(…) to a LoKr, LoHa, LoCon or LoRA file; a checkpoint is named without net(…).",
        )


@dataclass(frozen=True)
class Change:
    """One module's effect on one target."""

    module: Module
    """The module."""

    kind: str
    """`weight` or `bias`."""

    target: Target
    """The tensor, or its share, that it changes."""

    @property
    def sets_weight(self) -> bool:
        """Whether it is no sum: the new weight depends on the old one in another way."""
        return self.kind == "weight" and self.module.sets_weight


def describe_network(header: Header) -> str:
    """The kind of a network file, in words."""
    modules = group_modules(header)
    found = Counter(algorithm_of(tensors) or "unknown" for tensors in modules.values())
    main = [name for name, _ in found.most_common() if name != "norm"] or ["norm"]
    dora = any("dora_scale" in tensors for tensors in modules.values())
    naming = "diffusers" if any(map(is_diffusers_name, modules)) else "sgm"
    return f"{' + '.join(main)} network{' with DoRA' if dora else ''} ({naming} names)"


def is_network(header: Header) -> bool:
    """Whether a file's keys are a kohya network's."""
    return any(map(is_network_key, header.tensors))


def group_modules(header: Header) -> dict[str, dict[str, TensorSpot]]:
    """The tensors of each module by the part of the key after the module's name, in kohya's words.

    Raises MalformedFile where two keys mean one tensor.
    """
    modules: dict[str, dict[str, TensorSpot]] = {}
    for key, spot in header.tensors.items():
        name, suffix = read_network_key(key)
        if suffix in modules.setdefault(name, {}):
            raise MalformedFile(header.path, [f"{key!r} is another key for {name}.{suffix}"])
        modules[name][suffix] = spot
    return modules


def read_modules(header: Header, leave_out: LeaveOut | None = None) -> list[Module]:
    """The modules of a network file; `leave_out` is given the tensors of others, by the start of their names.

    Raises NotANetwork, or ProblemsFound for modules of an algorithm that kwrap does not bake.
    """
    if not is_network(header):
        raise NotANetwork(header.path)
    modules, problems = [], []
    for name, tensors in group_modules(header).items():
        algorithm = algorithm_of(tensors)
        odd = [
            suffix
            for suffix, spot in tensors.items()
            if spot.dtype not in (ALPHA_DTYPES if suffix in NUMBERS else FLOAT_DTYPES)
        ]
        if algorithm is None and leave_out:
            for suffix in tensors:
                what = "of an unknown kind" if name.startswith(KOHYA_PREFIXES) else f"named {name}.*, no known network"
                leave_out(what, f"{name}.{suffix}")
        elif algorithm is None:
            known = ", ".join(ALGORITHMS)
            problems.append(Problem(name, f"its tensors ({', '.join(sorted(tensors))}) are none of {known}"))
        elif odd:
            problems.append(Problem(name, f"{odd[0]} is {tensors[odd[0]].dtype}; only {FLOATS_SHOWN} can be baked"))
        else:
            modules.append(Module(name, algorithm, tensors))
    advice = "Other kinds of network cannot be baked by kwrap. `--unmatched skip` leaves such keys out and counts them."
    raise_problems(f"{header.path}", problems, advice)
    return modules


def raise_problems(subject: str, problems: list[Problem], next_step: str) -> None:
    """Raise ProblemsFound if there are any, with the first dozen of them."""
    if not problems:
        return
    shown = problems[:PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(Problem("…", f"and {len(problems) - len(shown)} more of the same file"))
    raise ProblemsFound(subject, shown, next_step)


def match_modules(
    header: Header,
    table: Mapping[str, dict[str, Target]],
    tensors: Mapping[str, TensorSpot],
    leave_out: LeaveOut | None = None,
) -> list[Change]:
    """What every module of a network changes in a checkpoint.

    `table`: from table_of_targets; `tensors`: the checkpoint's own. `leave_out` is given what finds no key, which is
    an error without it. Raises ProblemsFound where a module finds no
    key, has another shape, or where only some of the parts of a fused tensor are covered that others have.
    """
    changes: list[Change] = []
    problems: list[Problem] = []
    found: dict[tuple[str, Target], str] = {}
    for module in read_modules(header, leave_out):
        targets = find_targets(module.name, table)
        wanted = ["weight"] * (module.algorithm != "bias")
        wanted += ["bias"] * ("diff_b" in module.tensors or "b_norm" in module.tensors)
        for kind in wanted:
            target = (targets or {}).get(kind)
            if target is None and leave_out:
                for suffix in module.tensors:
                    if kind == "weight" or suffix in ("diff_b", "b_norm"):
                        leave_out(f"the checkpoint has no {kind} of that name", f"{module.name}.{suffix}")
                continue
            if target is None:
                problems.append(Problem(module.name, f"the checkpoint has no {kind} of that name"))
                continue
            fault = fault_of_change(module, kind, target, tensors[target.key])
            if fault:
                problems.append(Problem(module.name, fault))
            if twin := found.get((kind, target)):
                problems.append(Problem(module.name, f"names the same layer as {twin}: one of them is too many"))
            found[kind, target] = module.name
            changes.append(Change(module, kind, target))
    problems += problems_of_fused(changes)
    raise_problems(
        f"{header.path}: does not fit the checkpoint",
        problems,
        "Is the network for another base (SD 1.5, another architecture)? Nothing is passed over in silence; "
        "`--unmatched skip` leaves modules out that the checkpoint has no key for, and counts them.",
    )
    return changes


def fault_of_change(module: Module, kind: str, target: Target, spot: TensorSpot) -> str:
    """Why a module cannot change a tensor of this shape, or an empty string."""
    shape = spot.shape[::-1] if target.is_transposed else spot.shape
    rows = (shape[0] if shape else 1) // target.parts
    elements = spot.elements // target.parts
    if spot.dtype not in FLOAT_DTYPES:
        return f"{target.key} is {spot.dtype}; only {FLOATS_SHOWN} can be changed"
    if kind == "bias":
        delta = module.tensors["b_norm" if module.algorithm == "norm" else "diff_b"].elements
        return "" if delta == elements else f"its bias has {delta} numbers, {target.key} has {elements}"
    if module.algorithm in MADE_OF_WEIGHT and target.is_transposed:
        return f"{module.algorithm} cannot be put on {target.key}, which the checkpoint holds transposed"
    for name in NUMBERS & module.tensors.keys():
        if module.tensors[name].elements != 1:
            return f"its {name} has {module.tensors[name].elements} numbers, not one"
    try:
        if module.algorithm in MADE_OF_WEIGHT:
            fits = fits_weight(module, (rows, *shape[1:]))
            return "" if fits else f"its tensors ({describe_shapes(module)}) do not fit"
        delta_rows, delta_elements = module.delta_size()
    except (KeyError, IndexError, ValueError):
        return f"its factors do not make a whole delta ({describe_shapes(module)})"
    if (delta_rows, delta_elements) != (rows, elements):
        return (
            f"its delta has {delta_rows} rows and {delta_elements:,} numbers, {target.key} has {rows} and {elements:,}"
        )
    dora = module.tensors.get("dora_scale")
    if dora and not is_norm_of(dora.shape, rows, shape):
        return f"its dora_scale {list(dora.shape)} is neither one number for each output nor one for each input"
    return ""


def problems_of_fused(changes: Iterable[Change]) -> list[Problem]:
    """Fused tensors of which other parts are covered than of their like in other layers."""
    covered: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    elsewhere: defaultdict[str, set[int]] = defaultdict(set)
    for change in changes:
        if change.target.parts > 1:
            covered[change.kind, change.target.key].add(change.target.part)
            elsewhere[change.kind].add(change.target.part)
    what = "only {} of the {} parts (query, key, value) that the network trains elsewhere"
    return [
        Problem(key, what.format(len(parts), len(elsewhere[kind])))
        for (kind, key), parts in covered.items()
        if parts != elsewhere[kind]
    ]
