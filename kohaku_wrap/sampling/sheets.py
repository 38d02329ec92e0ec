"""Sheets of pictures: prompts × styles × seeds × models × sizes × guidance, from a file of prompts or a TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import read_regular
from kohaku_wrap.formats.sdxl import LATENT_PIXELS
from kohaku_wrap.sampling.cells import EMPHASES, MOST_SEED, MOST_STEPS, SAMPLERS, SCHEDULES, Hires
from kohaku_wrap.sampling.grammar import PromptError, parse_prompt
from kohaku_wrap.sampling.styles import Style, find_style
from kohaku_wrap.toml_files import TableReader, load_toml

AXES = ("prompt", "style", "seed", "model", "size", "guidance")
"""What a sheet is the product of."""

NO_STYLE = "none"
MOST_CELLS = 100_000
SIZE = re.compile(r"\s*([0-9]{1,5})\s*[x×]\s*([0-9]{1,5})\s*")
HIRES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?::\s*([0-9]*\.?[0-9]+))?\s*")
LINE_OPTION = re.compile(r"\s--(\w+)(?:\s+|$)")
LINE_OPTIONS = {"n": "negative", "w": "width", "h": "height", "s": "steps", "l": "guidance", "d": "seed"}
"""Options of a line as sd-scripts has them."""


class UnreadableSheet(UsageError):
    """A file of prompts that cannot be read as one."""


@dataclass(frozen=True)
class SheetPrompt:
    """One prompt of a sheet, and what it sets for itself."""

    text: str
    """In the webui's grammar; {style} stands where its style goes."""

    label: str = ""
    """What the contact sheet calls it; empty for its text."""

    negative: str | None = None
    """Over that of the sheet."""

    own: Mapping[str, Any] = field(default_factory=dict)
    """width, height, steps, guidance or seed, over those of the sheet."""


@dataclass(frozen=True)
class Sheet:
    """What to draw, all models left out. None, 0 and empty stand for what the command line or the model says."""

    prompts: tuple[SheetPrompt, ...]
    """At least one."""

    styles: tuple[Style | None, ...] = (None,)
    """None for the prompt alone."""

    seeds: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    guidances: tuple[float, ...] = ()
    negative: str = ""
    steps: int | None = None
    sampler: str = ""
    schedule: str = ""
    clip_skip: int | None = None
    emphasis: str = ""
    hires: Hires | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def read_size(text: str) -> tuple[int, int]:
    """Width and height of `832x1216`. Raises ValueError."""
    found = SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a size such as 832x1216")
    width, height = int(found[1]), int(found[2])
    if width % LATENT_PIXELS or height % LATENT_PIXELS or not width or not height:
        raise ValueError(f"{text}: width and height must be multiples of {LATENT_PIXELS}")
    return width, height


def read_hires(text: str) -> Hires:
    """The second pass of `1.5` or `1.5:0.4`. Raises ValueError."""
    found = HIRES.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a scale with a strength, such as 1.5:0.5")
    hires = Hires(float(found[1]), float(found[2] or 0.5))
    if not 1 <= hires.scale <= 8 or not 0 < hires.strength <= 1:
        raise ValueError(f"{text}: the scale must be from 1 to 8, the strength above 0 and at most 1")
    return hires


def read_sheet(path: Path, lenient: bool = False) -> Sheet:
    """The sheet of a file: a TOML, or a prompt a line. Raises UnreadableSheet or ProblemsFound with every fault."""
    if not path.exists():
        raise UnreadableSheet(f"{path}: there is no such file of prompts", "Check the path, or give --prompt TEXT.")
    if path.suffix == ".toml":
        return read_tables(path, lenient)
    try:
        text = read_regular(path)
    except UnicodeDecodeError as error:
        raise UnreadableSheet(f"{path}: not UTF-8 text at byte {error.start}", "Save it as UTF-8.") from None
    except OSError as error:
        raise UnreadableSheet(
            f"{path}: {error.strerror}", "Give a text file with a prompt a line, or a .toml."
        ) from None
    problems: list[Problem] = []
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            prompts.append(read_line(line.strip(), f"line {number}", problems))
            check_prompt(prompts[-1], f"line {number}", lenient, problems)
    if not prompts and not problems:
        raise UnreadableSheet(f"{path}: no prompt in it", "Write one prompt a line; lines that begin with # are notes.")
    raise_all(path, problems)
    return Sheet(tuple(prompts))


def read_line(line: str, where: str, problems: list[Problem]) -> SheetPrompt:
    """A prompt with options as sd-scripts has them: `1girl --n lowres --w 832 --h 1216 --s 24 --l 5 --d 1`."""
    text, *rest = LINE_OPTION.split(line)
    own: dict[str, Any] = {}
    for letter, value in zip(rest[::2], rest[1::2], strict=True):
        name = LINE_OPTIONS.get(letter)
        if name is None:
            known = ", ".join(f"--{each}" for each in LINE_OPTIONS)
            problems.append(Problem(where, f"--{letter} is none of {known}"))
            continue
        try:
            own[name] = value.strip() if name == "negative" else float(value) if name == "guidance" else int(value)
        except ValueError:
            problems.append(Problem(where, f"--{letter} {value or 'with nothing'}: not a number"))
    negative = own.pop("negative", None)
    return SheetPrompt(text, negative=negative, own=own)


