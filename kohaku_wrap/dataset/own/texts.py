"""The caption of each image of a source: from files beside them or from one table, by the trainer's rules."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.dataset.captions.formats import CACHE_FILE
from kohaku_wrap.dataset.captions.text_table import TEXT_COLUMNS
from kohaku_wrap.dataset.own.folders import TEXT_ENDINGS, Found, normalise
from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.files import describe_absence, parse_json, read_regular
from kohaku_wrap.metadata.dialects import is_text

PATH_COLUMNS = ("file_name", "image_path", "image", "path", "file", "filename")
TAGS_COLUMN = "tags"
FORMS = "Give .jsonl, .json, .csv or .parquet in UTF-8."


class CaptionsUnclear(UsageError):
    """Captions come from several places, and none of them is chosen."""


class NoTable(UsageError):
    """A file of captions cannot be read as one."""


@dataclass
class Texts:
    """The captions of a source's images."""

    origin: str
    """Where they come from, for people."""

    of_image: dict[str, str] = field(default_factory=dict)
    """By the image's path in the source."""

    without_caption: list[str] = field(default_factory=list)
    """Images that have none; they are trained with their folder's name, or with nothing."""

    empty_caption: list[str] = field(default_factory=list)
    """Images whose caption holds nothing in its first line."""

    several_lines: list[str] = field(default_factory=list)
    """Images whose caption has further lines, which are not trained."""

    not_utf8: list[str] = field(default_factory=list)
    """Images whose caption file is no UTF-8; they are not imported."""

    shared_text: list[str] = field(default_factory=list)
    """Images that have one caption file with others of their name."""

    repeated: int = 0
    """Rows of the table whose image has a later row; they are not used."""

    missing: list[str] = field(default_factory=list)
    """Images that the table names and that are not there."""

    in_capitals: list[str] = field(default_factory=list)
    """Caption files whose ending is not in small letters."""

    any_line: bool = False
    """Whether any line of a caption may be trained, as with sd-scripts' wildcards; blank ones are then no lines."""

    are_files: bool = False
    """Whether each caption is a file beside its image, which sd-scripts reads too."""


def read_texts(found: Found, wanted: str, text_column: str) -> Texts:
    """The captions of a source. `wanted`: an ending or a file, empty to take what is there.

    Raises CaptionsUnclear where several are there, NoTable.
    """
    wanted = wanted or found.source.captions
    if wanted in TEXT_ENDINGS or (wanted.startswith(".") and "/" not in wanted):
        return read_neighbours(found, wanted)
    if wanted:
        return read_table(found, [find_table(found, wanted)], text_column)
    stems = {image.rpartition(".")[0] for image in found.images}
    index = index_texts(found)
    there = [ending for ending in TEXT_ENDINGS if any(find_neighbour(index, stem, ending) for stem in stems)]
    tables = [path for path in found.tables if path.name != CACHE_FILE]
    there += sorted({path.name for path in tables})
    if len(there) > 1:
        raise CaptionsUnclear(
            f"{found.source.folder}: captions lie in {' and in '.join(there)}, and one is meant",
            f"Say which: --captions {there[0]} or --captions {there[1]}.",
        )
    if not there:
        caches = [path for path in found.tables if path.name == CACHE_FILE]
        return read_table(found, caches, text_column) if caches else read_neighbours(found, TEXT_ENDINGS[0])
    return read_table(found, tables, text_column) if tables else read_neighbours(found, there[0])


def index_texts(found: Found) -> dict[str, str]:
    """Caption files by their path with the ending in small letters; one that is spelled so counts before others."""
    index: dict[str, str] = {}
    for name in sorted(found.texts):
        stem, dot, ending = name.rpartition(".")
        key = f"{stem}{dot}{ending.lower()}"
        index[key] = name if key == name else index.get(key, name)
    return index


def find_neighbour(index: Mapping[str, str], stem: str, ending: str) -> str:
    """The caption file of an image; of a face NAME_X_Y_W_H that has none, NAME's, as sd-scripts takes it. Or empty."""
    folder, slash, name = stem.rpartition("/")
    stems = (stem, f"{folder}{slash}{name.rsplit('_', 4)[0]}") if name.count("_") >= 4 else (stem,)
    return next((index[f"{each}{ending}"] for each in stems if f"{each}{ending}" in index), "")


def find_table(found: Found, name: str) -> Path:
    """The file of captions that a person named. Raises NoTable."""
    for path in (found.source.folder / name, Path(name)):
        if path.is_file():
            return path
    what = describe_absence(Path(name))
    raise NoTable(f"{name}: {what}, here or in {found.source.folder}", "Name .txt, .caption or a file.")


def read_neighbours(found: Found, ending: str) -> Texts:
    """Captions in files of the images' names."""
    texts = Texts(f"{ending} files", any_line=trains_any_line(found), are_files=True)
    index = index_texts(found)
    images_of = defaultdict(list)
    for image in found.images:
        stem = image.rpartition(".")[0]
        images_of[find_neighbour(index, stem, ending) or f"{stem}{ending}"].append(image)
    for name, images in images_of.items():
        texts.in_capitals += [name] * (not name.endswith(ending))
        path = found.source.folder / name
        try:
            text: str | None = read_regular(path)
        except FileNotFoundError:
            text = None
        except UnicodeDecodeError:
            texts.not_utf8 += images
            continue
        if text is not None and len(images) > 1:
            texts.shared_text += images
        for image in images:
            take_text(texts, image, text)
    return texts


def trains_any_line(found: Found) -> bool:
    """Whether the source's own options say so."""
    return bool(found.source.subset.options.get("enable_wildcard"))


