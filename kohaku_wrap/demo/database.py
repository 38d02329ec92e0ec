"""The metadata database of the embedded world: danbooru2023's layout v3 with all its columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.demo.posts import DemoPost
from kohaku_wrap.demo.rolls import Rolls
from kohaku_wrap.demo.vocabulary import list_tags
from kohaku_wrap.metadata.new_database import write_new_database

POPULARITY_A_POST = 35
"""The world is a thousandth of the site; popularities stay large enough to spread over 100 and 1000."""


def write_database(path: Path, posts: Sequence[DemoPost], file_sizes: Mapping[int, int], seed: int) -> None:
    """Write the posts, tags and relations to `path`; `file_sizes` in bytes of the posts that are in the tars."""
    tags = list_tags()
    id_of_tag = {tag.name: tag.id for tag in tags}
    uses = Counter(name for post in posts for name in set(post.tags))
    parents = {post.parent_id for post in posts if post.parent_id is not None}
    write_new_database(
        path,
        (make_row(post, post.id in parents, file_sizes.get(post.id, 250_000), seed) for post in posts),
        ((tag.id, tag.name, tag.type, uses[tag.name] * POPULARITY_A_POST) for tag in tags),
        ((post.id, id_of_tag[name]) for post in posts for name in post.tags),
    )


def make_row(post: DemoPost, has_children: bool, file_size: int, seed: int) -> dict[str, Any]:
    """One row of the post table."""
    rolls = Rolls(seed, "row", post.id)
    url = f"https://cdn.example.net/{{}}/{post.md5[:2]}/{post.md5[2:4]}/{{}}{post.md5}.{{}}"
    large = max(post.original_size) > 300
    down_score = rolls.below(4)
    up_score = post.fav_count * rolls.between(60, 110) // 100 + rolls.below(3)
    ext = post.file_ext
    return {
        "id": post.id,
        "created_at": post.created_at,
        "uploader_id": rolls.between(1, 400),
        "source": f"https://art.example.net/works/{post.id}" if rolls.chance(80) else "",
        "md5": post.md5 if post.has_url else None,
        "parent_id": post.parent_id,
        "has_children": int(has_children),
        "is_deleted": int(post.kind == "deleted"),
        "is_banned": int(post.kind == "banned"),
        "pixiv_id": rolls.between(1, 120_000_000) if rolls.chance(50) else None,
        "has_active_children": int(has_children),
        "bit_flags": 0,
        "has_large": int(large),
        "has_visible_children": int(has_children),
        "image_width": post.original_size[0],
        "image_height": post.original_size[1],
        "file_size": file_size,
        "file_ext": ext,
        "rating": post.rating,
        "score": up_score - down_score,
        "up_score": up_score,
        "down_score": -down_score,
        "fav_count": post.fav_count,
        "file_url": url.format("original", "", ext) if post.has_url else None,
        "large_file_url": url.format("sample", "sample-" if large else "", ext) if post.has_url else None,
        "preview_file_url": url.format("180x180", "", "jpg") if post.has_url else None,
        "updated_at": post.created_at or None,
    }
