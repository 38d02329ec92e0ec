"""`--trust MODULE` of the verbs that read a template: whose code may run, and a line for each that will."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.output import print_aside

if TYPE_CHECKING:
    from kohaku_wrap.config.effective import Effective


def read_modules(_context: click.Context, _parameter: click.Parameter, modules: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that were given, each once. Raises UsageError for what is no module's name."""
    from kohaku_wrap.config.code_names import check_trust

    return check_trust(modules)


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--trust` (parameter `trust`)."""
    return click.option(
        "--trust",
        multiple=True,
        metavar="MODULE",
        callback=read_modules,
        help="Run code of this Python module where the template names it; again for more.",
    )(function)


def describe_trust(effective: Effective) -> list[dict[str, str]]:
    """For `--json`: what runs only as it is trusted."""
    from kohaku_wrap.config.code_names import list_trusted

    rows = list_trusted(effective.values, effective.trust)
    return [{"option": option, "value": value, "module": module} for option, value, module in rows]


def print_trust(effective: Effective) -> None:
    """Say what runs only as it is trusted, on stderr; nothing with `--json`."""
    for row in describe_trust(effective):
        print_aside(f'trusted: {row["option"]} = "{row["value"]}" runs code of {row["module"]}')