def read_tables(path: Path, lenient: bool) -> Sheet:
    """The sheet of a TOML file."""
    problems: list[Problem] = []
    keys = ("title", "notes", "prompts", "styles", "seeds", "sizes", "guidance", "negative", "steps", "sampler",
            "schedule", "clip_skip", "emphasis", "hires", "rows", "columns")  # fmt: skip
    reader = TableReader("", load_toml(path), keys, problems)
    reader.text("title")
    reader.text("notes")
    prompts = read_prompts(reader)
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, f"prompts {number}", lenient, problems)
    styles: list[Style | None] = []
    for name in reader.words("styles", (NO_STYLE,)):
        try:
            styles.append(None if name == NO_STYLE else find_style(name))
        except UsageError as error:
            reader.fault("styles", error.message)
    hires = read_each(reader, "hires", read_hires)
    if len(hires) > 1:
        reader.fault("hires", f"is one value, and no axis of the sheet; here are {len(hires)}")
    sheet = Sheet(
        prompts=tuple(prompts),
        styles=tuple(styles),
        seeds=tuple(read_each(reader, "seeds", check_seed)),
        sizes=tuple(read_each(reader, "sizes", read_size)),
        guidances=tuple(read_each(reader, "guidance", check_guidance)),
        negative=reader.text("negative"),
        steps=reader.integer("steps", 1),
        sampler=reader.choice("sampler", tuple(SAMPLERS)) if "sampler" in reader.table_values else "",
        schedule=reader.choice("schedule", tuple(SCHEDULES)) if "schedule" in reader.table_values else "",
        clip_skip=reader.integer("clip_skip", 1),
        emphasis=reader.choice("emphasis", EMPHASES) if "emphasis" in reader.table_values else "",
        hires=next(iter(hires), None),
        rows=read_axes(reader, "rows"),
        columns=read_axes(reader, "columns"),
    )
    if (sheet.steps or 1) > MOST_STEPS:
        reader.fault("steps", f"{sheet.steps} is above {MOST_STEPS:,}")
    check_prompt(SheetPrompt("", negative=sheet.negative), "negative", lenient, problems)
    raise_all(path, problems)
    return sheet


def read_prompts(reader: TableReader) -> list[SheetPrompt]:
    """`prompts`: strings, or tables with a name and a negative prompt."""
    value = reader.table_values.get("prompts")
    if not isinstance(value, list) or not value:
        reader.fault("prompts", 'must be a list: prompts = ["1girl, solo"] or [[prompts]] tables')
        return []
    prompts = []
    for number, each in enumerate(value, start=1):
        if isinstance(each, str):
            prompts.append(SheetPrompt(each))
        elif isinstance(each, dict):
            table = TableReader(f"prompts {number}", each, ("prompt", "name", "negative"), reader.problems)
            negative = table.text("negative") if "negative" in each else None
            prompts.append(SheetPrompt(table.text("prompt"), table.text("name"), negative))
        else:
            reader.fault("prompts", f"{each!r} is neither a string nor a table")
    return prompts


def read_each(reader: TableReader, key: str, read: Any) -> list[Any]:
    """The values of a list, or of one value, each read by `read`, which raises ValueError."""
    value = reader.table_values.get(key, [])
    found = []
    for each in value if isinstance(value, list) else [value]:
        try:
            found.append(read(str(each) if read in (read_size, read_hires) else each))
        except ValueError as error:
            reader.fault(key, str(error))
    return found


def check_seed(value: Any) -> int:
    """A seed. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_SEED:
        raise ValueError(f"{value!r} is not a whole number from 0 to {MOST_SEED}")
    return value


def check_guidance(value: Any) -> float:
    """A CFG scale. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 100:
        raise ValueError(f"{value!r} is not a number from 1 to 100")
    return float(value)


def read_axes(reader: TableReader, key: str) -> tuple[str, ...]:
    """Names of AXES, one or a list."""
    value = reader.table_values.get(key, [])
    axes = [value] if isinstance(value, str) else value
    if not isinstance(axes, list) or not all(axis in AXES for axis in axes):
        reader.fault(key, f"{value!r} is not of {', '.join(AXES)}")
        return ()
    return tuple(axes)


def check_prompt(prompt: SheetPrompt, where: str, lenient: bool, problems: list[Problem]) -> None:
    """Note what cannot be read of a prompt, and values of its own that cannot be."""
    for text in (prompt.text, prompt.negative or ""):
        try:
            parse_prompt(text, lenient)
        except PromptError as error:
            problems.append(Problem(where, f"{error.message}\n{error.next_step}"))
    own = prompt.own
    checks: Sequence[tuple[str, Any]] = (("seed", check_seed), ("guidance", check_guidance))
    for name, check in checks:
        if name in own:
            try:
                check(own[name])
            except ValueError as error:
                problems.append(Problem(where, f"{name}: {error}"))
    odd = [name for name in ("width", "height") if name in own and (own[name] % LATENT_PIXELS or own[name] <= 0)]
    problems += [Problem(where, f"{name} {own[name]} is not a multiple of {LATENT_PIXELS}") for name in odd]
    if not 1 <= own.get("steps", 1) <= MOST_STEPS:
        problems.append(Problem(where, f"steps {own['steps']} is not from 1 to {MOST_STEPS:,}"))


def raise_all(path: Path, problems: list[Problem]) -> None:
    if problems:
        raise ProblemsFound(str(path), problems, "Fix these places; nothing was drawn.")
