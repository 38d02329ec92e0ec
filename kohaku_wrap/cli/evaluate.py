"""`kwrap evaluate`: what a training came to."""

from __future__ import annotations

import click

from kohaku_wrap.cli.evaluate_ccip import ccip
from kohaku_wrap.cli.evaluate_exposure import exposure
from kohaku_wrap.cli.evaluate_judge import judge, judges
from kohaku_wrap.cli.evaluate_loss import loss


@click.group(epilog="Start with `kwrap evaluate exposure RUN`.")
def command() -> None:
    """Measure what a training came to.

    How often each tag was trained, exactly, from the run's own records; and what judges, folders of ONNX files, say of
    the pictures that its networks draw.
    """


for each in (exposure, loss, judges, judge, ccip):
    command.add_command(each)
