"""Tables of posts with their tags in columns of their own: one query of them for each edition, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kohaku_wrap.metadata.columns import (
    CATEGORIES,
    NAMES,
    OLD_RATINGS,
    TAG_TYPES,
    WORDS_OF_RATINGS,
    FoundColumns,
    SiteMapping,
)
from kohaku_wrap.metadata.dialects import Dialect, Sqlite
from kohaku_wrap.metadata.filters import COLUMNS
from kohaku_wrap.metadata.source import API_LAYOUT, Edition

SAMPLED_POSTS = 1000
"""Posts whose tags show how they are written."""

LACKS = {
    "created_at": "no date of upload: captions get no word of a year",
    "md5": "no md5: the filter `gold` asks the file url alone",
    "file_url": "no file url: the filter `gold` asks the md5 alone",
    "file_ext": "no file extension: the filter `no_still_image` drops every post",
    "rating": "no rating: captions get no word of a rating or of quality",
    "score": "no score",
    "fav_count": "no favourites: captions get no word of quality",
    "image_width": "no width",
    "image_height": "no height",
    "is_deleted": "nothing says which posts are deleted: all are kept",
    "is_banned": "nothing says which posts are banned: all are kept",
}
"""What follows where a column is not there."""

NO_ORDER = "tags stand in columns by category: their order across categories is not known"
NO_CATEGORIES = "tags without a category column ({}) are of unknown type and left out: give a tag table with --tags"
OLD_RATING = "there is s and no g in it, as until 2022: s is read as safe (general), and no post is sensitive"


def find_lacks(edition: Edition, deleted: int, no_offset: int) -> dict[str, str]:
    """What the edition does not say, by a word and a sentence, once its deleted posts and plain dates are counted."""
    lacks = dict(edition.lacks)
    if no_offset:
        lacks["zone"] = f"{no_offset:,} dates say no offset: they are read in {edition.zone}"
    if edition.has_tag_strings and not deleted and "is_deleted" not in lacks:
        lacks["deleted posts"] = "no post is marked as deleted, so it may hold active ones only"
    return lacks


def make_edition(
    name: str,
    found: FoundColumns,
    dialect: Dialect,
    table: str,
    place: str,
    ask: Callable[[str], Any],
    mapping: SiteMapping,
) -> Edition:
    """The edition of the columns that were found in `table`; `ask` gives the first value of a query's first row.

    `place`: SQL for the place of a row in the table.
    """
    lacks = {column: LACKS[column] for column in NAMES if column not in found.posts and column in LACKS}
    if "file_name" in found.posts:
        lacks.pop("file_ext")
    words: Mapping[str, int] = mapping.ratings or WORDS_OF_RATINGS
    if "rating" in found.posts and not mapping.ratings:
        word = f"lower(trim({dialect.text(dialect.column(found.posts['rating']))}))"
        newer, older = (ask(f"SELECT 1 FROM {table} WHERE {word} = '{letter}' LIMIT 1") for letter in "gs")
        if older and not newer:
            words = {**WORDS_OF_RATINGS, **OLD_RATINGS}
            lacks["sensitive"] = OLD_RATING
    if not found.whole:
        lacks["order"] = NO_ORDER
    untyped = [kind for number, kind in enumerate(TAG_TYPES) if number not in found.typed]
    if found.whole and untyped and not mapping.tag_table:
        lacks["categories"] = NO_CATEGORIES.format(", ".join(untyped))
    tags = {f"{TAG_TYPES[number]} tags": " + ".join(names) for number, names in found.typed.items()}
    return Edition(
        name=f"{mapping.site}: {name}" if mapping.site else name,
        layout=API_LAYOUT,
        posts=posts_sql(found, dialect, table, place, words, _are_by_commas(found, dialect, table, ask)),
        typed=tuple(found.typed),
        columns={**found.posts, **({"tags": " + ".join(found.whole)} if found.whole else {}), **tags},
        lacks=lacks,
        zone=mapping.zone,
        tag_table=mapping.tag_table,
        categories=mapping.categories or CATEGORIES,
        has_parents="parent_id" in found.posts,
    )


def _are_by_commas(found: FoundColumns, dialect: Dialect, table: str, ask: Callable[[str], Any]) -> bool:
    """Whether commas stand between tags, and blanks within them: no site has a tag with a comma."""
    columns = found.whole or next(iter(found.typed.values()))
    text = dialect.text(dialect.column(columns[0]))
    some = f"SELECT {text} AS t FROM {table} WHERE {text} <> '' LIMIT {SAMPLED_POSTS}"
    return bool(ask(f"SELECT 2 * sum(CASE WHEN instr(t, ',') > 0 THEN 1 ELSE 0 END) > count(*) FROM ({some}) AS s"))


def posts_sql(
    found: FoundColumns, dialect: Dialect, table: str, place: str, words: Mapping[str, int], by_commas: bool
) -> str:
    """A query of the COLUMNS of every post of `table`, its `place`, its `tags` in order, and `tags_N` of a category.

    `words`: the ratings by the words for them, in small letters.
    """
    columns = {key: dialect.column(name) for key, name in found.posts.items()}
    extension = dialect.text(columns["file_ext"]) if "file_ext" in columns else "''"
    if "file_name" in columns:
        extension = dialect.extension(dialect.text(columns["file_name"]))
    typed = {number: [dialect.column(name) for name in names] for number, names in found.typed.items()}
    every = [dialect.column(name) for name in found.whole] or [column for some in typed.values() for column in some]
    own = {
        "created_at": dialect.date(columns["created_at"]) if "created_at" in columns else "''",
        "file_ext": f"lower(ltrim({extension}, '.'))",
        "place": place,
        "tags": dialect.tags(every, by_commas),
        **{f"tags_{number}": dialect.tags(some, by_commas) for number, some in typed.items()},
    }
    return select_columns(dialect, columns, words, own, table)


def select_columns(
    dialect: Dialect, columns: Mapping[str, str], words: Mapping[str, int], own: Mapping[str, str], table: str
) -> str:
    """A query of the COLUMNS of every post: those of `columns` as the dialect reads each, and `own` by its SQL."""
    reads = {
        **dict.fromkeys(("id", "score", "fav_count", "parent_id"), dialect.number),
        **dict.fromkeys(("md5", "file_url"), dialect.text),
        **dict.fromkeys(("image_width", "image_height"), dialect.size),
        **dict.fromkeys(("is_deleted", "is_banned"), dialect.flag),
    }
    made = {name: read(columns[name]) for name, read in reads.items() if name in columns}
    made |= {"rating": dialect.rating(columns["rating"], words) if "rating" in columns else "-1", **own}
    made["day"] = dialect.day(made["created_at"])
    made |= {name: dialect.absent(name) for name in COLUMNS if name not in made}
    return "SELECT " + ", ".join(f"{sql} AS {name}" for name, sql in made.items()) + f" FROM {table}"


def danbooru_posts_sql(dialect: Dialect, place: str, has_parents: bool) -> str:
    """The COLUMNS of the table `post` of danbooru2023.

    `place`: SQL for the place of a row in it; `has_parents`: whether it has the column parent_id.
    """
    own = {
        "created_at": dialect.text("created_at"),
        "file_ext": f"lower({dialect.text('file_ext')})",
        "place": place,
        **({"id": "id"} if isinstance(dialect, Sqlite) else {}),
    }
    columns = {name: name for name in COLUMNS if has_parents or name != "parent_id"}
    return select_columns(dialect, columns, {}, own, "post")
