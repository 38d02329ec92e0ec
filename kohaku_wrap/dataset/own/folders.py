"""Which images a person's folders hold, in which subsets, and what may not be imported."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kohaku_wrap.dataset.captions.formats import CACHE_FILE
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, UsageError
from kohaku_wrap.files import walk
from kohaku_wrap.formats.caption_rows import Subset
from kohaku_wrap.toml_files import TableReader, load_toml
from kohaku_wrap.wording import is_utf8

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
"""Of the files that sd-scripts takes for images, in small letters."""

TEXT_ENDINGS = (".txt", ".caption")
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
"""Hugging Face's names of a folder's captions."""

MOST_REPEATS = 1_000_000
"""Of an image in an epoch; positions of an epoch are counted in 32 bits."""

REGULARISATION_NAMES = frozenset(
    f"{stem}{ending}"
    for stem in ("reg", "regs", "regularisation", "regularization", "class")
    for ending in ("", "_images", "-images", "_data", " images")
) - {"class"}
"""Folders of images that only hold a class in place; they would be trained as if they were wanted."""

SUBSET_OPTIONS: Mapping[type, tuple[str, ...]] = {
    bool: ("enable_wildcard", "flip_aug", "random_crop", "shuffle_caption"),
    int: ("caption_dropout_every_n_epochs", "keep_tokens"),
    float: ("caption_dropout_rate", "caption_tag_dropout_rate"),
    str: (
        *("caption_prefix", "caption_separator", "caption_suffix", "keep_tokens_separator"),
        *("resize_interpolation", "secondary_separator"),
    ),
}
"""Dataset options of sd-scripts that a subset may have for itself, by the type of their values."""

WHAT_THEY_TAKE = {bool: "true or false", int: "a whole number from 0 on", float: "a number from 0 to 1", str: "a text"}

HANDLED_OPTIONS = frozenset(
    {"image_dir", "num_repeats", "class_tokens", "caption_extension", "metadata_file", "cache_info"}
)
N_NAME = "an N_name folder"
ID_BITS = 63


class NothingToImport(UsageError):
    """The folders hold no image, or are none."""


class NotForTraining(UsageError):
    """A folder whose images are not meant to be trained."""


class NamesCollide(KwrapError):
    """Two folders or images would get one name or one id."""


@dataclass(frozen=True)
class Source:
    """A folder whose images are trained alike."""

    label: str
    """What ids are made from, beside the path."""

    root: Path
    """What paths are relative to."""

    folder: Path
    """The folder itself: the root, or an N_name folder in it."""

    subset: Subset
    """Its name, repeats and options."""

    class_text: str | None = None
    """The caption of images without one; None outside of N_name folders."""

    captions: str = ""
    """An ending or a file, where a dataset file names one."""

    left_out: frozenset[str] = frozenset()
    """Folders directly in it that are sources of their own, or that the trainer would skip."""

    in_sd_scripts: str = ""
    """What sd-scripts' own dataset takes it for, which then trains what lies directly in it; empty for nothing."""

    about_file: str = ""
    """What a person should know of the dataset file that names it."""


@dataclass
class Found:
    """The files of a source."""

    source: Source
    """Where they lie."""

    images: list[str] = field(default_factory=list)
    """Relative to the source's folder, as the disk spells them, in order."""

    texts: set[str] = field(default_factory=set)
    """Caption files, likewise."""

    tables: list[Path] = field(default_factory=list)
    """Files that hold captions of many images, by their names."""

    unread: list[Path] = field(default_factory=list)
    """Files of such a format with other names."""

    others: Counter[str] = field(default_factory=Counter)
    """Endings of files that are neither, with their numbers."""

    links: list[Path] = field(default_factory=list)
    """Links to folders, which are not followed: they may lead in a circle."""

    unnamed: list[str] = field(default_factory=list)
    """Names that are no text, as Python shows them."""

    def path_below_root(self, image: str) -> str:
        """The image's path as its id is made from it."""
        below = self.source.folder.relative_to(self.source.root).as_posix()
        return normalise(image if below == "." else f"{below}/{image}")


def normalise(text: str) -> str:
    """One spelling of what looks the same: Unicode's NFC, and `/` between folders."""
    return unicodedata.normalize("NFC", text)


