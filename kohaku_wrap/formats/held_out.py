"""`held-out.json` of a run: the posts that its validation is measured on, and those taken out of training with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kohaku_wrap.arrays import BoolArray, Int64Array
from kohaku_wrap.errors import KwrapError, refusing

HELD_OUT_FILE = "held-out.json"
FORMAT = 1
KINDS = ("parents", "children", "siblings", "equal pictures")
"""Of posts that are taken out with a held-out one; a post of several kinds counts for the first."""


class BadHeldOut(KwrapError):
    """The list of held-out posts is none, or of a later kwrap."""


@dataclass(frozen=True)
class HeldOut:
    """Which posts a run does not train."""

    posts: Int64Array
    """(posts,) ids that were drawn, ascending."""

    relatives: Int64Array
    """(relatives,) ids that are neither measured nor trained, ascending."""

    by_kind: Mapping[str, int]
    """Relatives by KINDS."""

    unknown: int
    """Posts of the whole dataset whose relatives nobody knows."""

    images: int
    """Posts of the whole dataset."""

    @property
    def left_out(self) -> Int64Array:
        """(posts + relatives,) ids that are not trained, ascending."""
        return np.union1d(self.posts, self.relatives)

    def text(self) -> str:
        """The file's text, the same for the same posts."""
        return json.dumps({"format": FORMAT, **vars(self)}, default=np.ndarray.tolist) + "\n"

    def mark(self, ids: Int64Array) -> BoolArray:
        """(ids,) whether each is not trained."""
        return np.isin(ids, self.left_out)

    @classmethod
    def parse(cls, text: str) -> HeldOut:
        """From the file's text. Raises BadHeldOut."""
        with refusing(
            BadHeldOut,
            f"{HELD_OUT_FILE}: not a list of held-out posts",
            "Restore it: the run's lock holds its text under [files].",
        ):
            document: dict[str, Any] = json.loads(text)
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}, and this kwrap reads {FORMAT}")
            posts, relatives = (np.array(document[name], dtype=np.int64) for name in ("posts", "relatives"))
            return cls(posts, relatives, dict(document["by_kind"]), int(document["unknown"]),
                       int(document["images"]))  # fmt: skip
