"""Cached outputs of the text encoders, in the store of cached latents: one flat record a caption that never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.items import Item
from kohaku_wrap.training.data.latent_index import StoreRule
from kohaku_wrap.training.data.latent_shards import Latents
from kohaku_wrap.training.data.latent_store import RecordStore


class OtherCaption(KwrapError):
    """The outputs that are cached for an image are those of another caption."""


@dataclass(frozen=True)
class TextRule(StoreRule):
    """What decides the bits of cached outputs of the text encoders, besides the captions."""

    base_model_sha256: str
    """Of the file that both text encoders are read from."""

    tokenizers_sha256: str
    """Of the files of both tokenizers."""

    computed_in: str
    """What the text encoders' weights are in: fp32, fp16 or bf16; `precision` is what the UNet reads."""

    outputs: tuple[int, int, int, int]
    """Tokens, width of each of both states, width of the pooled state."""

    constants: ClassVar[Mapping[str, Any]] = {"kind": "text encoders"}
    what = "outputs of text encoders"

    @property
    def numbers(self) -> int:
        """Of one caption."""
        tokens, first, second, pooled = self.outputs
        return tokens * (first + second) + pooled

    def cut(self, record: Latents) -> list[Latents]:
        """(n, numbers) as sd-scripts lists outputs: (n, tokens, width) of both encoders, (n, width) pooled."""
        tokens, *widths = self.outputs
        first, second, last = np.split(record, np.cumsum([tokens * width for width in widths[:2]]), axis=1)
        return [each.reshape(len(each), tokens, -1) for each in (first, second)] + [last]


def stamp_of_caption(caption: str) -> int:
    """What the index has of a caption, so that one that changed gets a record of its own."""
    return seed_of("caption", caption)


class TextStore(RecordStore):
    """Cached outputs of the text encoders."""

    rule: TextRule

    def read_captions(self, items: Sequence[Item]) -> list[Latents]:
        """The outputs for these items, as `TextRule.cut` gives them, each of its item's caption and verified.

        Raises OtherCaption, NoLatents, DamagedLatents.
        """
        records = self.read_batch([(item.image_id, False) for item in items])
        stamps = self.index.lengths[self.index.find(np.array([item.image_id for item in items]))]
        for item, stamp in zip(items, stamps, strict=True):
            if stamp_of_caption(item.caption) != stamp:
                raise OtherCaption(
                    f"{self.folder}: what is cached for image {item.image_id} is of another caption",
                    "Make it again: kwrap cache TEMPLATE --site SITE",
                )
        return self.rule.cut(records.reshape(len(items), -1))
