"""`kwrap trainer`: the sd-scripts checkout that kwrap trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.output import (
    Verb,
    print_answer,
    print_aside,
    print_table,
    wants_json,
)
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.trainer.checkout import (
    Checkout,
    TrainerReport,
    find_checkout,
    install_checkout,
    list_installed,
    list_later,
    report_trainer,
)
from kohaku_wrap.trainer.requirements import Requirement, RequirementState, install_requirements

if TYPE_CHECKING:
    from kohaku_wrap.proving.prove_trainer import Proof


@click.group(epilog="Start with `kwrap trainer install`; `kwrap trainer show` shows what is there.")
def command() -> None:
    """Get or look at the sd-scripts that kwrap trains with.

    The checkout lies under $KWRAP_HOME (default: the platform's data folder); KWRAP_SD_SCRIPTS points at another one.
    """


source_option = click.option(
    "--source", default="", metavar="URL|PATH", help="Git URL or local repository (default: the project's own)."
)
accept_option = click.option(
    "--accept-difference", is_flag=True, help="Keep the proof of a commit that trains other networks, and say so."
)


@command.command(
    cls=Verb,
    examples="""
  kwrap trainer install
  kwrap trainer install --source ~/mirrors/sd-scripts --commit v0.10.0
  kwrap trainer install --commit newest --prove
""",
)
@source_option
@click.option("--commit", default="", metavar="C", help="A tag, commit, branch or `newest` (default: v0.11.1).")
@click.option("--prove", is_flag=True, help="Prove a commit that is not supported, on this machine; some minutes.")
@accept_option
@click.option("--no-requirements", is_flag=True, help="Leave missing Python packages to me.")
@click.option("--requirements-only", is_flag=True, help="Only the Python packages, for a checkout of my own.")
def install(
    source: str,
    commit: str,
    prove: bool,
    accept_difference: bool,
    no_requirements: bool,
    requirements_only: bool,
) -> None:
    """Get a commit of sd-scripts and what it lacks.

    The commit is checked file by file and place by place. Packages that are missing go beside the checkout and are
    seen by the trainer's process alone; torch is never replaced. Another commit than the supported ones is installed
    with --prove, if it trains and resumes exactly here, and trains the networks of a supported one.
    """

    if no_requirements and requirements_only:
        raise UsageError("--no-requirements and --requirements-only leave nothing to do", "Give one of them.")
    if accept_difference and not prove:
        raise UsageError("--accept-difference belongs to --prove", "Add --prove.")
    installed: list[Requirement] = []

    def examine(checkout: Checkout) -> None:
        if not checkout.is_supported:
            # A proof trains.
            installed.extend([] if no_requirements else install_requirements(print_aside))
            run_proof(checkout, source, accept_difference)

    checkout, was_there = (
        (find_checkout(), True)
        if requirements_only
        else install_checkout(source, commit, print_aside, examine if prove else None)
    )
    installed += [] if no_requirements else install_requirements(print_aside)
    packages = [f"{each.distribution} {each.version}" for each in installed]
    payload = {**describe(checkout), "was_there": was_there, "packages_installed": packages}
    rows = [*checkout_rows(checkout), ("packages installed", ", ".join(packages) or "none")]
    print_answer(payload, title_of(was_there), rows, "kwrap trainer show")


@command.command(cls=Verb, examples="  kwrap trainer prove\n  KWRAP_SD_SCRIPTS=~/sd-scripts kwrap trainer prove")
@source_option
@accept_option
def prove(source: str, accept_difference: bool) -> None:
    """Prove on this machine that the sd-scripts in use resumes exactly.

    Trains a small world on the CPU as a whole, with kills and resumes, and on a supported commit (got from --source, or
    from the checkout's own history, where none is installed); all must be equal. It takes some minutes. From then on
    the checkout is taken like a supported one; lock and card say what was proved.
    """

    proof = run_proof(find_checkout(), source, accept_difference)
    rows = [(step.tried, f"{step.result} ({step.seconds:.0f} s)") for step in proof.steps]
    rows += [("support", proof.commit.support), ("digest", proof.commit.digest)]
    payload = {**proof.about(), **vars(proof.commit)}
    print_answer(payload, f"sd-scripts {proof.commit.name}", rows, "kwrap trainer show")


@command.command(cls=Verb, examples="  kwrap trainer update --dry-run")
@source_option
@click.option("--commit", default="newest", metavar="C", help="A tag, commit or branch (default: newest).")
@click.option("--dry-run", is_flag=True, help="Only say what is there and what would change.")
@accept_option
def update(source: str, commit: str, dry_run: bool, accept_difference: bool) -> None:
    """Get the newest sd-scripts, and prove it.

    The newest is what the source has checked out, for a URL the last commit of its default branch; in a fork that may
    be the fork's own commit. What changes in its options is shown first. One that is older than what is installed is
    installed only by --commit. Runs go on with the commit of their lock.
    """
    from kohaku_wrap.trainer.cloning import NEWEST
    from kohaku_wrap.trainer.installed import ask_trainer, find_option_table
    from kohaku_wrap.trainer.options import compare_tables, parse_table

    before = [each.name for each in list_installed()]
    changes: list[str] = []
    found: list[Checkout] = []
    later: list[str] = []

    def examine(checkout: Checkout) -> None:
        found.append(checkout)
        later.extend(list_later(checkout))
        # Its options are read by loading it.
        install_requirements(print_aside)
        changes.extend(
            compare_tables(find_option_table(), parse_table(ask_trainer(checkout.path), f"sd-scripts {checkout.name}"))
        )
        if not wants_json():
            print_table(
                "update",
                [
                    ("installed", ", ".join(before) or "none"),
                    ("the source has", f"{checkout.commit} ({checkout.name}, {checkout.support})"),
                    *([("nothing newer", f"installed is {', '.join(later)}")] if later else []),
                    *[("option", line) for line in changes or ["none new, none gone, no other default"]],
                ],
            )
        if dry_run or (later and commit == NEWEST):
            raise OnlyLooked("nothing was installed", "Leave --dry-run out.")
        if not checkout.is_supported:
            run_proof(checkout, source, accept_difference)

    try:
        checkout, was_there = install_checkout(source, commit, print_aside, examine)
    except OnlyLooked:
        checkout, was_there = found[0], False
    answer = {"installed": before, "options": changes, "later": later, "was_there": was_there, "dry_run": dry_run}
    if wants_json() or not (dry_run or (later and commit == NEWEST)):
        payload = {**describe(checkout), **answer}
        print_answer(payload, title_of(was_there), checkout_rows(checkout))


class OnlyLooked(KwrapError):
    """A dry run has seen enough."""


def title_of(was_there: bool) -> str:
    """What came of an installation."""
    return "sd-scripts " + ("was there already" if was_there else "installed")


def run_proof(checkout: Checkout, source: str, accept_difference: bool) -> Proof:
    """Prove a checkout, in a folder that is removed when it is proved."""
    from kohaku_wrap.proving.prove_trainer import proof_folder, prove_checkout

    with proof_folder(checkout) as folder:
        return prove_checkout(checkout, folder, source, accept_difference=accept_difference, on_note=print_aside)


@command.command(cls=Verb, examples="  kwrap trainer show --json", writes=False)
def show() -> None:
    """Show the sd-scripts in use, and what kwrap corrects in it."""
    from kohaku_wrap.trainer.commits import SUPPORTED

    report = report_trainer()
    supported = [{"name": each.name, "commit": each.commit} for each in SUPPORTED]
    payload = {**describe_report(report), "supported_commits": supported}
    stand = sum(match.count == 1 for match in report.anchors)
    rows = [
        *checkout_rows(report.checkout),
        ("places in its code", f"{stand} of {len(report.anchors)} are as kwrap knows them"),
        *[(f"  {match.anchor.name}", anchor_text(match.anchor.replacement, match.count)) for match in report.anchors],
        *[(state.requirement.distribution, requirement_text(state)) for state in report.requirements],
        ("installed", ", ".join(each.name for each in report.installed) or "none"),
    ]
    next_step = "kwrap train TEMPLATE --site site.toml" if report.is_ready else "kwrap trainer install"
    print_answer(payload, "sd-scripts", rows, next_step)


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
    return [
        ("path", checkout.path),
        ("commit", f"{checkout.commit or 'unknown'} ({checkout.name})"),
        ("support", checkout.support),
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
