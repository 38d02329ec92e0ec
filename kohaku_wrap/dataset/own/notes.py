"""What a person should know of imported folders, each kind said once, with how many folders it is of."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.dataset.own.folders import Found, Source, read_repeats
from kohaku_wrap.dataset.own.texts import Texts
from kohaku_wrap.wording import count_of, name_first

TRIGGER_SHARE = 0.9
"""Of a subset's captions that begin with one tag, from which on it counts as a trigger word."""

EMPTY_IN_SD_SCRIPTS = (
    "; sd-scripts' own dataset ends at an empty file, and trains a blank first line as an empty caption"
)


def note_sources(founds: Sequence[Found], texts: Sequence[Texts], captions: Sequence[Sequence[str]]) -> list[str]:
    """All notes on the sources; `captions`: of each, those of its images."""
    whole: dict[str, list[str]] = {}
    without: dict[tuple[str, str], list[tuple[Source, int]]] = {}
    empty: dict[tuple[str, str], list[tuple[Source, int]]] = {}
    notes = []
    for found, text, own in zip(founds, texts, captions, strict=True):
        source, options = found.source, found.source.subset.options
        if not options.get("keep_tokens"):
            separator = str(options.get("keep_tokens_separator") or SEPARATOR)
            whole[str(source.folder)] = [each for each in own if each and separator not in each]
        origin = origin_of(source)
        if lacking := len(text.without_caption):
            plain = ", as sd-scripts does it" if origin and text.are_files else ""
            without.setdefault((origin, plain), []).append((source, lacking))
        if blank := sum(not text.of_image[image] for image in text.empty_caption):
            plain = EMPTY_IN_SD_SCRIPTS if text.are_files else ""
            empty.setdefault((origin, plain), []).append((source, blank))
        if own and not any(own) and len(found.unread) == 1:
            notes.append(
                f"{source.folder}: no image has a caption. If they are in {found.unread[0].name}, run this again with "
                f"{shlex.join(('--captions', str(found.unread[0])))}"
            )
        if text.in_capitals:
            ending = text.origin.removesuffix(" files")
            notes.append(
                f"{source.folder}: {count_of(len(text.in_capitals), 'caption file')} with an ending in capitals "
                f"({name_first(text.in_capitals)}), which kwrap reads; sd-scripts reads {ending} alone "
                "where names differ by case"
            )
        if text.repeated:
            notes.append(
                f"{text.origin}: {count_of(text.repeated, 'row')} of images that have a later row; the last one counts"
            )
    return [
        *dict.fromkeys(found.source.about_file for found in founds if found.source.about_file),
        *notes,
        *note_whole(whole),
        *note_lacking(without, "without a caption"),
        *note_lacking(empty, "with an empty caption"),
        *note_links([str(link) for found in founds for link in found.links]),
        *note_skipped([str(found.source.folder / name) for found in founds for name in skipped_children(found.source)]),
    ]


def name_places(places: Sequence[str]) -> str:
    """One folder by its name, several by their number and the first names."""
    return places[0] if len(places) == 1 else f"{len(places):,} folders ({name_first(places)})"


def note_whole(captions_of: Mapping[str, Sequence[str]]) -> list[str]:
    """What happens to captions without a separator where a template shuffles or drops tags; nothing for none.

    `captions_of`: by folder or subset.
    """
    captions_of = {place: captions for place, captions in captions_of.items() if captions}
    if not captions_of:
        return []
    found = dict.fromkeys(map(find_trigger, captions_of.values()))
    triggers = [repr(tag) for tag in found if tag]
    with_it = f", and {triggers[0]}, with which they begin, moves and drops out with them" if triggers else ""
    if triggers and len(found) > 1:
        with_it = f", and the tag with which those of a folder begin ({name_first(triggers)}) moves and drops out too"
    return [
        f"{name_places(list(captions_of))}: {count_of(sum(map(len, captions_of.values())), 'caption')} without "
        f"{SEPARATOR}: a template that shuffles or drops tags does so with all of theirs{with_it}. "
        "dataset_options.keep_tokens = 1 keeps the first tag in its place"
    ]


def find_trigger(captions: Sequence[str]) -> str:
    """The first tag that nearly all captions begin with; empty where there is none."""
    first = Counter(caption.partition(",")[0].strip() for caption in captions if caption)
    if len(captions) < 2 or not first:
        return ""
    tag, uses = first.most_common(1)[0]
    return tag if uses >= TRIGGER_SHARE * len(captions) else ""


def origin_of(source: Source) -> str:
    """Where the caption of images without one comes from; empty where there is none."""
    if not source.class_text:
        return ""
    named = read_repeats(source.folder.resolve().name)
    return "the folder's name" if named and named[1] == source.class_text else "its class_tokens"


def note_lacking(groups: Mapping[tuple[str, str], Sequence[tuple[Source, int]]], which: str) -> list[str]:
    """What images without a caption are trained with; `groups`: by origin of their text and what sd-scripts does."""
    notes = []
    for (origin, plain), members in groups.items():
        images = sum(number for _, number in members)
        what = origin or "an empty one"
        if origin and len(members) == 1:
            what = f"{members[0][0].class_text!r}, {origin}"
        places = name_places([str(source.folder) for source, _ in members])
        notes.append(f"{places}: {count_of(images, 'image')} {which}: trained with {what}{plain}")
    return notes


def note_links(links: Sequence[str]) -> list[str]:
    """Links to folders."""
    if len(links) > 1:
        return [f"{len(links):,} links to folders ({name_first(links)}) are not followed; import each by its own path"]
    return [f"{link}: a link to a folder, which is not followed; import it by a path of its own" for link in links]


def note_skipped(folders: Sequence[str]) -> list[str]:
    """Folders with a number in front that stands for no training."""
    if not folders:
        return []
    which = "number below 1 in front; sd-scripts leaves such a folder out, and so does this"
    return [f"{name_places(folders)}: a {which}"]


def is_beyond_sd_scripts(source: Source, image: str) -> bool:
    """Whether plain sd-scripts, given what kwrap was given, would not train an image of the source.

    Source: DreamBoothDataset and generate_dreambooth_subsets_config_by_subdirs at v0.11.1.
    """
    return "/" in image if source.in_sd_scripts else bool(source.left_out)


def note_beyond(beyond: Mapping[str, str]) -> list[str]:
    """What plain sd-scripts would not train. `beyond`: by image, what would have to hold it directly."""
    if not beyond:
        return []
    folders = sorted({str(Path(image).parent) for image in beyond})
    holders = " or ".join(sorted(set(beyond.values())))
    counted = f"{name_places(folders)}: {count_of(len(beyond), 'image')}"
    return [
        f"{counted}, of which plain sd-scripts would train none: it takes what lies directly in {holders}. kwrap trains"
        " them all; move away what is not meant"
    ]


def skipped_children(source: Source) -> list[str]:
    """Folders named 0_name or below, which are not trained."""
    return [name for name in sorted(source.left_out) if int(name.partition("_")[0]) < 1]
