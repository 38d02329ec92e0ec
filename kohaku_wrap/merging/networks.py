"""Network files: which modules they hold and which tensors of a checkpoint those change, read from headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.formats.network_names import Target, find_targets, is_diffusers_name
from kohaku_wrap.formats.safetensors import FLOAT_DTYPES, Header, TensorSpot

ANY_MODULE = ("alpha", "dora_scale", "diff_b")
ALGORITHMS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "LoKr": (
        frozenset(),
        frozenset(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", *ANY_MODULE)),
    ),
    "LoHa": (
        frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", *ANY_MODULE)),
    ),
    "LoRA": (
        frozenset(("lora_up.weight", "lora_down.weight")),
        frozenset(("lora_up.weight", "lora_down.weight", "lora_mid.weight", *ANY_MODULE)),
    ),
    "full": (frozenset(("diff",)), frozenset(("diff", "diff_b", "alpha"))),
    "norm": (frozenset(("w_norm",)), frozenset(("w_norm", "b_norm", "alpha"))),
    "bias": (frozenset(("diff_b",)), frozenset(("diff_b", "alpha"))),
}
"""For each algorithm the tensors that a module must have, and all that it may have."""

MARK_OF_ALGORITHM = {
    "lokr_": "LoKr", "hada_": "LoHa", "lora_": "LoRA", "diff": "full", "w_norm": "norm", "diff_b": "bias",
}  # fmt: skip
PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lycoris_")
PROBLEMS_SHOWN = 12
FLOATS_SHOWN = ", ".join(FLOAT_DTYPES)
ALPHA_DTYPES = (*FLOAT_DTYPES, "I64", "I32")
"""An alpha that was never converted is what Python made of a number: sd-scripts saves a whole one as I64."""

Shape = tuple[int, ...]
LeaveOut = Callable[[str, str], None]
"""Is given the reason and a tensor of the network's file."""


class NotANetwork(KwrapError):
    """A file in net(…) that holds no network."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: this is not a network: none of its keys begins with lora_unet_ or lora_te",
            "Bind net(…) to a LoKr, LoHa, LoCon or LoRA file in kohya's form; a checkpoint is named without net(…).",
        )


@dataclass(frozen=True)
class Module:
    """One module of a network file."""

    name: str
    """Such as `lora_unet_input_blocks_1_0_in_layers_2`."""

    algorithm: str
    """A name in ALGORITHMS."""

    tensors: dict[str, TensorSpot]
    """Where each of its tensors lies, by the part of the key after the name."""

    @property
    def has_dora(self) -> bool:
        """Whether it also sets the norms of the whole weight."""
        return "dora_scale" in self.tensors

    def delta_size(self) -> tuple[int, int]:
        """Rows and elements of the weight's delta.

        Raises KeyError, IndexError or ValueError where the factors do not make a whole delta.
        """
        shape = {suffix: spot.shape for suffix, spot in self.tensors.items()}
        if self.algorithm == "LoKr":
            (outer_rows, outer_columns), inner = shapes_of_kron(shape)
            return outer_rows * inner[0], outer_rows * outer_columns * math.prod(inner)
        if self.algorithm == "LoHa":
            whole = shape_of_hadamard(shape)
        elif self.algorithm == "LoRA":
            whole = shape_of_lora(shape)
        else:
            whole = shape["diff" if self.algorithm == "full" else "w_norm"] or (1,)
        return whole[0], math.prod(whole)


def flatten(shape: Shape) -> Shape:
    """As a matrix: all after the first dimension in one."""
    return shape[0], math.prod(shape[1:])


def shape_of_product(left: Shape, right: Shape) -> Shape:
    """Of a product of two matrices."""
    (rows, rank), (other_rank, columns) = left, right
    if rank != other_rank or not rank:
        raise ValueError
    return rows, columns


def shape_of_tucker(core: Shape, left: Shape, right: Shape) -> Shape:
    """Of a Tucker product: `core` (rank, other rank, …), `left` (rank, rows), `right` (other rank, columns)."""
    (rank, rows), (other_rank, columns) = left, right
    if core[:2] != (rank, other_rank) or not rank * other_rank:
        raise ValueError
    return rows, columns, *core[2:]


def shapes_of_kron(shape: Mapping[str, Shape]) -> tuple[Shape, Shape]:
    """Of both factors of a LoKr module."""
    outer = shape.get("lokr_w1") or shape_of_product(shape["lokr_w1_a"], shape["lokr_w1_b"])
    if "lokr_w2" in shape:
        return outer, shape["lokr_w2"]
    left, right = shape["lokr_w2_a"], shape["lokr_w2_b"]
    if "lokr_t2" in shape:
        return outer, shape_of_tucker(shape["lokr_t2"], left, right)
    return outer, shape_of_product(left, flatten(right))


def shape_of_hadamard(shape: Mapping[str, Shape]) -> Shape:
    """Of both factors of a LoHa module, which must be alike."""
    pairs = [(shape[f"hada_w{half}_a"], shape[f"hada_w{half}_b"]) for half in (1, 2)]
    if "hada_t1" in shape or "hada_t2" in shape:
        cores = shape["hada_t1"], shape["hada_t2"]
        found = {shape_of_tucker(core, *pair) for core, pair in zip(cores, pairs, strict=True)}
    else:
        found = {shape_of_product(*pair) for pair in pairs}
    if len(found) > 1:
        raise ValueError
    return found.pop()


def shape_of_lora(shape: Mapping[str, Shape]) -> Shape:
    up, down = shape["lora_up.weight"], shape["lora_down.weight"]
    if math.prod(up[2:]) != 1:
        raise ValueError
    if "lora_mid.weight" in shape:
        return shape_of_tucker(shape["lora_mid.weight"], (up[1], up[0]), flatten(down))
    return shape_of_product(up[:2], flatten(down))


@dataclass(frozen=True)
class Change:
    """One module's effect on one target."""

    module: Module
    """The module."""

    kind: str
    """`weight` or `bias`."""

    target: Target
    """The tensor, or its share, that it changes."""


