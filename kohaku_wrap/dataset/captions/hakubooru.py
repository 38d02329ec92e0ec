"""The captions of HakuBooru 0.0.3 (PyPI), told in the terms of a caption recipe.

Source: hakubooru 0.0.3, `caption.KohakuCaptioner` with its default processors year, rating, quality. Tags keep the
order of the relation's rows, doubled rows included. Where HakuBooru fails on a post (an unknown rating), the
words that depend on the rating are left out; a tag that would break the caption is left out as everywhere.
"""

from __future__ import annotations

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe, QualityRecipe, YearRange
from kohaku_wrap.dataset.captions.words import PEOPLE_TAGS

MAX_QUALITY_ID = 7_100_000


def hakubooru_recipe() -> CaptionRecipe:
    """HakuBooru's groups, words and limits."""
    return CaptionRecipe(
        style="hakubooru",
        prefix=("people", "character", "series", "artist"),
        shuffled=("general", "meta", "year", "rating", "quality"),
        suffix=(),
        people_tags=(*PEOPLE_TAGS, "male_focus"),
        underscores="short",
        quality=QualityRecipe(cutoffs="published", max_id=MAX_QUALITY_ID),
        # A date that cannot be read is year 0 to HakuBooru, and every year before 2015 but 2005 to 2010 is "early".
        years=(
            YearRange("early", 0, 2004),
            YearRange("old", 2005, 2010),
            YearRange("early", 2011, 2014),
            YearRange("mid", 2015, 2017),
            YearRange("recent", 2018, 2020),
            YearRange("newest", 2021, 2024),
        ),
        ratings={
            "general": ("safe",),
            "sensitive": ("sensitive",),
            "questionable": ("nsfw",),
            "explicit": ("explicit", "nsfw"),
        },
    )
