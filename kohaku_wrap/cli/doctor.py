"""`kwrap doctor`: is this machine ready, and for this template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kohaku_wrap.cli.options import PATH, print_trust, set_option, trust_option
from kohaku_wrap.cli.output import print_json, print_lines, print_next, verb, waiting, wants_json
from kohaku_wrap.errors import KwrapError, command_line

if TYPE_CHECKING:
    from kohaku_wrap.planning.doctor_torch import Finding
    from kohaku_wrap.proving.gpu_report import Report

COLOURS = {"ok": "green", "warning": "yellow", "broken": "red"}


class NotReady(KwrapError):
    """Something would break the run."""


@verb("""
  kwrap doctor
  kwrap doctor --engine builtin
  kwrap doctor epsilon --site site.toml
  kwrap doctor --deep
""")
@click.argument("template", required=False)
@click.option("--site", "site_file", type=PATH, help="The machine's site.toml: its paths and GPUs are tried.")
@click.option("--engine", type=click.Choice(["sd-scripts", "builtin"]), help="Look at this engine's needs.")
@set_option
@trust_option
@click.option(
    "--deep",
    is_flag=True,
    help="Train, too: measure speed, memory, exact resume and kernels here, into gpu-report.md and gpu-report.json.",
)
@click.option(
    "--folder", type=PATH, default=Path("gpu-report"), show_default=True, help="Where --deep works and reports."
)
def command(
    template: str | None,
    site_file: Path | None,
    engine: str | None,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    deep: bool,
    folder: Path,
) -> None:
    """Say whether this machine is ready to train a template.

    With TEMPLATE and --site the paths, GPUs, memory and disk that this training needs are tried. Each finding says
    what was found, why it matters and what to do. Exit code 1 when something would break the run.

    --deep needs no site of yours: on GPUs it trains a full-size SDXL with random weights, with and without kwrap, and
    takes 35 GB of disk and some 20 minutes; without a GPU it trains a tiny model and says what it could not measure.
    """
    from kohaku_wrap.config.effective import Effective
    from kohaku_wrap.config.layers import resolve_template
    from kohaku_wrap.config.site import load_site
    from kohaku_wrap.config.training_data import read_training_sizes
    from kohaku_wrap.formats.caption_rows import NoImages
    from kohaku_wrap.planning.doctor import examine_machine
    from kohaku_wrap.planning.doctor_torch import Finding
    from kohaku_wrap.planning.training_plan import TrainingPlan, plan_training

    site = load_site(site_file) if site_file else None
    if overrides and not template:
        raise click.UsageError("--set changes a template: name one")
    effective: Effective | None = None
    plan: TrainingPlan | None = None
    findings: list[Finding] = []
    if site and not template:
        template = "sdxl-lokr"
    if template:
        effective = resolve_template(template, site, overrides, trust=trust)
        print_trust(effective)
        if site and effective.batch:
            try:
                with waiting("counting the network's modules"):
                    plan = plan_training(effective, read_training_sizes(effective, site.paths.images))
            except NoImages as missing:
                findings.append(
                    Finding("images", "warning", missing.message, "Disk and memory depend on them.", missing.next_step)
                )
                print_finding(findings[-1])
    engine = engine or (site.machine.engine if site else None)
    looking = examine_machine(engine, effective, plan)
    while True:
        with waiting("looking"):
            finding = next(looking, None)
        if finding is None:
            break
        findings.append(finding)
        print_finding(finding)
    broken = [finding.name for finding in findings if finding.status == "broken"]
    measured = measure_deep(folder, engine) if deep and not broken else None
    failed = [] if measured is None else [each.name for each in measured.failed]
    if wants_json():
        told = {"ready": not broken, "findings": [vars(finding) for finding in findings]}
        told |= {} if measured is None else {"deep": measured.as_json()}
        print_json({"engine": engine, "template": template, **told})
        if failed or broken:
            raise click.exceptions.Exit(1)
        return
    if failed:
        from kohaku_wrap.proving.gpu_report import TABLE_FILE

        raise NotReady(f"measured and not as it should be: {', '.join(failed)}", f"See {folder / TABLE_FILE}.")
    if broken:
        raise NotReady(f"not ready: {', '.join(broken)}", "Fix these and run `kwrap doctor` again.")
    click.echo("Ready." if template else "Ready; name a template and --site to look closer.")
    print_next(command_line("plan", template or "epsilon", "--site", site_file or "site.toml"))


def measure_deep(folder: Path, engine: str | None) -> Report:
    """Train and measure here, telling each result as it comes."""
    from kohaku_wrap.proving.gpu import measure_machine, show_measure
    from kohaku_wrap.proving.gpu_report import JSON_FILE, TABLE_FILE
    from kohaku_wrap.trainer.installed import find_trainer

    engine = engine or ("sd-scripts" if find_trainer() else "builtin")
    report = measure_machine(
        folder, engine, on_measure=lambda measure: None if wants_json() else print_lines(show_measure(measure))
    )
    if not wants_json():
        print_lines(f"The report: {folder / TABLE_FILE} and {folder / JSON_FILE}")
    return report


def print_finding(finding: Finding) -> None:
    """One line, and two more where something is to be done; nothing with `--json`."""
    if wants_json():
        return
    print_lines(f"{finding.status:<9}{finding.name}: {finding.what}", fg=COLOURS[finding.status])
    if finding.status != "ok":
        print_lines(f"{'':<9}why: {finding.why}\n{'':<9}do:  {finding.do}")
