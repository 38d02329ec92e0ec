"""`kwrap template`: list, show, check, copy and compare templates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from kohaku_wrap.cli.options import PATH, describe_trust, print_trust, set_option, trust_option
from kohaku_wrap.cli.output import (
    ESCAPES,
    Verb,
    paint,
    print_answer,
    print_aside,
    print_json,
    print_lines,
    print_next,
    wants_json,
)
from kohaku_wrap.cli.template_check import check
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.fates import fate_of_key
from kohaku_wrap.config.network import list_preset_factors, list_reached
from kohaku_wrap.config.templates import find_source, list_left_behind, list_templates, user_templates
from kohaku_wrap.errors import ProblemsFound, UsageError, command_line

LONGEST_VALUE = 48
"""Longer values push their origin aside."""


class TemplateExists(UsageError):
    """The copy's name is taken."""


@click.group(
    "template",
    epilog="Start with `kwrap template ls`, then `kwrap template show epsilon --why`.",
)
def command() -> None:
    """Look at, check and copy training templates.

    A template says what is true of a training: rates, schedule, network, captions, effective batch. It holds no path
    and no number of GPUs, so it can be copied between people. NAME is a path, else a name in your own folder
    ($KWRAP_HOME/templates), else one that came with kwrap.
    """


@command.command("ls", cls=Verb, examples="  kwrap template ls", writes=False)
def list_command() -> None:
    """List the templates that have a name, yours first."""

    templates = list_templates()
    payload = {"templates": [vars(each) for each in templates], "user_folder": user_templates()}
    rows = [(t.name, t.title + (" (yours)" if t.origin == "yours" else "")) for t in templates]
    print_answer(payload, "Templates", rows, "kwrap template show epsilon --why")


@command.command(
    "show",
    cls=Verb,
    examples="  kwrap template show epsilon --why\n  kwrap template show epsilon --set seed=7",
    writes=False,
)
@click.argument("name")
@click.option("--site", type=PATH, help="Show the values on this machine, too.")
@set_option
@trust_option
@click.option("--why", is_flag=True, help="Name the layer and file that set each value, and what it decides.")
@click.option("--all", "with_defaults", is_flag=True, help="Show the trainer's own defaults, too.")
def show_command(
    name: str,
    site: Path | None,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    why: bool,
    with_defaults: bool,
) -> None:
    """Print the effective values of a template.

    With --why each value names the layer and the file that set it; later layers win. Below stands which options decide
    files, logs or speed only, and which decide the weights but could not be tried without a GPU or more; with --all
    also those of the trainer that kwrap refuses, and why.
    """
    from kohaku_wrap.config.checks import check_effective, describe_notes
    from kohaku_wrap.config.layers import load_layers
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.trainer.installed import find_option_table

    table = find_option_table(read_live=False)
    effective, problems = load_layers(name, load_site(site) if site else None, overrides, table, trust)
    problems += check_effective(effective)
    values = effective.values if with_defaults else {key: entry.value for key, entry in effective.entries.items()}
    if wants_json():
        print_json(
            {
                "name": effective.name,
                "path": str(effective.path),
                "title": effective.title,
                "notes": describe_notes(effective),
                "values": values,
                "origins": {key: effective.origin(key) for key in values},
                "fates": {key: fate.describe() if (fate := fate_of_key(key)) else "" for key in values},
                "preset": dict(effective.preset),
                "preset_factors": dict(list_preset_factors(effective.preset)),
                "factor_reaches": list_reached(effective.preset),
                "trust": describe_trust(effective),
                "options_from": table.source,
                "problems": [vars(problem) for problem in problems],
            },
        )
    else:
        print_values(effective, values, why, name)
        print_trust(effective)
    if problems:
        raise ProblemsFound(str(effective.path), problems, "Fix these and look again.")


def print_values(effective: Effective, values: dict[str, Any], why: bool, typed: str) -> None:
    """Aligned `key = value` lines, with the layer behind each; `typed` is what the template was called by."""
    click.echo(paint(f"{effective.name}: {effective.title}".translate(ESCAPES), bold=True))
    for note in effective.notes:
        print_lines(f"  {note}")
    shown = {
        key.translate(ESCAPES): json.dumps(value, ensure_ascii=False, default=str).translate(ESCAPES)
        for key, value in values.items()
    }
    # Each table's keys are aligned by themselves: those of dataset_options are longer than all others.
    widths = {table: max(len(key) for key in shown if table_of(key) == table) for table in map(table_of, shown)}
    origins_at = max((widths[table_of(key)] + min(len(text), LONGEST_VALUE) for key, text in shown.items()), default=0)
    for key, text in sorted(shown.items(), key=lambda item: (table_of(item[0]), item[0])):
        width = widths[table_of(key)]
        origin = f"  {effective.origin(key).translate(ESCAPES)}" if why else ""
        click.echo(f"{paint(key.ljust(width), fg='cyan')}  {text.ljust(origins_at - width if why else 0)}{origin}")
        if why and key == "network_args.factor":
            print_preset_factors(effective.preset)
    if why:
        print_fates(values)
    else:
        print_next(command_line("template", "show", typed, "--why"))


def print_preset_factors(preset: Mapping[str, Any]) -> None:
    """The preset's factors, and what the factor of network_args still reaches beside them."""

    factors = list_preset_factors(preset)
    for pattern, factor in factors:
        print_lines(f"  {factor} for {pattern}, by the preset; network_args.factor does not reach these")
    if factors:
        reached = ", ".join(list_reached(preset)) or "no module"
        print_lines(
            f"  network_args.factor still reaches: {reached}" + ", but for the above" * (reached != "no module")
        )


