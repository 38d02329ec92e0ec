"""What `[validation]` of a template asks for: posts that are held out of training, and when their loss is measured."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.dataset.held_out import hold_out
from kohaku_wrap.dataset.images.extracted import IMPORTED_FILE
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import sha256_of_text
from kohaku_wrap.formats.caption_rows import NoImages, find_captions
from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.formats.relations import RELATIONS_FILE

LARGEST_SHARE = 10
"""Percent of the posts that may be taken out of training."""


class TooManyHeldOut(KwrapError):
    """So many posts would be taken out that the training would be another one."""


def find_validation_faults(effective: Effective) -> Faults:
    """Keys of `[validation]` that do nothing, or that cannot be followed."""
    if not effective.get("validation.posts"):
        idle = [key for key in effective.entries if key.startswith("validation.") and key != "validation.posts"]
        if "validation.posts" not in effective.entries:
            yield from ((key, "does nothing without posts = N in [validation]") for key in idle)
    elif effective.get("kwrap.data") == "sd-scripts":
        origin = effective.origin("kwrap.data")
        yield "validation.posts", f'works only with data = "kwrap" in [kwrap] ({origin}), which can leave posts out'


def note_held_out(effective: Effective) -> list[str]:
    """What of the posts that are held out is not known."""
    if effective.site is None or not effective.get("validation.posts") or not effective.site.paths.images.is_dir():
        return []
    try:
        held_out = settle_held_out(effective, effective.site.paths.images)
    except NoImages:
        return ["[validation]: which posts are held out is known once the images have captions."]
    if held_out is None or not held_out.unknown:
        return []
    return [
        f"[validation]: of {held_out.unknown:,} of {held_out.images:,} posts it is not known which are their like, so "
        "these may be trained. `kwrap caption` writes that down where the database has parent_id and md5."
    ]


def settle_held_out(effective: Effective, images: Path) -> HeldOut | None:
    """The posts that a training on these images leaves out; None where none are asked for.

    They follow from ids, captions and relatives alone, whatever the seed. Raises NoImages, TooManyHeldOut.
    """
    wanted = int(effective.get("validation.posts"))
    if not wanted:
        return None
    stamps = tuple(stamp_of(path) for path in (find_captions(images), images / RELATIONS_FILE, images / IMPORTED_FILE))
    held_out = draw_once(images, stamps, wanted)
    refuse_many(held_out, wanted)
    return held_out


@lru_cache(maxsize=4)
def draw_once(images: Path, _stamps: tuple[tuple[int, int], ...], wanted: int) -> HeldOut:
    """`hold_out`, once for the same files: a plan and its run ask alike, and 5.2 million captions take 40 s."""
    return hold_out(images, "", wanted)


def stamp_of(path: Path) -> tuple[int, int]:
    """Length and time of change of a file; zeros where there is none."""
    return (status.st_size, status.st_mtime_ns) if path.is_file() and (status := path.stat()) else (0, 0)


def refuse_many(held_out: HeldOut, wanted: int) -> None:
    """Raise TooManyHeldOut where more than LARGEST_SHARE percent would not be trained."""
    taken, images = len(held_out.left_out), held_out.images
    if taken * 100 <= LARGEST_SHARE * images:
        return
    drawn, relatives = len(held_out.posts), len(held_out.relatives)
    most = images * LARGEST_SHARE // 100 * drawn // taken
    beside = f" and {relatives:,} that are their like" if relatives else ""
    raise TooManyHeldOut(
        f"[validation] posts = {wanted:,}: {drawn:,} posts{beside} are {taken / images:.1%} of the {images:,} images; "
        f"at most {LARGEST_SHARE} % may be held out",
        f"Write posts = {most:,} or less in [validation]." if most else "Leave [validation] out: there are too few.",
    )


def describe_validation(effective: Effective, held_out: HeldOut) -> dict[str, Any]:
    """The lock's table: the options with their defaults, and which posts they came to."""
    return effective.subtable("validation", with_defaults=True) | {
        "drawn": len(held_out.posts),
        "relatives": len(held_out.relatives),
        "relatives_unknown": held_out.unknown,
        "digest": sha256_of_text(held_out.text()),
    }
