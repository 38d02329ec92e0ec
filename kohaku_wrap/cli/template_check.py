"""`kwrap template check`: every fault of template files and folders."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.options import PATH, describe_trust, print_trust, trust_option
from kohaku_wrap.cli.output import print_json, print_lines, print_next, print_notes, verb, wants_json
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, command_line
from kohaku_wrap.files import expand_user
from kohaku_wrap.wording import count_of, show_path


@verb("  kwrap template check mine.toml\n  kwrap template check templates/")
@click.argument("files", nargs=-1, required=True)
@click.option("--site", type=PATH, help="Check on this machine, too: does the batch divide?")
@trust_option
@click.option("--modules/--no-modules", default=None, help="Match own presets against SDXL's modules (needs torch).")
def check(files: tuple[str, ...], site: Path | None, trust: tuple[str, ...], modules: bool | None) -> None:
    """Find every fault of template files or folders.

    Names, types, choices and contradictions. Exit code 1 if any has one. A folder means its *.toml files, and its
    presets/*.toml as presets; a site file is checked as a site. Patterns of a preset of your own are matched against
    SDXL's modules where torch and LyCORIS are installed; that takes some seconds once.
    """
    from importlib.util import find_spec

    from kohaku_wrap.config.base_model import note_other_prediction
    from kohaku_wrap.config.check_files import check_file, kind_of, list_files
    from kohaku_wrap.config.training_data import check_texts, note_whole_captions
    from kohaku_wrap.planning.training_plan import check_engine
    from kohaku_wrap.trainer.installed import find_option_table

    table = find_option_table()
    on_site = load_site(site) if site else None
    reports = [(path, *check_file(path, on_site, table, trust)) for path in list_files(files)]
    if modules or (modules is None and find_spec("torch") and find_spec("lycoris")):
        for _, problems, effective in reports:
            problems += check_modules(effective, on_site)
    for _, problems, effective in reports:
        problems += [*check_engine(effective), *check_texts(effective)] if effective and on_site else []
    faulty = [(path, problems) for path, problems, _ in reports if problems]
    resolved = [(path, effective) for path, _, effective in reports if effective]
    notes = sorted(
        {note for _, each in resolved for note in (*note_whole_captions(each), *note_other_prediction(each))}
    )
    if wants_json():
        print_json(
            {
                "options_from": table.source,
                "checked": [str(path) for path, _, _ in reports],
                "trust": [{"file": str(path), **row} for path, each in resolved for row in describe_trust(each)],
                "problems": [{"file": str(path), **vars(each)} for path, problems in faulty for each in problems],
                "notes": notes,
            },
        )
        if faulty:
            raise click.exceptions.Exit(1)
        return
    print_notes(notes)
    for _, effective in resolved:
        print_trust(effective)
    for path, problems in faulty:
        print_lines(ProblemsFound(show_path(path), problems).message)
    if faulty:
        count = sum(len(problems) for _, problems in faulty)
        raise FaultyTemplates(
            f"{count_of(count, 'problem')} in {len(faulty)} of {count_of(len(reports), 'file')}",
            f"Run `{command_line('template', 'show', faulty[0][0], '--why')}` to see where each value comes from.",
        )
    print_lines(f"{count_of(len(reports), 'file')}, no problems (options of {table.source}).")
    kinds = {path: kind_of(path) for path, _, _ in reports}
    typed = reports[0][0] if expand_user(files[0]).is_dir() else files[0]
    template = typed if list(kinds.values()) == ["template"] else "TEMPLATE"
    site_file = site or next((path for path, kind in kinds.items() if kind == "site"), "site.toml")
    print_next(command_line("plan", template, "--site", site_file))


class FaultyTemplates(KwrapError):
    """At least one template has a fault."""


def check_modules(effective: Effective | None, site: Site | None) -> list[Problem]:
    """Patterns of a file's preset that match no module; shipped presets on a full SDXL are known to match."""
    from kohaku_wrap.config.check_files import is_shipped_preset
    from kohaku_wrap.config.network import find_preset_faults
    from kohaku_wrap.planning.module_counts import count_network, find_unmatched

    if effective is None or not effective.preset or any(find_preset_faults(effective)):
        return []
    if site is None and is_shipped_preset(effective.preset):
        return []
    return effective.blame(find_unmatched(count_network(effective)))
