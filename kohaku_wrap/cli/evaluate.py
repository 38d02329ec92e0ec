"""`kwrap evaluate`: what a training came to."""

from __future__ import annotations

import click

from kohaku_wrap.cli.evaluate_exposure import exposure


@click.group(epilog="Start with `kwrap evaluate exposure RUN`.")
def command() -> None:
    """Measure what a training came to.

    How often each tag was trained, exactly, from the run's own records.
    """


command.add_command(exposure)
