"""What the names of a merge stand for: files for the formula's names, and the names that options take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kohaku_wrap.errors import UsageError
from kohaku_wrap.formats.safetensors import Header, read_header
from kohaku_wrap.merging.blocks import PARTS
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.formula.tree import names_of_models, names_of_networks


class UnboundName(UsageError):
    """Names of the formula and of the paths that do not fit together."""


def bind_names(formula: Formula, paths: Mapping[str, Path]) -> None:
    """Raise UnboundName unless every name of the formula has a path and no path is left over."""
    models, networks = names_of_models(formula.tree), names_of_networks(formula.tree)
    if both := sorted(set(models) & set(networks)):
        raise UnboundName(f"{both[0]} stands both as a model and in net(…)", "Give the network another name.")
    missing = [name for name in [*models, *networks] if name not in paths]
    if missing:
        options = " ".join(f"-m {name}=FILE" for name in missing)
        raise UnboundName(f"no file is given for {', '.join(missing)}", f"Add: {options}")
    if unused := [name for name in paths if name not in models and name not in networks]:
        raise UnboundName(
            f"{', '.join(unused)} does not stand in the formula",
            f"The formula names {', '.join([*models, *networks])}.",
        )


def choose_file(asked: str, stand_in: str, files: dict[str, Header]) -> str:
    """The name that `asked` (a name of the formula, or a path) goes by in `files`."""
    if asked in files:
        return asked
    if not Path(asked).is_file():
        raise UnboundName(f"{asked} is neither a model of the formula nor a file", f"Models: {', '.join(files)}.")
    files[stand_in] = read_header(Path(asked))
    return stand_in


def split_parts(text: str) -> list[str]:
    """The parts that --parts names. Raises UnboundName for one that is none."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if unknown := [part for part in parts if part not in PARTS]:
        raise UnboundName(f"--parts {text}: {unknown[0]!r} is no part of a model", f"Parts: {', '.join(PARTS)}.")
    return parts
