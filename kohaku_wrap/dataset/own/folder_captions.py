"""The captions of an image folder as they are trained: one image explained, and what all of them are made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kohaku_wrap.dataset.captions.mixing import BOTH, put_text, put_texts
from kohaku_wrap.dataset.captions.statistics import MOST_FREQUENT
from kohaku_wrap.dataset.captions.tokens import Lengths, choose_counter, join_parts
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.dataset.own.images import read_imported
from kohaku_wrap.dataset.own.report import REPORT_FILE
from kohaku_wrap.errors import DAMAGE, KwrapError
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE, Subset, find_captions, read_batches, read_subsets
from kohaku_wrap.formats.schema_notes import read_notes

ONE_SUBSET = [Subset("(all)")]
"""Of a folder of posts, and of its files before format 2."""


class NoSuchImage(KwrapError):
    """The image folder has no row of that file."""


@dataclass(frozen=True)
class ImageExplanation:
    """One row of captions.arrow, and what is trained of it."""

    id: int
    """Of the image: of its post, or from its label and path."""

    file: str
    """Below the image folder."""

    source: str
    """The file that an import took it from; empty for a post."""

    size: tuple[int, int]
    """Real width and height in pixels."""

    subset: str
    """Its name."""

    repeats: int
    """How often an epoch trains it, before the template's num_repeats."""

    options: Mapping[str, Any]
    """The subset's own dataset options."""

    origin: str
    """Where the caption comes from; empty where that is not recorded."""

    raw: str
    """The whole caption that is stored, all its lines."""

    text: str
    """Its natural-language caption; empty for none."""

    trained: tuple[str, ...]
    """What is trained, with prefix and suffix of the subset; several where one of them is drawn each time."""


@dataclass(frozen=True)
class FolderStatistics:
    """What the captions of an image folder are made of."""

    style: str
    """own for imported ones, else kohaku or hakubooru."""

    images: int
    """Rows of captions.arrow."""

    epoch_images: int
    """Images that an epoch trains with the repeats of the subsets."""

    subsets: tuple[Mapping[str, Any], ...]
    """Name, images, repeats and options of each."""

    empty: int
    """Captions whose trained line holds nothing."""

    several_lines: int
    """Captions with further lines."""

    without_separator: int
    """Captions that a template shuffles and drops from as a whole."""

    distinct_words: int
    """Different texts between commas."""

    frequent: Mapping[str, tuple[tuple[str, int], ...]]
    """For each subset, the most frequent of them and in how many captions they stand."""

    rare: tuple[tuple[str, int], ...]
    """Those that stand in fewer captions than asked for, the rarest first, and in how many."""

    tokens_by: str
    """"tokenizer FOLDER", or "estimate"."""

    token_quantiles: Mapping[str, int]
    """Tokens of a caption without the separators; by quantile, and the maximum."""

    cut: Mapping[str, int]
    """By max_token_length, the captions that are longer and lose their end."""


def explain_image(image: Path, folder: Path | None) -> ImageExplanation:
    """The row of an image by its file in the image folder, or by the file that was imported. Raises NoSuchImage.

    `folder` None: the nearest folder above the file that has captions.
    """
    if folder is None:
        above = (each for each in image.absolute().parents if (each / CAPTIONS_FILE).is_file())
        if (folder := next(above, None)) is None:
            raise NoSuchImage(f"{image}: no {CAPTIONS_FILE} in a folder above it", "Name the image folder with --out.")
    columns = Columns.open(folder)
    imported = read_imported(folder)
    places = {
        place for each in (image.absolute(), image.resolve()) for place in (each, each.parent.resolve() / each.name)
    }
    names = {place.relative_to(root).as_posix() for place in places for root in (folder.absolute(), folder.resolve())
             if place.is_relative_to(root)}  # fmt: skip
    ids = {row.id for row in imported.values() if Path(row.source) in places or row.file in names}
    rows = [row for row in range(len(columns)) if int(columns.ids[row]) in ids] if ids else []
    rows = rows or [row for row in range(len(columns)) if names and columns.files[row] in names]
    if not rows:
        raise NoSuchImage(
            f"{image}: {find_captions(folder)} has no row of it",
            f"`kwrap import` lists what it refused in {folder / REPORT_FILE}; `kwrap extract` and `kwrap caption` "
            "take the images of a selection.",
        )
    row = rows[0]
    subset = (read_subsets(folder) or ONE_SUBSET)[int(columns.subsets[row])]
    raw, source = columns.caption_of(row), imported.get(int(columns.ids[row]))
    text = columns.texts[row] if columns.texts else ""
    shares = [columns.text_shares.get(name, 0) for name in ("tags", "text", "both")] if text else [1.0]
    place = int(columns.text_places[row]) if text else 0
    captions = [put_text(raw, text, place, form) for form, share in enumerate(shares) if share]
    return ImageExplanation(
        id=int(columns.ids[row]),
        file=columns.files[row],
        source=source.source if source else "",
        size=columns.size_of(row),
        subset=subset.name,
        repeats=subset.repeats,
        options=subset.options,
        origin=find_origin(folder, subset.name, source.source if source else ""),
        raw=raw,
        text=text,
        trained=tuple(line for each in captions for line in trained_lines(each, subset.options)),
    )


