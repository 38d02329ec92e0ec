"""Captions through the caption processing of the real sd-scripts: prefix and suffix kept, the middle dropped from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.writing import write_captions
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.trainer.installed import find_trainer

CHECKOUT = find_trainer()
"""Looked up before the tests get a home of their own."""

pytestmark = [
    pytest.mark.sd_scripts,
    pytest.mark.slow,
    pytest.mark.skipif(
        CHECKOUT is None, reason="no sd-scripts checkout; set KWRAP_SD_SCRIPTS or run kwrap trainer install"
    ),
]

PROCESS = """
import json, random, sys
from types import SimpleNamespace
from kohaku_wrap.planning.workers.list_options import stand_in_for_torchvision
stand_in_for_torchvision()
sys.path.insert(0, sys.argv[1])
from library import train_util
subset = SimpleNamespace(
    caption_prefix=None, caption_suffix=None, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0,
    enable_wildcard=False, shuffle_caption=True, token_warmup_step=0, token_warmup_min=1,
    caption_tag_dropout_rate=0.15, keep_tokens_separator="|||", keep_tokens=0, caption_separator=",",
    secondary_separator=None,
)
dataset = SimpleNamespace(current_epoch=0, current_step=0, max_train_steps=1, replacements={})
random.seed(0)
captions = json.load(open(sys.argv[2]))
process = train_util.BaseDataset.process_caption
json.dump([[process(dataset, subset, caption) for _ in range(4)] for caption in captions], open(sys.argv[3], "w"))
"""


def split_tags(text: str) -> list[str]:
    return [tag for tag in text.split(", ") if tag]


@pytest.fixture
def processed(tmp_path: Path, writer: ModuleType) -> Iterator[list[tuple[str, list[str]]]]:
    """Captions, and what the trainer makes of each on four occasions."""
    database = open_database(writer.write_layout(tmp_path / "a.db", writer.make_world(500)))
    select_posts(database, read_dataset({}, "all"), tmp_path / "all.parquet")
    write_captions(database, tmp_path / "all.parquet", tmp_path, CaptionRecipe(), ("jsonl",))
    lines = (tmp_path / "captions.jsonl").read_text("utf-8").splitlines()
    captions: list[Any] = [json.loads(line)["caption"] for line in lines]
    captions += [" ||| solo ||| ", "1girl |||  ||| safe", " |||  ||| safe", "a:| ||| >_<, |_|, :| ||| |_|"]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    arguments = [str(CHECKOUT), str(tmp_path / "captions.json"), str(tmp_path / "out.json")]
    subprocess.run([sys.executable, "-c", PROCESS, *arguments], check=True, timeout=250)
    yield list(zip(captions, json.loads((tmp_path / "out.json").read_text()), strict=True))


def test_ends_are_kept_and_the_middle_is_shuffled_and_dropped_from(processed: list[tuple[str, list[str]]]) -> None:
    kept = there = moved = 0
    for caption, results in processed:
        prefix, general, suffix = (split_tags(part) for part in caption.split(" ||| "))
        for result in results:
            assert "|||" not in result
            tags = split_tags(result)
            assert tags[: len(prefix)] == prefix
            assert tags[len(tags) - len(suffix) :] == suffix
            middle = tags[len(prefix) : len(tags) - len(suffix)]
            assert set(middle) <= set(general) and len(middle) <= len(general)
            kept, there = kept + len(middle), there + len(general)
            moved += middle != [tag for tag in general if tag in middle]
    assert there > 8000
    assert 0.135 < 1 - kept / there < 0.165
    assert moved > len(processed)
