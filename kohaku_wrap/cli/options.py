"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from kohaku_wrap.cli.output import print_aside, print_note
from kohaku_wrap.cli.usage import name_parameter
from kohaku_wrap.config.code_names import check_trust, list_trusted
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import UsageError, command_line

if TYPE_CHECKING:
    from kohaku_wrap.config.effective import Effective
    from kohaku_wrap.metadata.columns import SiteMapping
    from kohaku_wrap.metadata.source import Source
    from kohaku_wrap.training.records.folder import Run

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_SITE = Path("site.toml")
PATH = click.Path(path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
"""One that is there, or is to be made."""


def read_by(read: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that reads each value of an option; the ValueError that `read` raises says what is wrong."""

    def convert(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        try:
            return tuple(map(read, value)) if isinstance(value, tuple) else None if value is None else read(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def option_group(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Several options as one decorator, in this order."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


site_option = click.option("--site", "site_file", type=PATH, default=None, help="Whose runs folder to look in.")

tags_option = click.option(
    "--tags", "tag_table", type=PATH, metavar="TAGS",
    help="A table of tags (name, category), for a DB whose tags have no category columns.",
)  # fmt: skip

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A value above all layers; repeatable."
)

trust_option = click.option(
    "--trust", multiple=True, metavar="MODULE", callback=lambda _context, _parameter, modules: check_trust(modules),
    help="Run code of this Python module where the template names it; again for more.",
)  # fmt: skip

machine_option = click.option(
    "--site", "site_file", type=PATH, default=DEFAULT_SITE, show_default=True,
    help="What is true of this machine.",
)  # fmt: skip

workers_option = click.option("--workers", type=click.IntRange(0), metavar="N", help="Loader workers of each process.")

threads_option = click.option(
    "--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads; 0 for one each processor."
)


max_missing_option = click.option(
    "--max-missing", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="Images that may be missing or unusable without an error.",
)  # fmt: skip


def list_given() -> Iterator[tuple[click.Option, Any]]:
    """The options that the running command was given, each with its value."""
    for parameter in list_given_parameters():
        if isinstance(parameter, click.Option):
            yield parameter, click.get_current_context().params[parameter.name or ""]


def list_given_parameters() -> Iterator[click.Parameter]:
    """The options and arguments that the running command was given."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in context.params and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            yield parameter


def refuse_idle(use: str, but: Container[str] = (), of: Container[str] = ()) -> None:
    """Raise UsageError for what the running command was given and does not read in this `use`: as in `retype`."""
    idle = [
        name_parameter(parameter).strip("[]")
        for parameter in list_given_parameters()
        if parameter.name not in but and (not of or parameter.name in of)
    ]
    if idle:
        *names, last = idle
        which = f"{', '.join(names)} and {last} do" if names else f"{last} does"
        words = click.get_current_context().command_path.split()[1:]
        shown = command_line(*words, "--help")
        raise UsageError(f"{which} nothing {use}", f"Leave that out; `{shown}` has examples of each use.")


def retype(*but: str, of: Container[str] = (), absolute: bool = False) -> list[str]:
    """The options that the running command was given, to type them again: all `but` these, or those `of` these names.

    Names are those of its parameters. `absolute`: paths from the root on.
    """
    words: list[str] = []
    for option, value in list_given():
        if option.name in but or (of and option.name not in of):
            continue
        for each in value if option.multiple else [value]:
            shown = each.absolute() if absolute and isinstance(each, Path) else each
            words += [max(option.opts, key=len), *([] if option.is_flag else [str(shown)])]
    return words


def runs_folders(site_file: Path | None) -> tuple[Path, ...]:
    """Where runs are looked for: the site's folder, and `runs` here."""
    folders = [Path("runs")]
    if site_file is not None or DEFAULT_SITE.is_file():
        folders.insert(0, load_site(site_file or DEFAULT_SITE).paths.runs)
    return tuple(dict.fromkeys(folder.absolute() for folder in folders))


def open_run(name: str, site_file: Path | None) -> Run:
    """The run of this name, or at this path; its images may lie where the site says.

    Raises what finding it and reading the site raise.
    """
    from dataclasses import replace

    from kohaku_wrap.training.records.folder import find_run

    run = find_run(name, runs_folders(site_file))
    images = load_site(site_file).paths.images if site_file is not None else None
    return replace(run, images_now=images) if images else run


def open_source(db: Path, mapping: SiteMapping, tag_table: Path | None) -> Source:
    """The metadata set of `--db`, read by the dataset's `[metadata]` and with the categories of `--tags`."""
    from dataclasses import replace

    from kohaku_wrap.metadata.opening import open_metadata

    source = open_metadata(db, replace(mapping, tag_table=tag_table))
    if tag_table and not source.edition.has_tag_strings:
        print_note(f"note: --tags {tag_table} is not read: {db} gives the category of each tag itself")
    return source


class WithoutPandas(MetaPathFinder):
    """Finds no pandas."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def leave_pandas_out() -> None:
    """Keep pyarrow from importing pandas with its first array, 0.3 s for what no command on data uses."""
    import pyarrow as pa

    sys.meta_path.insert(0, WithoutPandas)
    pa.array([])  # it looks once, and remembers that there is none
    sys.meta_path.remove(WithoutPandas)


def describe_trust(effective: Effective) -> list[dict[str, str]]:
    """For `--json`: what runs only as it is trusted."""
    rows = list_trusted(effective.values, effective.trust)
    return [{"option": option, "value": value, "module": module} for option, value, module in rows]


def print_trust(effective: Effective) -> None:
    """Say what runs only as it is trusted, on stderr; nothing with `--json`."""
    for row in describe_trust(effective):
        print_aside(f'trusted: {row["option"]} = "{row["value"]}" runs code of {row["module"]}')


def note_compiling() -> None:
    """Say that a merge will take longer where its loops are not compiled yet."""
    from kohaku_wrap.merging.arithmetic.kernels import loops_are_compiled

    if not loops_are_compiled():
        print_note("note: the first merge of an installation compiles its loops first, for some ten seconds")