def take_text(texts: Texts, image: str, text: str | None) -> None:
    """Note one caption: the first line, then those that are not empty, each without blanks around it."""
    if text is None:
        texts.without_caption.append(image)
        return
    first, *later = (line.strip() for line in text.removeprefix("\ufeff").replace("\r", "\n").split("\n"))
    later = [line for line in later if line]
    if texts.any_line and later:
        first, *later = [first, *later] if first else later
    if not first:
        texts.empty_caption.append(image)
    if later and not texts.any_line:
        texts.several_lines.append(image)
    texts.of_image[image] = "\n".join([first, *later]) if first or later else ""


def read_table(found: Found, tables: list[Path], text_column: str) -> Texts:
    """Captions of tables: one entry an image, its path relative to the table or to the folder, or absolute."""
    texts = Texts(", ".join(str(path) for path in tables), any_line=trains_any_line(found))
    places = {normalise(image): image for image in found.images}
    by_stem = {name.rpartition(".")[0]: image for name, image in places.items()}
    text_of: dict[str, str | None] = {}
    separator = str(found.source.subset.options.get("caption_separator") or ",")
    for table in tables:
        for key, text in read_entries(table, text_column, separator):
            names = list(name_ways(found, table, key))
            image = next((places[name] for name in names if name in places), None)
            image = image or next((by_stem[name] for name in names if name in by_stem), None)
            if image is None:
                texts.missing.append(key)
            else:
                texts.repeated += image in text_of
                text_of[image] = text
    for image in found.images:
        take_text(texts, image, text_of.get(image))
    return texts


def name_ways(found: Found, table: Path, key: str) -> Iterator[str]:
    """What a table's path may be in the source, in the order in which it is tried."""
    path = Path(normalise(key.replace("\\", "/")))
    folder = found.source.folder
    for base in (table.parent, folder, Path.cwd()):
        for root in (folder.absolute(), folder.resolve()):
            whole = Path(normalise(str((base if base != Path() else Path.cwd()).absolute() / path)))
            if whole.is_relative_to(normalise(str(root))):
                yield whole.relative_to(normalise(str(root))).as_posix()


def read_entries(path: Path, text_column: str, separator: str) -> Iterator[tuple[str, str | None]]:
    """Path and caption of each entry of a table; `separator` stands before its tags. Raises NoTable."""
    columns: dict[str, None] = {}
    has_captions = bool(text_column)
    with refusing(NoTable, f"{path}: cannot be read", FORMS, csv.Error, pa.ArrowException):
        for number, (key, row) in enumerate(read_rows(path), 1):
            if key is None:
                column = next((name for name in PATH_COLUMNS if isinstance(row.get(name), str)), None)
                if column is None:
                    raise NoTable(
                        f"{path}: row {number} has no path: none of {', '.join(PATH_COLUMNS)}",
                        "Name the column of paths file_name.",
                    )
                entry, key = f"row {number}", row[column]
            else:
                entry = key
            has_captions = has_captions or any(name in row for name in (*TEXT_COLUMNS, TAGS_COLUMN))
            columns |= dict.fromkeys(map(str, row))
            yield key, find_text(path, entry, row, text_column, separator)
    if not has_captions:
        there = f"its columns: {', '.join(columns)}" if columns else "it holds no row"
        raise NoTable(
            f"{path}: no captions: none of {', '.join((*TEXT_COLUMNS, TAGS_COLUMN))}; {there}",
            "Name the column with --text-column, or say where captions are: --captions .txt or another file.",
        )


def read_rows(path: Path) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Each entry's path, where the form keys entries by it, and its columns."""
    ending = path.suffix.lower()
    if not path.is_file():
        raise OSError("not a regular file")
    if ending == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            names = [each.name for each in batch.schema if holds_texts(each.type)]
            yield from ((None, row) for row in batch.select(names).to_pylist())
    elif ending == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from ((None, row) for row in csv.DictReader(stream))
    elif ending == ".jsonl":
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise NoTable(f"{path}: line {number} is no JSON", "Write one object a line.") from error
                yield None, row
    else:
        yield from parse_json(path.read_text(encoding="utf-8-sig")).items()


def holds_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts or lists of texts, each once with numbers in their place too."""
    while pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return is_text(kind)


def find_text(path: Path, entry: str, row: Mapping[str, Any], text_column: str, separator: str) -> str | None:
    """The caption of one entry, with the tags of sd-scripts' fine-tuning files after it, joined as it does.

    Raises CaptionsUnclear, NoTable.
    """
    if text_column:
        if text_column not in row:
            raise NoTable(f"{path}: no column {text_column}", f"Its columns: {', '.join(map(str, row))}.")
        return None if row[text_column] is None else as_text(path, entry, row[text_column], "\n")
    there = [name for name in TEXT_COLUMNS if row.get(name) is not None]
    if len(there) > 1:
        raise CaptionsUnclear(
            f"{path}: captions stand in {' and in '.join(there)}, and one is meant",
            f"Say which: --text-column {there[0]} or --text-column {there[1]}.",
        )
    parts = [as_text(path, entry, row[name], "\n") for name in there]
    parts += [as_text(path, entry, row[TAGS_COLUMN], ", ")] if row.get(TAGS_COLUMN) else []
    return separator.join(part for part in parts if part) if parts else None


def as_text(path: Path, entry: str, value: Any, joint: str) -> str:
    """A caption as it stands, several of them joined. Raises NoTable for what is no text."""
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in several):
        raise NoTable(
            f"{path}: {entry}: {json.dumps(value, ensure_ascii=False, default=str)[:60]} is no caption",
            "Write a text there, or a list of texts.",
        )
    return joint.join(map(str, several))