def print_fates(keys: Iterable[str]) -> None:
    """What the options decide, by kind; those that are not named decide the weights."""

    named: dict[str, list[str]] = {}
    for key in sorted(keys):
        fate = fate_of_key(key)
        if fate and (fate.kind != "weights" or fate.untestable):
            why = fate.untestable if fate.kind == "weights" else fate.reason
            named.setdefault(fate.kind, []).append(key if fate.kind == "files" else f"{key} ({why})")
    for kind, words in (
        ("files", "decide files, logs or speed only"),
        ("weights", "decide the weights, not testable here"),
        ("unverified", "left to the trainer, unverified"),
        ("refused", "refused"),
    ):
        if kind in named:
            print_lines(f"{words}: {', '.join(named[kind])}")
    print_lines("All others decide the weights; they are in the options digest of a run.")


def table_of(key: str) -> str:
    """The table that a key stands in: `dataset_options`; empty for those at the top."""
    return key.rpartition(".")[0]


@command.command(
    "cp",
    cls=Verb,
    examples="""
  kwrap template cp epsilon mine.toml
  kwrap template cp epsilon mine
  kwrap template cp gamma-rev1 my-merge.toml
""",
)
@click.argument("name")
@click.argument("destination")
@click.option("--force", is_flag=True, help="Replace a file of that name.")
def copy_command(name: str, destination: str, force: bool) -> None:
    """Copy a template to change it.

    NAME may also be a preset (kohaku-lokr, small-24gib), a merge recipe (bake-network, gamma-rev1) or a file of styles
    (kohaku). DESTINATION is a path, or a name in your own folder ($KWRAP_HOME/templates). What a template extends is
    found by name as before, so the copy holds only the differences. A preset belongs into a folder presets/ beside the
    template that names it.
    """
    from kohaku_wrap.files import expand_user, write_new_text, write_text
    from kohaku_wrap.merging.blocks import PRESETS_FILE

    source = find_source(name)
    kind = source.parent.name
    target = expand_user(destination)
    if target.is_dir():
        folder = target / "presets" if kind == "presets" and target.name != "presets" else target
        target = folder / source.name
    elif target.suffix != ".toml":
        own = user_templates() / kind if kind in ("presets", "styles") else user_templates()
        own = Path() if kind == "merges" else own
        target = own / f"{destination}.toml" if "/" not in destination else Path(f"{destination}.toml")
    text = source.read_text(encoding="utf-8")
    if force:
        write_text(target, text)
    else:
        try:
            write_new_text(target, text)
        except FileExistsError:
            if not os.path.lexists(target):
                raise  # Of its folder, where a file lies.
            raise TemplateExists(f"{target}: already there", "Choose another name, or add --force.") from None
    if source.name == PRESETS_FILE:
        kind = "blocks"
    following = {
        "blocks": "paste a line's numbers into a formula, as in 'base + blocks(1,0,…) * net(style)'; blocks(\"NAME\") "
        "knows kwrap's own presets alone",
        "presets": f'name it in a template: preset = "{target.stem}"',
        "merges": command_line("merge", target, "--dry-run") + " with -m NAME=FILE for each of its models",
        "styles": command_line("prompt", "--style") + " lists them",
    }
    for lost in list_left_behind(source, target) if kind not in following else ():
        print_aside(f"warning: the copy names {lost}, which is not found from there: copy that too")
    check = command_line("template", "check", target)
    payload = {"source": str(source), "path": str(target)}
    next_step = f"edit it, then {following.get(kind, check)}"
    print_answer(payload, "", [("copied", source), ("to", target)], next_step)


@command.command("diff", cls=Verb, examples="  kwrap template diff epsilon delta", writes=False)
@click.argument("first")
@click.argument("second")
def diff_command(first: str, second: str) -> None:
    """Print the effective values in which two templates differ."""
    from kohaku_wrap.config.layers import load_layers

    (left, problems), (right, others) = load_layers(first), load_layers(second)
    for name, found in ((first, problems), (second, others)):
        if found:
            raise ProblemsFound(name, found, f"Fix these first; `{command_line('template', 'check', name)}` shows all.")
    left_values, right_values = flatten_values(left), flatten_values(right)
    keys = sorted(left_values.keys() | right_values.keys(), key=lambda key: ("." in key, key))
    changed = {
        key: (left_values.get(key), right_values.get(key))
        for key in keys
        if left_values.get(key) != right_values.get(key)
    }
    if not changed and not wants_json():
        print_lines(f"{left.name} and {right.name} are the same in effect.")
        return
    differences = [{"key": key, "first": pair[0], "second": pair[1]} for key, pair in changed.items()]
    payload = {"first": left.name, "second": right.name, "differences": differences}
    rows = [(key, f"{show_value(pair[0])} → {show_value(pair[1])}") for key, pair in changed.items()]
    next_step = command_line("template", "show", second, "--why")
    print_answer(payload, f"{left.name} → {right.name}", rows, next_step)


def flatten_values(effective: Effective) -> dict[str, Any]:
    """All effective values, the preset's keys among them."""
    return {**effective.values, **{f"preset.{key}": value for key, value in effective.preset.items()}}


def show_value(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)


command.add_command(check)
