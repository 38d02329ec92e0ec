"""Wrong arguments: click's usage errors as one message and the next command to try."""

from __future__ import annotations

from collections.abc import Sequence

import click

from kohaku_wrap.cli.output import Verb


def describe_usage_error(error: click.UsageError, program: click.Group, arguments: Sequence[str]) -> tuple[str, str]:
    """What is wrong with these arguments of the program, and what to type next."""
    words = error.ctx.command_path if error.ctx else find_command(program, arguments)
    what = "the commands" if error.ctx and isinstance(error.ctx.command, click.Group) else "its options and examples"
    following = f"Run `{words} --help` to see {what}."
    if isinstance(error, click.MissingParameter) and error.ctx and isinstance(error.ctx.command, Verb):
        following = f"For example: `{error.ctx.command.first_example}`. {following}"
    return f"{words}: {describe_fault(error)}", following


def describe_fault(error: click.UsageError) -> str:
    """One line without a full stop: the fault, and what was probably meant."""
    if isinstance(error, click.MissingParameter):
        *names, last = name_missing_parameters(error)
        return f"{', '.join(names)} and {last} are missing" if names else f"{last} is missing"
    if isinstance(error, click.BadParameter) and error.param is not None:
        # Ranges call themselves "integer range", which a mistyped number is not.
        return f"{name_parameter(error.param)}: {error.message.removesuffix('.').removesuffix(' range')}"
    near: Sequence[str] = getattr(error, "possibilities", None) or ()
    message = error.message.removesuffix(".").replace("'", "")
    message = message[:1].lower() + message[1:]
    return f"{message}; did you mean {' or '.join(near)}?" if near else message


def name_missing_parameters(error: click.MissingParameter) -> list[str]:
    """All required parameters that were not given; click stops at the first."""
    if error.ctx is None or error.param is None:
        return ["an argument"]
    required = [parameter for parameter in error.ctx.command.params if parameter.required]
    return [name_parameter(each) for each in required if error.ctx.params.get(each.name or "") is None]


def name_parameter(parameter: click.Parameter) -> str:
    """The parameter as the help writes it: --db, SEL.parquet."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.metavar or (parameter.name or "").upper()


def find_command(program: click.Group, arguments: Sequence[str]) -> str:
    """The words that name the command, for errors that click raises without a context."""
    command: click.Command | None = program
    words = ["kwrap"]
    for argument in arguments:
        command = command.get_command(click.Context(command), argument) if isinstance(command, click.Group) else None
        if command is None:
            break
        words.append(argument)
    return " ".join(words)
