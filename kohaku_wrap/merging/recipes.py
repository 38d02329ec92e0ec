"""Merge recipes: as TOML files to copy, and as metadata inside the merged file."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import describe_absence, shipped_folder
from kohaku_wrap.formats.layouts import read_layout
from kohaku_wrap.formats.machine_paths import clean_value, without_paths
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.merging.blocks import PRESETS_FILE
from kohaku_wrap.merging.formula import format_formula
from kohaku_wrap.merging.hashes import AUTO_V2_DIGITS, FileHashes
from kohaku_wrap.merging.notes import LIKE, VAE
from kohaku_wrap.merging.plan import MergeOptions, MergePlan
from kohaku_wrap.merging.predictions import WORDS
from kohaku_wrap.toml_files import load_toml

RECIPE_KEYS = ("title", "formula", "models", "notes", "options")
NESTED_VALUE_LIMIT = 16_384
NESTING_LIMIT = 64
NESTED_PREFIXES = ("ss_", "sshs_", "modelspec.")
RECIPE_TYPE = "kwrap"

DTYPES = {
    "fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp64": "F64", "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip
"""What --dtype takes, and how headers spell it."""

WORDS_OF_OPTION = {
    "dtype": tuple(DTYPES),
    "prediction": tuple(WORDS),
    "missing": ("fail", "anchor", "zero"),
    "shapes": ("fail", "anchor"),
    "unmatched": ("fail", "skip"),
    "sums": ("warn", "fail"),
    "non_finite": ("fail", "keep"),
    "overflow": ("fail", "keep"),
    "layout": ("sdxl", "sd15"),
    "network": ("lora", "lokr", "full"),
    "rest": ("keep", "skip"),
}
"""What an option of a recipe may say, where there is a choice; the same words as on the command line."""

RANGE_OF_OPTION = {"rank": (0, math.inf), "energy": (0, 1), "factor": (-1, math.inf)}
"""The least and the largest number that an option may be; 0 for what is usual."""


@dataclass(frozen=True)
class Recipe:
    """A formula with a word on each of its models."""

    formula: str
    """As written."""

    models: dict[str, str] = field(default_factory=dict)
    """What each name stands for; never a path."""

    title: str = ""
    """One line."""

    notes: str = ""
    """What a person should know."""

    options: dict[str, Any] = field(default_factory=dict)
    """Fields of MergeOptions that differ from what is usual."""


def list_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    shipped = sorted((shipped_folder("templates") / "merges").glob("*.toml"))
    return {path.stem: path for path in shipped if path.name != PRESETS_FILE}


def read_recipe(path: Path) -> Recipe:
    """A recipe from its TOML file.

    Raises ProblemsFound with all faults of the file, or UnreadableToml where it is not TOML.
    """
    document = load_toml(path)
    problems = [
        Problem(key, f"unknown; a recipe has {', '.join(RECIPE_KEYS)}") for key in document if key not in RECIPE_KEYS
    ]
    problems += [
        Problem(key, "is not text")
        for key in ("title", "formula", "notes")
        if not isinstance(document.get(key, ""), str)
    ]
    if not document.get("formula"):
        problems.append(Problem("formula", "missing"))
    models, options = document.get("models", {}), document.get("options", {})
    if not isinstance(models, dict) or not all(isinstance(text, str) for text in models.values()):
        problems.append(Problem("models", "is not a table of names with a text each"))
    if isinstance(options, dict):
        problems += problems_of_options(options)
    else:
        problems.append(Problem("options", "is not a table"))
    if problems:
        raise ProblemsFound(str(path), problems, "`kwrap merge --help` tells what the options mean.")
    return Recipe(**document)


def problems_of_options(options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a recipe's options."""
    types = {option.name: type(option.default) for option in fields(MergeOptions)}
    problems = []
    for name, value in options.items():
        words = WORDS_OF_OPTION.get(name)
        if name not in types:
            what = f"unknown; there are {', '.join(sorted(types))}"
        elif words and value not in words:
            what = f"{json.dumps(value, default=str)} is not one of {', '.join(words)}"
        elif type(value) not in (types[name], *([int] if types[name] is float else [])):
            kinds = {bool: "is not true or false", str: "is not text", int: "is not a whole number"}
            what = kinds.get(types[name], "is not a number")
        elif name in RANGE_OF_OPTION and not RANGE_OF_OPTION[name][0] <= value <= RANGE_OF_OPTION[name][1]:
            least, most = RANGE_OF_OPTION[name]
            what = f"{value} is not from {least} {'on' if most == math.inf else f'to {most}'}"
        else:
            continue
        problems.append(Problem(f"options.{name}", what))
    return problems


