"""Layout v0's tag lists: `$1A#$2B#` in `post.tag_list`, read many posts at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.errors import KwrapError

LONGEST_TOKEN = 12
DIGITS = {10: "0-9", 36: "0-9A-Za-z"}
"""By base, the digits of an id as a regular expression writes them; letters count in either case."""


class TagListUnreadable(KwrapError):
    """A `post.tag_list` is not a row of `$ID#` tokens."""


def parse_tag_lists(
    post_ids: npt.NDArray[np.int64], lists: pa.Array, base: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The index of the post and the tag id of each token: (tokens,) each, in the order of the text.

    `lists` has no nulls. Raises TagListUnreadable with the first post whose list is something else.
    """
    is_whole = pc.match_substring_regex(lists, rf"^(?:\$[{DIGITS[base]}]{{1,{LONGEST_TOKEN}}}#)*$")
    wrong = np.flatnonzero(~is_whole.to_numpy(zero_copy_only=False))
    if len(wrong):
        text = lists[int(wrong[0])].as_py()
        shown = text if len(text) <= 60 else text[:57] + "…"
        raise TagListUnreadable(
            f"post {post_ids[wrong[0]]}: tag_list {shown!r} is not a row of $ID# tokens with ids in base {base}",
            "The database is damaged or of a layout that kwrap does not know; see `kwrap inspect DB`.",
        )
    split = pc.split_pattern(lists, "#")
    tokens, posts = pc.list_flatten(split), pc.list_parent_indices(split)
    # Behind the last sign of each list nothing follows.
    is_token = pc.not_equal(tokens, "")
    encoded = tokens.filter(is_token).dictionary_encode()
    ids = np.array([int(token[1:], base) for token in encoded.dictionary.to_pylist()], dtype=np.int64)
    return posts.filter(is_token).to_numpy().astype(np.int32), ids[encoded.indices.to_numpy()]
