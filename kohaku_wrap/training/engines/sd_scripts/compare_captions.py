"""Whether kwrap changes captions as a checkout of sd-scripts does, asked of the trainer's own dataset class.

Run as `python -m kohaku_wrap.training.engines.sd_scripts.compare_captions CHECKOUT`; prints one JSON document: by which
rule the checkout joins shuffled tags, or the first text that kwrap makes otherwise under either rule.
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kohaku_wrap.planning.workers.list_options import stand_in_for_torchvision
from kohaku_wrap.processes import answer
from kohaku_wrap.training.data.captions import CaptionOptions, process_caption

KEPT = CaptionOptions(shuffle_caption=True, keep_tokens_separator="|||")
OPTIONS = (
    CaptionOptions(),
    replace(KEPT, caption_tag_dropout_rate=0.5),
    replace(KEPT, caption_separator="; "),
    CaptionOptions(caption_separator=";", caption_tag_dropout_rate=0.3, keep_tokens=1),
    CaptionOptions(shuffle_caption=True, keep_tokens=2),
    CaptionOptions(caption_tag_dropout_rate=0.15, keep_tokens_separator="|||", keep_tokens=1),
    CaptionOptions(shuffle_caption=True, caption_dropout_rate=0.4, caption_prefix="pre", caption_suffix="post"),
    CaptionOptions(shuffle_caption=True, secondary_separator=";;;", caption_separator=", "),
    CaptionOptions(shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.2),
    CaptionOptions(caption_dropout_every_n_epochs=3, shuffle_caption=True),
)
CAPTIONS = (
    "1girl, solo ||| long hair, hat, smile, x_x ||| safe, masterpiece",
    "a; b c; d ||| e; f, g; h;i ||| j; k",
    "no separator, here, at all",
    "only one ||| separator, here",
    "a, , b,, ||| , c,  , d ||| ",
    "first line, a\nsecond line, b, c",
    "{red|blue} hair, {{braces}}, x;;;y, z;;;w",
    " ||| tag one, tag two ||| ",
    "three ||| separators, a ||| b ||| c",
    ":|, |_|, ||_||, |||, {a|b}, {{x}}, }, {, ⦅, (a:1.2)",
    "日本, 😀, back\\slash,\ttab, |, ||||, first\r\nsecond, \u2028",
)
SEEDS = 12
EPOCHS = 3


def compare(process: Any) -> dict[str, Any]:
    """The rule under which every text is the same, and how many were compared; else the first that is not."""
    differences = []
    for joins in (False, True):
        found = first_difference(process, joins)
        if found is None:
            return {"joins_by_separator": joins, "texts": len(OPTIONS) * len(CAPTIONS) * SEEDS * EPOCHS}
        differences.append(found)
    # The rule that agrees for longer is the nearer one.
    return {"difference": max(differences)[1]}


def first_difference(process: Any, joins: bool) -> tuple[int, str] | None:
    """How many texts agree before the first that does not, and that one."""
    agreed = 0
    for options in (replace(each, joins_by_separator=joins) for each in OPTIONS):
        subset = SimpleNamespace(**asdict(options), token_warmup_step=0, token_warmup_min=1)
        for epoch in range(EPOCHS):
            dataset = SimpleNamespace(current_epoch=epoch + 1, current_step=0, max_train_steps=10, replacements={})
            for caption in CAPTIONS:
                for seed in range(SEEDS):
                    random.seed(seed)
                    theirs = process(dataset, subset, caption)
                    draws = random.Random(seed)
                    ours = process_caption(caption, options, epoch, draws)
                    if theirs == ours and random.getstate() != draws.getstate():
                        return agreed, f"of {caption!r} sd-scripts draws another count of random numbers than kwrap"
                    if theirs != ours:
                        return agreed, f"of {caption!r} sd-scripts makes {theirs!r}, kwrap {ours!r}"
                    agreed += 1
    return None


def compare_checkout() -> dict[str, Any]:
    """`compare` with the checkout that is named on the command line."""
    stand_in_for_torchvision()
    sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
    from kohaku_wrap.training.engines.sd_scripts.objects import find_object

    return compare(find_object("BaseDataset").process_caption)


if __name__ == "__main__":
    answer(compare_checkout)