def find_recipe(text: str) -> Recipe:
    """The recipe that a word of the command line means: a shipped name, a TOML file, or a formula itself."""
    shipped = list_recipes()
    if text in shipped:
        return read_recipe(shipped[text])
    if text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            names = ", ".join(shipped)
            raise UsageError(
                f"{text}: {describe_absence(path, 'recipe')}",
                f"Shipped recipes: {names}; or give a TOML file or a formula.",
            )
        return read_recipe(path)
    return Recipe(text)


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions_used(plan: MergePlan) -> dict[str, str]:
    """What computed the merge."""
    packages = ["numba", "numpy", *(["torch", "lycoris-lora"] if plan.networks else [])]
    return {"kwrap": kohaku_wrap.__version__, **{package: installed_version(package) for package in packages}}


def describe_sums(plan: MergePlan) -> list[dict[str, Any]]:
    """Each sum that the merge computes, as text and as exact coefficients, with how many tensors it is for."""
    return [
        {
            "sum": str(combination),
            "models": {name: str(value) for name, value in combination.models},
            "networks": {name: str(value) for name, value in combination.networks},
            "functions": {str(call): str(value) for call, value in combination.calls},
            "tensors": count,
        }
        for combination, count in plan.combinations.items()
    ]


@dataclass(frozen=True)
class License:
    """What the parents say of their licenses."""

    text: str
    """The license that the merge carries; empty if none is known or they differ."""

    conflict: str = ""
    """One line where parents differ."""


def join_licenses(headers: Mapping[str, Header]) -> License:
    """The license of the merge: the one that all parents name, or a note that they differ."""
    found = {name: header.metadata.get("modelspec.license", "") for name, header in headers.items()}
    named = {name: text for name, text in found.items() if text}
    if len(set(named.values())) == 1:
        silent = [name for name in found if name not in named]
        note = f"{', '.join(silent)} names no license" if silent else ""
        return License(next(iter(named.values())), note)
    if not named:
        return License("", "no parent names a license (modelspec.license)")
    listed = "; ".join(f"{name}: {text}" for name, text in named.items())
    return License("", f"the parents' licenses differ ({listed}); the merge names none")


def name_of_file(path: Path) -> str:
    """The file's name, as text that can be written: a name may hold bytes that are not UTF-8."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def parent_entry(header: Header) -> dict[str, Any]:
    """What the merged file keeps of one parent: its name, its recipe, and its own metadata."""
    kept, left_out = {}, []
    for key, value in sorted(header.metadata.items()):
        if not key.startswith(NESTED_PREFIXES):
            continue
        if len(value) > NESTED_VALUE_LIMIT:
            left_out.append(key)
        else:
            kept[key] = value
    recipe = header.metadata.get("sd_merge_recipe")
    entry: dict[str, Any] = {"name": name_of_file(header.path), "sd_merge_recipe": parse_json(recipe), "metadata": kept}
    return {**entry, "left_out": left_out} if left_out else entry


def parse_json(text: str | None) -> Any:
    """The value of JSON text; the text itself where it is none, or holds what could not be written again."""
    if text is None:
        return None
    try:
        value = json.loads(text)
        dump_json(value).encode("utf-8")  # escapes can hold halves of characters
    except (ValueError, RecursionError):
        return text
    return value if is_shallow(value, NESTING_LIMIT) else text


def is_shallow(value: Any, levels: int) -> bool:
    """Whether JSON is nested at most so many levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(is_shallow(item, levels - 1) for item in inner)


def dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def build_metadata(
    plan: MergePlan, hashes: Mapping[str, FileHashes], title: str = "", date: str = "", recipe: Recipe | None = None
) -> dict[str, str]:
    """The metadata of the merged file, in a fixed order and without the time unless `date` is given.

    `hashes`: of every file of the plan, by name. Source: Stability's model metadata standard 1.0.1 and the
    `sd_merge_recipe` and `sd_merge_models` that webui writes.
    """
    anchor = plan.files[plan.anchor]
    kept = ("modelspec.architecture", "modelspec.implementation", "modelspec.resolution")
    own = {"modelspec.architecture": read_layout(anchor).architecture}
    own |= {key: text for key in kept if (text := anchor.metadata.get(key))}
    return compose_metadata(plan, hashes, own, title, date, recipe)


