"""`kwrap trainer`: the sd-scripts checkout that kwrap trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.output import beyond_output, json_option, print_json, print_note, print_table

if TYPE_CHECKING:
    from kohaku_wrap.trainer.checkout import Checkout, TrainerReport
    from kohaku_wrap.trainer.requirements import RequirementState


@click.group(epilog="Start with `kwrap trainer install`; `kwrap trainer show` tells what is there.")
def command() -> None:
    """Get or look at the sd-scripts that kwrap trains with.

    The checkout lies under $KWRAP_HOME (default: the platform's data folder); KWRAP_SD_SCRIPTS points at another one.
    """


@command.command(
    epilog="""
\b
Examples:
  kwrap trainer install
  kwrap trainer install --source ~/mirrors/sd-scripts --commit v0.10.0
"""
)
@click.option(
    "--source", default="", metavar="URL|PATH", help="Git URL or local repository (default: the project's own)."
)
@click.option("--commit", default="", metavar="C", help="A supported tag or commit (default: v0.11.1).")
@click.option("--no-requirements", is_flag=True, help="Leave missing Python packages to me.")
@click.option("--requirements-only", is_flag=True, help="Only the Python packages, for a checkout of my own.")
@json_option
@beyond_output()
def install(source: str, commit: str, no_requirements: bool, requirements_only: bool, as_json: bool) -> None:
    """Get a supported commit of sd-scripts and what it lacks.

    The commit is checked file by file and place by place. Packages that are missing go beside the checkout and are
    seen by the trainer's process alone; torch is never replaced.
    """
    from kohaku_wrap.errors import UsageError
    from kohaku_wrap.trainer.checkout import find_checkout, install_checkout
    from kohaku_wrap.trainer.requirements import install_requirements

    if no_requirements and requirements_only:
        raise UsageError("--no-requirements and --requirements-only leave nothing to do", "Give one of them.")

    def note(text: str) -> None:
        if not as_json:
            print_note(text)

    checkout, was_there = (find_checkout(), True) if requirements_only else install_checkout(source, commit, note)
    installed = [] if no_requirements else install_requirements(note)
    packages = [f"{each.distribution} {each.version}" for each in installed]
    if as_json:
        print_json("trainer install", {**describe(checkout), "was_there": was_there, "packages_installed": packages})
        return
    rows = [*checkout_rows(checkout), ("packages installed", ", ".join(packages) or "none")]
    print_table("sd-scripts " + ("was there already" if was_there else "installed"), rows, "kwrap trainer show")


@command.command(epilog="\b\nExample:\n  kwrap trainer show --json")
@json_option
def show(as_json: bool) -> None:
    """Show the sd-scripts in use, and what kwrap corrects in it."""
    from kohaku_wrap.trainer.checkout import report_trainer
    from kohaku_wrap.trainer.commits import SUPPORTED

    report = report_trainer()
    if as_json:
        supported = [{"name": each.name, "commit": each.commit} for each in SUPPORTED]
        print_json("trainer show", {**describe_report(report), "supported_commits": supported})
        return
    stand = sum(match.count == 1 for match in report.anchors)
    rows = [
        *checkout_rows(report.checkout),
        ("places in its code", f"{stand} of {len(report.anchors)} are as kwrap knows them"),
        *[(f"  {match.anchor.name}", anchor_text(match.anchor.replacement, match.count)) for match in report.anchors],
        *[(state.requirement.distribution, requirement_text(state)) for state in report.requirements],
        ("installed", ", ".join(each.name for each in report.installed) or "none"),
    ]
    next_step = "kwrap train TEMPLATE --site site.toml" if report.is_ready else "kwrap trainer install"
    print_table("sd-scripts", rows, next_step)


def anchor_text(replacement: str | None, count: int) -> str:
    """One place in the trainer's code for people."""
    if count != 1:
        return f"found {count} times, must be 1"
    return "as known" if replacement is None else "as known, corrected when loaded"


def requirement_text(state: RequirementState) -> str:
    """One package for people."""
    if state.is_missing:
        return f"missing; tested: {state.requirement.version}"
    where = "" if state.folder is None else ", for the trainer alone"
    return f"{state.found}{where}" + (f"; tested: {state.requirement.version}" if state.is_untested else "")


def checkout_rows(checkout: Checkout) -> list[tuple[str, Any]]:
    """What a checkout is, for people."""
    support = "supported" if checkout.is_supported else "files were changed" if checkout.is_changed else "not supported"
    return [
        ("path", checkout.path),
        ("commit", f"{checkout.commit or 'unknown'} ({checkout.name})"),
        ("support", support),
        ("chosen by", checkout.chosen_by),
    ]


def describe(checkout: Checkout) -> dict[str, Any]:
    """What a checkout is, as plain data."""
    return {name.removeprefix("is_"): value for name, value in vars(checkout).items()}


def describe_report(report: TrainerReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        **describe(report.checkout),
        "ready": report.is_ready,
        "anchors": [
            {
                "name": match.anchor.name,
                "file": ", ".join(match.files),
                "within": match.anchor.within,
                "found": match.count,
                "corrected": match.anchor.replacement is not None,
            }
            for match in report.anchors
        ],
        "patches": [match.anchor.name for match in report.anchors if match.anchor.replacement is not None],
        "requirements": [
            {
                "name": state.requirement.distribution,
                "tested": state.requirement.version,
                "found": state.found,
                "folder": state.folder,
            }
            for state in report.requirements
        ],
        "installed": [describe(each) for each in report.installed],
    }
