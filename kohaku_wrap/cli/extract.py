"""`kwrap extract`: images out of the tars."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.next_steps import caption_command
from kohaku_wrap.cli.options import PATH, leave_pandas_out, max_missing_option
from kohaku_wrap.cli.output import print_answer, print_next, progress_bar, verb

ONLY_IF_ANY = {
    "reduced": "made smaller",
    "rewritten": "turned upright, laid on white or scaled to 8 bits",
    "not_looked_at": "kept as an earlier kwrap wrote them",
    "other_size": "size not as in DB",
    "refused_members": "refused members of tars",
    "damaged_tars": "damaged tars",
}
"""Counts that are shown where there are any."""


@verb("""
  kwrap extract world/demo.parquet --tars world/tars --out world/images
  kwrap extract epsilon.parquet --tars /data/tars --out /data/images --jobs 16
""")
@click.argument("selection", metavar="SEL.parquet", type=PATH)
@click.option(
    "--tars",
    metavar="DIR",
    required=True,
    type=PATH,
    help="Folder of the tars, searched through, or of images named by their ids; `kwrap inspect` names its layout.",
)
@click.option("--out", "images", metavar="IMAGES", required=True, type=PATH, help="Folder of the images.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Processes that read tars; default: one a core.")
@max_missing_option
@click.option(
    "--max-pixels",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Reduce images with more pixels than this; default: keep all as they are.",
)
def command(selection: Path, tars: Path, images: Path, jobs: int | None, max_missing: int, max_pixels: int) -> None:
    """Extract and verify the selected images.

    Reads every published layout of tars, and folders of images named ID.ext, or as gallery-dl names them; decodes every
    image to its last pixel and writes it to IMAGES/NNNN/ID.ext: as it came, but upright, on white where it is
    transparent, and with 8 bits where it has 16. IMAGES/extracted.parquet lists what is verified with real
    sizes, IMAGES/extract-report.json what is missing or corrupt and why. Run it again to go on: what is
    there and verified is kept.
    """
    from kohaku_wrap.dataset.images.extract import extract_images
    from kohaku_wrap.dataset.images.extracted import REPORT_FILE

    leave_pandas_out()
    with progress_bar("images", "posts") as report_progress:
        report = extract_images(selection, tars, images, jobs, max_pixels, on_progress=report_progress)
    payload = {name: len(value) if isinstance(value, list) else value for name, value in vars(report).items()}
    payload |= {"refused_members": payload.pop("refused"), "damaged_tars": payload.pop("damaged")}
    payload["report"] = images / REPORT_FILE
    rows = [(name, payload[name]) for name in ("selected", "written", "kept", "missing", "corrupt")]
    rows += [(label, payload[name]) for name, label in ONLY_IF_ANY.items() if payload[name]]
    print_answer(payload, "Images", [*rows, ("report", images / REPORT_FILE)])
    report.check(max_missing)
    print_next(caption_command(selection, images))
