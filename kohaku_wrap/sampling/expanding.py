"""A sheet and its models made into cells, each with its place on the contact sheet."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.errors import UsageError
from kohaku_wrap.formats.predictions import Prediction
from kohaku_wrap.sampling.cells import Cell, Compute
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.compose import place_style
from kohaku_wrap.sampling.sheets import MOST_CELLS, NO_STYLE, Sheet
from kohaku_wrap.wording import name_apart

SAID_BY_SHEET = ("steps", "sampler", "schedule", "clip_skip", "emphasis", "hires")
"""Fields of a cell that a sheet may set; where it does not, the cell's own defaults hold."""


@dataclass(frozen=True)
class Defaults:
    """What a sheet does not say."""

    compute: Compute
    """How the numbers are computed."""

    tokenizers: str
    """A digest of both."""

    size: tuple[int, int] = (1024, 1024)
    """Where neither sheet nor prompt says one."""

    lenient: bool = False
    """Whether an open bracket reaches to the end of the prompt."""


@dataclass(frozen=True)
class KnownModel:
    """A model with what its files say."""

    model: Model
    """Paths and weights."""

    identity: str
    """Hashes and weights."""

    prediction: Prediction
    """What it predicts."""


@dataclass(frozen=True)
class PlacedCell:
    """A cell and where it stands."""

    cell: Cell
    """What to draw."""

    model: Model
    """With which files."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """What it is called on each axis of AXES."""


def expand_sheet(
    sheet: Sheet, models: Sequence[KnownModel], defaults: Defaults, recipe: CaptionRecipe
) -> list[PlacedCell]:
    """Every cell of the product, in the order prompt, style, model, size, guidance, seed; each content once.

    Raises UsageError for more than MOST_CELLS.
    """
    axes = (
        list(enumerate(sheet.prompts, start=1)),
        sheet.styles,
        models,
        sheet.sizes or (defaults.size,),
        sheet.guidances or (Cell.guidance,),
        sheet.seeds or (0,),
    )
    count = math.prod(map(len, axes))
    if count > MOST_CELLS:
        raise UsageError(f"the sheet has {count:,} cells; {MOST_CELLS:,} are allowed", "Make several smaller sheets.")
    found: dict[str, PlacedCell] = {}
    titles = name_models([each.model for each in models])
    for (number, prompt), style, known, size, guidance, seed in itertools.product(*axes):
        own = prompt.own
        negative = prompt.negative if prompt.negative is not None else sheet.negative
        added = style.negative if style else ""
        cell = Cell(
            model=known.identity,
            prompt=place_style(prompt.text, style.prompt if style else "", recipe),
            negative=", ".join(text for text in (negative, added) if text),
            seed=own.get("seed", seed),
            width=own.get("width", size[0]),
            height=own.get("height", size[1]),
            tokenizers=defaults.tokenizers,
            guidance=own.get("guidance", guidance),
            lenient=defaults.lenient,
            prediction=known.prediction.kind,
            zero_terminal_snr=known.prediction.zero_terminal_snr,
            compute=defaults.compute,
            **{name: value for name in SAID_BY_SHEET if (value := own.get(name) or getattr(sheet, name))},
        )
        labels: dict[str, Any] = {
            "prompt": prompt.label or f"{number}: {prompt.text}",
            "style": style.name if style else NO_STYLE,
            "seed": f"seed {cell.seed}",
            "model": titles[known.model],
            "size": f"{cell.width}x{cell.height}",
            "guidance": f"CFG {cell.guidance:g}",
        }
        found.setdefault(cell.digest, PlacedCell(cell, known.model, labels))
    return list(found.values())


def name_models(models: Sequence[Model]) -> dict[Model, str]:
    """A title each; those of the same get their folders, and where these are the same too, a number."""
    usual = Counter(model.title for model in dict.fromkeys(models))
    titles: dict[Model, str] = {}
    for model in dict.fromkeys(models):
        title = model.title if usual[model.title] == 1 else f"{model.path.parent.name}/{model.title}"
        titles[model] = name_apart(title, titles.values())
    return titles
