"""What `[samples]` of a template asks for, with what follows from the training where it leaves something open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.config.reading import Entry
from kohaku_wrap.config.site import AFTER
from kohaku_wrap.dataset.buckets import parse_resolution
from kohaku_wrap.dataset.captions.words import RATING_WORDS
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE, NoImages, read_captions_metadata
from kohaku_wrap.formats.sdxl import LATENT_PIXELS
from kohaku_wrap.streams import draws, stream_key

KWRAP, TRAINER = "kwrap", "trainer"
"""Who draws: kwrap from each checkpoint in a process of its own, or sd-scripts between two of its steps."""

OWN_PROMPTS = 4
"""How many captions of the dataset are drawn where no prompts are written."""

CAPTIONS_READ = 1_000
"""Among how many captions those of the mildest rating are looked for."""

UNKNOWN_RATING = 1.5
"""Behind general (0) and sensitive (1), before questionable (2) and explicit (3)."""

WHOLE_RESOLUTION = 512
"""From here on a picture takes all FULL_STEPS; smaller ones are of models for trials, and take fewer."""

FULL_STEPS = 28
TRAINERS_OWN = ("sample_at_first", "sample_every_n_epochs", "sample_every_n_steps", "sample_sampler")


def who_draws(effective: Effective) -> str:
    """KWRAP or TRAINER; empty where no pictures are asked for."""
    if not any(effective.is_set(f"samples.{key}") for key in ("prompts", "every", "by")):
        return ""
    return str(effective.get("samples.by") or (KWRAP if effective.engine == "builtin" else TRAINER))


def settle_samples(effective: Effective) -> dict[str, Any]:
    """`[samples]` with every value that is known; empty where no pictures are asked for."""
    by = who_draws(effective)
    if not by:
        return {}
    width, height = parse_resolution(effective.get("dataset_options.resolution", 1024))
    steps = FULL_STEPS if min(width, height) >= WHOLE_RESOLUTION else max(
        2, FULL_STEPS * min(width, height) // WHOLE_RESOLUTION
    )  # fmt: skip
    follows = {"by": by, "width": width // 8 * 8, "height": height // 8 * 8, "steps": steps}
    written = {
        key: value for key, value in effective.subtable("samples", with_defaults=True).items() if value is not None
    }
    return {**follows, **written}


def with_own_prompts(effective: Effective, images: Path) -> Effective:
    """The same with captions of the dataset as prompts, where pictures are asked for and no prompts are written.

    Which captions follows from the seed alone; those rated safe come first where they tell their rating. Raises
    UsageError where the dataset has none that kwrap wrote.
    """
    if not who_draws(effective) or effective.get("samples.prompts"):
        return effective
    try:
        columns = Columns.open(images)
    except NoImages:
        raise UsageError(
            f"[samples] has no prompts, and {images / CAPTIONS_FILE} is not there to take some from",
            'Write prompts = ["1girl, solo"] into [samples] of the template.',
        ) from None
    drawn = np.argsort(draws(stream_key("sample prompts", int(effective.get("seed") or 0)), columns.ids))[
        :CAPTIONS_READ
    ]
    separator = effective.get("dataset_options.keep_tokens_separator") or ","
    tags_of = {
        int(row): [tag.strip() for tag in columns.caption_of(int(row)).replace(separator, ",").split(",")]
        for row in drawn
    }
    words = rating_words(images)
    mildest = sorted(tags_of, key=lambda row: max((words[tag] for tag in tags_of[row] if tag in words),
                                                  default=UNKNOWN_RATING))[:OWN_PROMPTS]  # fmt: skip
    prompts = [", ".join(filter(None, tags_of[row])) for row in sorted(mildest)]
    entry = Entry(prompts, "dataset", str(images / CAPTIONS_FILE))
    return dataclasses.replace(effective, entries={**effective.entries, "samples.prompts": entry})


def rating_words(images: Path) -> dict[str, int]:
    """The words that tell a rating in a folder's captions, with its place from general (0) to explicit (3)."""
    try:
        ratings = load_dataset(str(read_captions_metadata(images).get("dataset", ""))).caption.ratings
    except KwrapError:
        ratings = RATING_WORDS
    places: dict[str, int] = {"rating:safe": 0}
    for place, (rating, words) in enumerate(ratings.items()):
        for word in (*words, f"rating:{rating}"):
            places.setdefault(word, place)
    return places


def note_shared_gpu(effective: Effective) -> list[str]:
    """That pictures are drawn on a GPU that trains at the same time; nothing where they are not."""
    site = effective.site
    if site is None or who_draws(effective) != KWRAP or not site.machine.draws_where_it_trains:
        return []
    return [
        f'sample_device = "{site.machine.sample_device}" ({site.path}) is a GPU that trains: the pictures need memory '
        f'there at the same time. With "{AFTER}" they wait until the attempt ends.'
    ]


def note_ignored_steps(effective: Effective) -> list[str]:
    """That sd-scripts draws after epochs alone, where both epochs and steps are given."""
    epochs, by = "sample_every_n_epochs", who_draws(effective)
    given = [key for key in ("samples.every", "sample_every_n_steps") if effective.get(key)]
    if by != TRAINER or not given or not effective.get(epochs):
        return []
    return [
        f"{given[0]} does nothing beside {epochs} ({effective.origin(epochs)}): sd-scripts draws after epochs then."
    ]


def find_sample_faults(effective: Effective) -> Faults:
    """Pictures that are never drawn, and options that do nothing for them."""
    by, every, saves = who_draws(effective), effective.get("samples.every"), effective.get("save_every_n_steps")
    if by == TRAINER and effective.engine == "builtin":
        yield "samples.by", f'"{TRAINER}" is sd-scripts\' own sampling; the builtin engine has only "{KWRAP}"'
    elif by == TRAINER and not (every or any(effective.get(key) for key in TRAINERS_OWN[:3])):
        key = "samples.prompts" if effective.get("samples.prompts") else "samples.by"
        yield key, "are never drawn: set every = N (optimizer steps) in [samples]"
    elif by == KWRAP:
        sides = {key: effective.get(key) for key in ("samples.width", "samples.height")}
        odd = [key for key, side in sides.items() if side and side % LATENT_PIXELS]
        yield from ((key, f"{sides[key]} is not a multiple of {LATENT_PIXELS}") for key in odd)
        idle = (
            [key for key in TRAINERS_OWN if effective.is_set(key) and effective.get(key)]
            if effective.engine != "builtin"
            else []
        )
        yield from ((key, f'does nothing with samples.by = "{KWRAP}", which draws from checkpoints') for key in idle)
        if every and saves and every % saves:
            yield "samples.every", f"{every} is not a multiple of save_every_n_steps = {saves}: kwrap draws checkpoints"