def make_id(label: str, path: str) -> int:
    """63 positive bits of the sha256 of label and path."""
    digest = hashlib.sha256(f"{normalise(label)}/{normalise(path)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - ID_BITS)


def read_repeats(name: str) -> tuple[int, str] | None:
    """Repeats and caption of a folder named N_name, as sd-scripts splits it; None for another name.

    Raises UsageError for more than MOST_REPEATS.
    """
    first, _, rest = name.partition("_")
    try:
        repeats = int(first)
    except ValueError:
        return None
    if repeats > MOST_REPEATS:
        raise UsageError(
            f"{name}: {repeats} repeats are above {MOST_REPEATS:,}", "Rename the folder, or import it with --plain."
        )
    return repeats, rest


def find_sources(arguments: Sequence[Path], labels: Sequence[str], plain: bool, out: Path) -> list[Source]:
    """The sources behind folders and dataset files. `plain`: N_name is a name like any other.

    Raises NothingToImport, NotForTraining, NamesCollide.
    """
    if labels and len(labels) != len(arguments):
        raise UsageError(
            f"{len(labels)} labels for {len(arguments)} folders", "Give --label once a folder, in their order."
        )
    if plain and all(path.suffix.lower() == ".toml" for path in arguments):
        raise UsageError("--plain does nothing with dataset files alone", "Leave it out: they say their repeats.")
    sources: list[Source] = []
    for place, path in enumerate(arguments):
        given = labels[place] if labels else ""
        if path.suffix.lower() == ".toml":
            if given:
                raise UsageError(f"{path}: --label is for folders", "Leave it out, or give the folders themselves.")
            sources += read_dataset_file(path)
        elif path.is_dir():
            sources += list_sources(path, given, plain)
        else:
            raise NothingToImport(
                f"{path}: {'no folder' if path.exists() else 'no such folder'}",
                "Give folders of images, or sd-scripts' dataset file (.toml).",
            )
    target = out.resolve()
    for source in sources:
        check_label(source.label)
        place_of = source.root.resolve()
        if target.is_relative_to(place_of) or place_of.is_relative_to(target):
            raise UsageError(
                f"{out}: lies in {source.root}, or holds it", "Give --out a folder beside the images, not among them."
            )
    refuse_same_names(sources)
    return [source for source in sources if source.subset.repeats > 0]


def check_label(label: str) -> None:
    """Raise UsageError for what cannot be a folder's name."""
    if not label.strip() or "/" in label or "\0" in label or label.startswith("."):
        raise UsageError(f"{label!r} cannot be a label", "Give one with --label NAME: it names a folder in --out.")


def refuse_same_names(sources: Sequence[Source]) -> None:
    """Raise NamesCollide where two sources have the same label or subset."""
    roots: dict[str, Path] = {}
    names: dict[str, Path] = {}
    for source in sources:
        label, name = normalise(source.label), normalise(source.subset.name)
        other = next((known for known in (roots.get(label), names.get(name)) if known not in (None, source.root)), None)
        if other or name in names:
            raise NamesCollide(
                f"{source.folder} and {other or names[name]} would both be named {name!r}",
                "Give the folders, each with a label of its own in their order: --label NAME --label OTHER.",
            )
        roots[label], names[name] = source.root, source.folder


def list_sources(root: Path, label: str, plain: bool) -> list[Source]:
    """The folder itself, and each N_name folder directly in it. Raises NotForTraining."""
    name = root.resolve().name
    label = normalise(label or name)
    children = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    refuse_regularisation(root)
    repeated = {} if plain else {child: found for child in children if (found := read_repeats(child))}
    own = None if plain else read_repeats(name)
    if own and own[0] < 1:
        raise NothingToImport(
            f"{root}: sd-scripts leaves out a folder with {own[0]}_ in front", "Import it with --plain, or rename it."
        )
    sources = [
        Source(
            label,
            root,
            root,
            Subset(label, own[0] if own else 1),
            own[1] if own else None,
            left_out=frozenset(repeated),
            in_sd_scripts=N_NAME if own else "",
        )
    ]
    sources += [
        Source(label, root, root / child, Subset(normalise(f"{label}-{child}"), repeats), text, in_sd_scripts=N_NAME)
        for child, (repeats, text) in repeated.items()
    ]
    return sources


def refuse_regularisation(root: Path) -> None:
    """Raise NotForTraining where the folder, or one at any depth that would be read, has such a folder's name."""
    for parent, folders, _ in walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(parent)
        if (folder.resolve() if folder == root else folder).name.casefold() in REGULARISATION_NAMES:
            raise NotForTraining(
                f"{folder}: by its name a folder of regularisation images, which kwrap does not train with",
                "Import the folders that are to be trained, each by its path; rename this one if it is one of them.",
            )


def read_dataset_file(path: Path) -> list[Source]:
    """The subsets of sd-scripts' dataset file. Raises UnreadableToml, ProblemsFound, UsageError, NotForTraining."""
    document = load_toml(path)
    problems: list[Problem] = []
    top = TableReader("", document, tuple(document), problems)
    sources = []
    every: dict[str, list[str]] = {}
    for dataset in top.tables("datasets"):
        inherited = {**top.table("general"), **{key: dataset[key] for key in dataset if key != "subsets"}}
        for key, value in inherited.items():
            every.setdefault(key, []).append(json.dumps(value, default=str))
        tables = TableReader("datasets", dataset, tuple(dataset), problems).tables("subsets")
        sources += [read_subset(path, inherited, table, problems) for table in tables]
    if problems:
        raise ProblemsFound(str(path), problems, "Give sd-scripts' dataset_config in TOML.")
    if not sources:
        raise UsageError(f"{path}: names no [[datasets.subsets]]", "Give sd-scripts' dataset_config, or folders.")
    about = note_not_taken(path, every)
    return [replace(source, about_file=about) for source in sources]


def note_not_taken(path: Path, every: Mapping[str, Sequence[str]]) -> str:
    """What of a dataset file's options no subset keeps; `every`: by option its values in the file's datasets."""
    kept = {*HANDLED_OPTIONS, *(name for names in SUBSET_OPTIONS.values() for name in names)}
    values = (f"{key} = {' or '.join(dict.fromkeys(every[key]))}" for key in sorted(every.keys() - kept))
    if not (left := ", ".join(values)):
        return ""
    site = ", batch_size by the site" if "batch_size" in every else ""
    return f"{path}: not taken: {left}; one template trains all of its images alike: set them there{site}"


def read_subset(path: Path, inherited: Mapping[str, Any], table: Mapping[str, Any], problems: list[Problem]) -> Source:
    """One subset of a dataset file; faults of its numbers go to `problems`. Raises UsageError, NotForTraining."""
    if not table.get("image_dir"):
        raise NothingToImport(f"{path}: a subset names no image_dir", "Add it: the folder of its images.")
    folder = find_place(path, str(table["image_dir"]))
    if not folder.is_dir():
        raise NothingToImport(f"{path}: {folder}: no such folder (image_dir)", "Fix the path in the file.")
    if table.get("is_reg"):
        raise NotForTraining(
            f"{folder}: {path.name} says is_reg = true, and kwrap does not train with regularisation images",
            "Take the subset out of the file.",
        )
    kinds = {name: kind for kind, names in SUBSET_OPTIONS.items() for name in names}
    unknown = sorted(key for key in table if key not in kinds and key not in HANDLED_OPTIONS and table[key])
    if unknown:
        raise UsageError(
            f"{path}: {folder}: {', '.join(unknown)} cannot be kept for one subset", "Take it out of the file."
        )
    both = {**inherited, **table}
    options = {key: both[key] for key in sorted(kinds.keys() & both.keys())}
    reader = TableReader("datasets.subsets", both, tuple(both), problems)
    for key, value in options.items():
        if not fits(value, kinds[key]):
            reader.fault(key, f"{value!r} is not {WHAT_THEY_TAKE[kinds[key]]}")
    repeats = reader.integer("num_repeats", 1) or 1
    if repeats > MOST_REPEATS:
        reader.fault("num_repeats", f"{repeats} is above {MOST_REPEATS:,}")
    label = normalise(folder.resolve().name)
    table_file = str(both.get("metadata_file") or "")
    captions = str(find_place(path, table_file)) if table_file else str(both.get("caption_extension") or "")
    class_text = reader.text("class_tokens") or None
    known = "" if both.get("metadata_file") or both.get("cache_info") else "an image_dir"
    return Source(label, folder, folder, Subset(label, repeats, options), class_text, captions, in_sd_scripts=known)


def find_place(file: Path, name: str) -> Path:
    """What a dataset file means by a path: from where one is, as sd-scripts does, or else from the file's folder."""
    place = Path(name)
    return place if place.is_absolute() or place.exists() or not (beside := file.parent / name).exists() else beside


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a type of SUBSET_OPTIONS, and within its numbers."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return type(value) is kind and not (isinstance(value, int) and value < 0)


def scan(source: Source) -> Found:
    """List the files of a source with those in its sub-folders; hidden ones are left out."""
    found = Found(source)
    for parent, folders, files in walk(source.folder):
        below = os.path.relpath(parent, source.folder)
        start = "" if below == "." else f"{below}/"
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (not start and name in source.left_out)
        )
        found.links += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        for name in sorted(files):
            if name.startswith("."):
                continue
            ending = Path(name).suffix.lower()
            if not is_utf8(start + name):
                found.unnamed.append(ascii(start + name))
            elif ending in IMAGE_ENDINGS:
                found.images.append(start + name)
            elif ending in TEXT_ENDINGS:
                found.texts.add(start + name)
            elif name in TABLE_NAMES or name == CACHE_FILE:
                found.tables.append(Path(parent, name))
            else:
                found.others[ending or "no ending"] += 1
                found.unread += [Path(parent, name)] * (ending in TABLE_ENDINGS)
    return found