def find_origin(folder: Path, subset: str, source: str) -> str:
    """What the report of the last import says of an image's caption; empty where it says nothing."""
    with suppress(*DAMAGE):
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        if source in (*report["lists"]["without_caption"], *report["lists"]["empty_caption"]):
            return "none of its own"
        return next((str(each["captions"]) for each in report["subsets"] if each["name"] == subset), "")
    return ""


def trained_lines(caption: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a caption is trained before shuffle and dropout, by the subset's own options.

    A suffix stands after the last line, as sd-scripts puts it there before it takes the first one.
    """
    before, after = (str(options.get(name) or "") for name in ("caption_prefix", "caption_suffix"))
    whole = (f"{before} " if before else "") + caption + (f" {after}" if after else "")
    lines = tuple(whole.split("\n"))
    return lines if options.get("enable_wildcard") else lines[:1]


def measure_folder(
    folder: Path,
    tokenizer: Path | None,
    rare_below: int = 0,
    on_progress: Progress = unheard,
) -> FolderStatistics:
    """Count what the captions of an image folder are made of, a batch of rows at a time. Raises NoImages."""
    columns = Columns.open(folder)
    subsets = read_subsets(folder) or ONE_SUBSET
    tokens_by, count = choose_counter(tokenizer)
    uses: list[Counter[str]] = [Counter() for _ in subsets]
    lengths = Lengths()
    empty = several = whole = done = 0
    style = ""
    for batch in read_batches(find_captions(folder), "caption", "text", "text_at"):
        style = style or str(read_notes(batch.schema).get("style", ""))
        longest = []
        for raw, place in zip(batch["caption"].to_pylist(), columns.subsets[done:].tolist(), strict=False):
            lines = trained_lines(raw, subsets[place].options)
            uses[place].update({word.strip() for line in lines for part in line.split(SEPARATOR)
                                for word in part.split(",")} - {""})  # fmt: skip
            empty += not any(map(str.strip, lines))
            several += "\n" in raw
            whole += SEPARATOR not in raw
            longest.append(lines[0])
        captions = pa.array(longest, pa.string())
        if columns.texts:
            own, forms = batch["text"].cast(pa.string()), np.full(len(captions), BOTH, dtype=np.int8)
            captions = put_texts(captions, own, batch["text_at"].to_numpy(), forms)
        lengths.add(count(join_parts(captions)))
        done += len(captions)
        on_progress(done, len(columns))
    images = np.bincount(columns.subsets, minlength=len(subsets)).tolist()
    total = sum(uses, Counter())
    return FolderStatistics(
        style=style,
        images=len(columns),
        epoch_images=sum(each.repeats * number for each, number in zip(subsets, images, strict=True)),
        subsets=tuple(
            {"name": each.name, "images": number, "repeats": each.repeats, "options": dict(each.options)}
            for each, number in zip(subsets, images, strict=True)
        ),
        empty=empty,
        several_lines=several,
        without_separator=whole,
        distinct_words=len(total),
        frequent={
            each.name: tuple(sorted(some.items(), key=lambda word: (-word[1], word[0]))[:MOST_FREQUENT])
            for each, some in zip(subsets, uses, strict=True)
        },
        rare=tuple(sorted(((w, n) for w, n in total.items() if n < rare_below), key=lambda word: (word[1], word[0]))),
        tokens_by=tokens_by,
        token_quantiles=lengths.quantiles(),
        cut=lengths.beyond_limits(),
    )
