"""What happens to a caption each time it is trained: shuffle, tag dropout, kept parts, as sd-scripts does it.

The rules and the order of the random draws are those of sd-scripts' `BaseDataset.process_caption`: given the
same generator state, the same text comes out. The generator is passed in, so nothing depends on history.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

WILDCARD = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True)
class CaptionOptions:
    """The dataset options of sd-scripts that change a caption, under their own names."""

    shuffle_caption: bool = False
    """Shuffle the flexible tags each time."""

    caption_separator: str = ","
    """What stands between tags in the caption file."""

    keep_tokens: int = 0
    """How many leading tags stay fixed where the separator below is absent."""

    keep_tokens_separator: str = ""
    """What ends the fixed part, and, where it stands twice, begins the fixed end."""

    secondary_separator: str = ""
    """What becomes `caption_separator` after the shuffle, so that its tags stay together."""

    enable_wildcard: bool = False
    """Whether `{a|b}` stands for one of its words, and a caption of many lines for one of them."""

    caption_prefix: str = ""
    """Put before every caption, with a space."""

    caption_suffix: str = ""
    """Put after every caption, with a space."""

    caption_dropout_rate: float = 0.0
    """The share of images trained with an empty caption."""

    caption_dropout_every_n_epochs: int = 0
    """Epochs that are multiples of this train every image with an empty caption."""

    caption_tag_dropout_rate: float = 0.0
    """The share of the flexible tags that is left out each time."""

    joins_by_separator: bool = False
    """Join tags by `caption_separator` and a space, as sd-scripts c162e90 does; earlier ones join by ", ".

    Not an option of sd-scripts: the run's lock says it.
    """


def process_caption(caption: str, options: CaptionOptions, epoch: int, draw: random.Random) -> str:
    """The text to train for one image in `epoch` (from 0), with the choices that `draw` makes.

    sd-scripts counts epochs from 1 here, so an epoch rule is applied to `epoch + 1`.
    """
    if options.caption_prefix:
        caption = f"{options.caption_prefix} {caption}"
    if options.caption_suffix:
        caption = f"{caption} {options.caption_suffix}"

    dropped = options.caption_dropout_rate > 0 and draw.random() < options.caption_dropout_rate
    every = options.caption_dropout_every_n_epochs
    if dropped or (every > 0 and (epoch + 1) % every == 0):
        return ""

    caption = choose_wildcards(caption, draw) if options.enable_wildcard else caption.split("\n")[0]
    if options.shuffle_caption or options.caption_tag_dropout_rate > 0:
        head, flexible, tail = split_caption(caption, options)
        if options.shuffle_caption:
            draw.shuffle(flexible)
        if options.caption_tag_dropout_rate > 0:
            flexible = [tag for tag in flexible if draw.random() >= options.caption_tag_dropout_rate]
        joint = f"{options.caption_separator} " if options.joins_by_separator else ", "
        caption = joint.join(head + flexible + tail)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


class NoDraw(random.Random):
    """Draws that leave a caption as it is: nothing is dropped or shuffled, and of several words the first is chosen."""

    def random(self) -> float:
        return 1.0

    def shuffle(self, x: Any) -> None:
        return

    def choice(self, seq: Any) -> Any:
        return seq[0]


def keep_whole(caption: str, options: CaptionOptions) -> str:
    """The caption as it is trained where nothing is shuffled or dropped; of several lines or words the first one."""
    return process_caption(caption, replace(options, caption_dropout_every_n_epochs=0), 0, NoDraw())


def split_caption(caption: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """The fixed tags at the head, the flexible ones, and the fixed ones at the end."""
    separator = options.keep_tokens_separator
    if separator and separator in caption:
        head, _, rest = caption.partition(separator)
        flexible, _, tail = rest.partition(separator)
        return split_tags(head, options), split_tags(flexible, options), split_tags(tail, options)
    # Without the separator sd-scripts keeps empty tags, and so does this.
    tags = [tag.strip() for tag in caption.strip().split(options.caption_separator)]
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def split_tags(text: str, options: CaptionOptions) -> list[str]:
    """The tags of one part, stripped, empty ones left out."""
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]


def choose_sign(caption: str) -> str:
    """A sign that the caption does not have, to stand for a text that must stay whole."""
    sign = "\ufffc"
    while sign in caption:
        sign += "\ufffc"
    return sign


def choose_wildcards(caption: str, draw: random.Random) -> str:
    """One line of the caption with each `{a|b}` replaced by one of its words; `{{` and `}}` are braces."""
    if "\n" in caption:
        caption = draw.choice(caption.split("\n"))
    opening, closing = "⦅", "⦆"
    while opening in caption or closing in caption:
        opening, closing = opening + "⦅", closing + "⦆"
    caption = caption.replace("{{", opening).replace("}}", closing)
    caption = WILDCARD.sub(lambda match: draw.choice(match.group(1).split("|")), caption)
    return caption.replace(opening, "{").replace(closing, "}")
