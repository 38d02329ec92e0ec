"""The words of captions: people counts, kaomoji, black lists, quality, year and rating words, published cut-offs."""

from __future__ import annotations

import re
from collections.abc import Mapping

SEPARATOR = "|||"
"""Stands on both sides of the part that the trainer shuffles."""

PEOPLE_TAGS = (
    *("1girl", "2girls", "3girls", "4girls", "5girls", "6+girls", "multiple_girls"),
    *("1boy", "2boys", "3boys", "4boys", "5boys", "6+boys", "multiple_boys"),
    *("1other", "2others", "3others", "4others", "5others", "6+others", "multiple_others"),
)

KAOMOJI = frozenset(
    (
        *("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3"),
        *("6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"),
    )
)
"""Emoticons among the site's tags that are written with their underscore."""

META_BLACK_LIST = (
    *("(medium)", "commentary", "bad", "translat", "request"),
    *("mismatch", "revision", "audio", "video"),
)
ARTIST_BLACK_LIST = ("banned",)

PERCENTILES = (90, 75, 60, 45, 30, 10)
QUALITY_WORDS = (
    *("masterpiece", "best quality", "great quality", "good quality"),
    *("normal quality", "low quality", "worst quality"),
)

YEARS = (
    ("old", 2005, 2010),
    ("early", 2011, 2014),
    ("mid", 2015, 2017),
    ("recent", 2018, 2020),
    ("newest", 2021, 2024),
)

RATING_WORDS: Mapping[str, tuple[str, ...]] = {
    "general": ("safe",),
    "sensitive": ("sensitive",),
    "questionable": ("nsfw",),
    "explicit": ("nsfw", "explicit"),
}

PUBLISHED_PERCENTILES = tuple(range(5, 100, 5))
PUBLISHED_CUTOFFS: Mapping[str, tuple[int, ...]] = {
    "general": (1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 22, 27, 37),
    "sensitive": (1, 2, 4, 5, 6, 8, 9, 11, 13, 15, 17, 19, 22, 26, 30, 36, 44, 56, 81),
    "questionable": (4, 8, 11, 14, 18, 21, 25, 29, 33, 38, 43, 49, 56, 65, 75, 88, 105, 132, 182),
    "explicit": (4, 9, 13, 18, 22, 27, 33, 39, 45, 52, 60, 69, 79, 92, 106, 125, 151, 190, 262),
}
"""`fav_count` at PUBLISHED_PERCENTILES of danbooru2023, as HakuBooru 0.0.3 has them."""

_BREAKING = re.compile(r"[,\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]|\|\|\|")


def breaks_caption(text: str) -> bool:
    """Whether `text` would be read as more or less than one tag: a comma, a separator, a line break, only blanks.

    So would U+FFFD, which stands for bytes that are no text.
    """
    return not text.strip() or _BREAKING.search(text) is not None