def compose_metadata(
    plan: MergePlan, hashes: Mapping[str, FileHashes], own: Mapping[str, str], title: str, date: str,
    recipe: Recipe | None,
) -> dict[str, str]:  # fmt: skip
    """What any output of a plan says, with what is its `own`; nothing that is empty, and no path of this machine."""
    headers = {**plan.files, **plan.networks}
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or (recipe.title if recipe else "") or plan.formula.source,
        "modelspec.merged_from": ", ".join(name_of_file(header.path) for header in headers.values()),
        "modelspec.prediction_type": plan.prediction,
        "modelspec.license": join_licenses(headers).text,
        "modelspec.date": date,
        **own,
        **describe_making(plan, hashes, recipe),
    }
    return without_paths({key: text for key, text in metadata.items() if text})


def describe_making(plan: MergePlan, hashes: Mapping[str, FileHashes], recipe: Recipe | None) -> dict[str, str]:
    """`sd_merge_recipe` and `sd_merge_models`: how the file was made, and what is known of its parents."""
    headers = {**plan.files, **plan.networks}
    rights = join_licenses(headers)
    notes = recipe.models if recipe else {}
    merge_recipe = {
        "type": RECIPE_TYPE,
        "formula": plan.formula.source,
        "canonical_formula": format_formula(plan.formula.tree),
        "coefficients": describe_sums(plan),
        "models": {name: hashes[name].sha256 for name in plan.files},
        "networks": {name: hashes[name].sha256 for name in plan.networks},
        "descriptions": {name: text for name, text in notes.items() if text},
        "anchor": plan.anchor,
        "options": changed_options(plan.options),
        "decisions": [*plan.decisions, *([rights.conflict] if rights.conflict else [])],
        "versions": versions_used(plan),
        "primary_model_hash": hashes[plan.anchor].sha256 if plan.anchor in hashes else "",
    }
    parents: dict[str, Any] = {}
    for name, header in headers.items():
        inherited = parse_json(header.metadata.get("sd_merge_models"))
        if isinstance(inherited, dict):
            parents.update(inherited)
        parents[hashes[name].sha256] = parent_entry(header)
    return {"sd_merge_recipe": dump_json(clean_value(merge_recipe)), "sd_merge_models": dump_json(clean_value(parents))}


def changed_options(options: MergeOptions) -> dict[str, Any]:
    """The options that are not as usual; paths as file names, so that no machine shows."""
    usual = asdict(MergeOptions())
    changed = {name: value for name, value in asdict(options).items() if value != usual[name]}
    for name in ("like", "vae_from"):
        if name in changed:
            changed[name] = name_of_file(Path(str(changed[name])))
    return changed


WORD_OF_DTYPE = {spelt: word for word, spelt in DTYPES.items()}


def command_of_recipe(
    recipe: Mapping[str, Any], parents: Mapping[str, Any], metadata: Mapping[str, str], output: str
) -> str:
    """The command that would make a merged file again, from its `sd_merge_recipe` and `sd_merge_models`.

    Files are called by the names that they had, with their hash for a folder where two had the same; LIKE and VAE
    stand-ins are options, not models.
    """
    formula = str(recipe.get("formula", ""))
    bound = {**as_table(recipe.get("models")), **as_table(recipe.get("networks"))}
    hashes_of_file: dict[str, set[str]] = {}
    files = {}
    for name, sha256 in bound.items():
        files[name] = str(as_table(parents.get(str(sha256))).get("name", f"{name}.safetensors"))
        hashes_of_file.setdefault(files[name], set()).add(str(sha256))
    words: list[str] = []
    for name, file in files.items():
        if name not in (LIKE, VAE):
            folder = f"{str(bound[name])[:AUTO_V2_DIGITS]}/" if len(hashes_of_file[file]) > 1 else ""
            words += ["-m", f"{name}={folder}{file}"]
    options = as_table(recipe.get("options"))
    if options.get("merge_vae"):
        words.append("--merge-vae")
    for name in (option.name for option in fields(MergeOptions) if option.name != "merge_vae"):
        if name in options:
            flag = "as" if name == "network" else name.replace("_", "-")
            words += [f"--{flag}", WORD_OF_DTYPE.get(str(options[name]), str(options[name]))]
    for key, flag in {"modelspec.title": "--title", "modelspec.date": "--date"}.items():
        if metadata.get(key, formula) != formula:
            words += [flag, metadata[key]]
    words += ["-o", output]
    # What begins with a minus would be read as an option.
    return shlex.join(["kwrap", "merge", *([*words, "--", formula] if formula.startswith("-") else [formula, *words])])


def as_table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
