"""`kwrap publish`: a run's network and model with a card, ready to upload."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kohaku_wrap.cli.options import FOLDER, note_compiling, open_run, site_option, threads_option
from kohaku_wrap.cli.output import print_answer, progress_bar, verb

if TYPE_CHECKING:
    pass


@verb("""
  kwrap publish epsilon --out epsilon-published
  kwrap publish epsilon --step 13600 --out epsilon-13600 \\
      --license "Fair AI Public License 1.0-SD"
  kwrap publish runs/epsilon --no-bake --out epsilon-network
""")
@click.argument("name", metavar="RUN")
@click.option("--out", required=True, type=FOLDER, help="The folder to fill.")
@click.option("--step", type=click.IntRange(0), metavar="N", help="The network of this optimizer step; else the end's.")
@click.option("--license", "rights", default="", help="The license of the card; else the base model's.")
@click.option("--no-bake", is_flag=True, help="The network alone, without the baked model.")
@threads_option
@site_option
def command(
    name: str,
    out: Path,
    step: int | None,
    rights: str,
    no_bake: bool,
    threads: int,
    site_file: Path | None,
) -> None:
    """Fill a folder with network, baked model, card, page and hashes.

    The card shows recipe, hyperparameters, dataset counts, attempts and prompt format from the run's lock, and the
    digest of its ledger. report.html is the page of `kwrap report`, without paths of your machine and without pictures
    of the dataset. SHA256SUMS is written last: a folder that has it is whole.
    """
    from kohaku_wrap.publishing.publishing import publish_run
    from kohaku_wrap.training.comparing.site_places import find_base_model

    run = open_run(name, site_file)
    if not no_bake:
        note_compiling()
    with progress_bar("publish", "bytes") as on_progress:
        base = find_base_model(run, site_file)
        report = publish_run(run, out, step, rights, not no_bake, threads, on_progress, base)
    payload = {"run": run.folder, **{name: value for name, value in asdict(report).items() if name != "card"}}
    rows: list[tuple[str, object]] = [(file, sha256) for file, sha256 in report.files.items()]
    rows += [("page", f"not made: {report.no_page}")] if report.no_page else []
    rows += [("ledger", report.ledger_sha256 or "none"), ("license", report.license or "not stated")]
    next_step = f"read {report.card}, then upload the folder"
    print_answer(payload, f"Published in {report.folder}", rows, next_step)