def algorithm_of(suffixes: Iterable[str]) -> str | None:
    """The algorithm whose tensors these are; None if no known one fits."""
    listed = set(suffixes)
    for mark, algorithm in MARK_OF_ALGORITHM.items():
        if any(suffix.startswith(mark) for suffix in listed):
            required, allowed = ALGORITHMS[algorithm]
            if required <= listed <= allowed:
                return algorithm
    return None


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
    return any(key.startswith(PREFIXES) and "." in key for key in header.tensors)


def group_modules(header: Header) -> dict[str, dict[str, TensorSpot]]:
    """The tensors of each module by the part of the key after the module's name."""
    modules: dict[str, dict[str, TensorSpot]] = {}
    for key, spot in header.tensors.items():
        name, _, suffix = key.partition(".")
        modules.setdefault(name, {})[suffix] = spot
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
            if spot.dtype not in (ALPHA_DTYPES if suffix == "alpha" else FLOAT_DTYPES)
        ]
        if algorithm is None and leave_out:
            for suffix in tensors:
                what = "of an unknown kind" if name.startswith(PREFIXES) else f"named {name}.*, no known network"
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
    try:
        delta_rows, delta_elements = module.delta_size()
    except (KeyError, IndexError, ValueError):
        shapes = ", ".join(f"{suffix} {list(spot.shape)}" for suffix, spot in sorted(module.tensors.items()))
        return f"its factors do not make a whole delta ({shapes})"
    if (delta_rows, delta_elements) != (rows, elements):
        return (
            f"its delta has {delta_rows} rows and {delta_elements:,} numbers, {target.key} has {rows} and {elements:,}"
        )
    alpha, dora = module.tensors.get("alpha"), module.tensors.get("dora_scale")
    if alpha and alpha.elements != 1:
        return f"its alpha has {alpha.elements} numbers, not one"
    if dora and not is_norm_of(dora.shape, rows, shape):
        return f"its dora_scale {list(dora.shape)} is neither one number for each output nor one for each input"
    return ""


def is_norm_of(dora: Shape, rows: int, weight: Shape) -> bool:
    """Whether DoRA's norms are those of a weight's outputs, (rows, 1, …), or of its inputs, (1, columns, …)."""
    by_output = dora[:1] == (rows,) and math.prod(dora) == rows
    return by_output or (dora[:2] == (1, *weight[1:2]) and math.prod(dora) == math.prod(weight[1:2]))


def problems_of_fused(changes: Iterable[Change]) -> list[Problem]:
    """Fused tensors of which other parts are covered than of their like in other layers."""
    covered: dict[tuple[str, str], set[int]] = {}
    for change in changes:
        if change.target.parts > 1:
            covered.setdefault((change.kind, change.target.key), set()).add(change.target.part)
    problems = []
    for kind in ("weight", "bias"):
        of_kind = {key: parts for (its_kind, key), parts in covered.items() if its_kind == kind}
        if not of_kind:
            continue
        union = set().union(*of_kind.values())
        problems += [
            Problem(
                key,
                f"only {len(parts)} of the {len(union)} parts (query, key, value) that the network trains elsewhere",
            )
            for key, parts in of_kind.items()
            if parts != union
        ]
    return problems
