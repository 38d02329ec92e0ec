"""Statistics: the same words, counts and token lengths as the captions themselves have."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli.caption import command
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.statistics import CaptionStatistics, measure_captions
from kohaku_wrap.dataset.captions.tokens import Lengths, NoTokenizer, estimate_tokens, find_tokenizer, load_counter
from kohaku_wrap.dataset.captions.writing import write_captions
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.metadata.database import Database, open_database

WORDS = [",", "(", ")", "hair", "long", "girl", "nsfw", "1", "2", "q", "quality", "mid", "old", ">_<", "_", "|"]


@pytest.fixture
def database(tmp_path: Path, writer: ModuleType) -> Database:
    return open_database(writer.write_layout(tmp_path / "a.db", writer.make_world(200)))


@pytest.fixture
def selection(tmp_path: Path, database: Database) -> Path:
    select_posts(database, read_dataset({}, "all"), tmp_path / "all.parquet")
    return tmp_path / "all.parquet"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small CLIP tokenizer: letters, and a few whole words."""
    pytest.importorskip("tokenizers")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    characters = [chr(code) for code in range(33, 127)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*characters, *(f"{one}</w>" for one in characters), *("".join(pair) for pair in dict.fromkeys(merges))]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in dict.fromkeys(merges))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def captions_of(database: Database, selection: Path, recipe: CaptionRecipe, folder: Path) -> list[str]:
    write_captions(database, selection, folder, recipe, ("jsonl",))
    return [json.loads(line)["caption"] for line in (folder / "captions.jsonl").read_text().splitlines()]


def measure(database: Database, selection: Path, recipe: CaptionRecipe, tokenizer: Path | None) -> CaptionStatistics:
    return measure_captions(database, selection, recipe, tokenizer, selection.parent, threads=2)


@pytest.mark.parametrize("style", ["kohaku", "hakubooru"])
def test_tokens_are_those_of_the_caption_as_the_trainer_sees_it(
    database: Database, selection: Path, tokenizer: Path, tmp_path: Path, style: str
) -> None:
    recipe = CaptionRecipe(style=style)
    statistics = measure(database, selection, recipe, tokenizer)
    count = load_counter(tokenizer)
    joined = []
    for caption in captions_of(database, selection, recipe, tmp_path / "images"):
        words = [word.strip() for part in caption.split("|||") for word in part.split(", ")]
        joined.append(", ".join(word for word in words if word))
    lengths = sorted(count(joined).tolist())
    assert statistics.tokens_by == f"tokenizer {tokenizer}"
    assert statistics.token_quantiles["maximum"] == lengths[-1]
    assert statistics.token_quantiles["50%"] == lengths[99]
    assert statistics.cut == {str(limit): sum(one > limit for one in lengths) for limit in (75, 150, 225)}
    assert 0 < statistics.cut["75"] < 200


def test_counter_equals_the_tokenizer_of_transformers(tokenizer: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    texts = ["1girl, long hair", "cat (animal), >_<, :|", "q quality,  OLD", "12girls, \\||/, it's"]
    expected = [len(theirs(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert load_counter(tokenizer)(texts).tolist() == expected


def test_groups_and_frequencies(database: Database, selection: Path, tmp_path: Path) -> None:
    statistics = measure(database, selection, CaptionRecipe(), None)
    captions = captions_of(database, selection, CaptionRecipe(), tmp_path / "images")
    general = Counter(word for caption in captions for word in caption.split(" ||| ")[1].split(", ") if word)
    assert statistics.groups["general"] == sum(general.values())
    ranked = sorted(general.items(), key=lambda item: (-item[1], item[0]))
    assert list(statistics.frequent["general"]) == ranked[:10]
    assert statistics.groups["rating"] == 200 and statistics.posts == 200
    assert 0 < statistics.used_popularity["1000"] <= statistics.popularity["1000"] <= statistics.popularity["100"]


def test_rare_words_are_listed_with_their_counts(database: Database, selection: Path, tmp_path: Path) -> None:
    captions = captions_of(database, selection, CaptionRecipe(), tmp_path / "images")
    uses = Counter(
        word for caption in captions for word in re.split(r", | ?\|\|\| ?", caption.replace("nsfw, ", "nsfw; "))
    )
    below = sorted(uses.values())[len(uses) // 2] + 1
    words = [str(selection), "--db", str(database.path), "--stats", "--rare", str(below)]
    document = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)
    wanted = sorted(
        ((word, count) for word, count in uses.items() if word and count < below), key=lambda w: (w[1], w[0])
    )
    # The rating's word has a comma of its own.
    assert [(word.replace("nsfw, ", "nsfw; "), count) for word, count in document["rare"]] == wanted
    shown = CliRunner().invoke(command, words).output
    assert f"in fewer than {below} captions" in shown
    assert f"{wanted[0][0]} ({wanted[0][1]})" in shown


def test_without_a_tokenizer_the_estimate_is_named(
    database: Database, selection: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert measure(database, selection, CaptionRecipe(), None).tokens_by == "estimate"
    assert estimate_tokens(["1girl, long hair", ">_<", "hatsune miku"]).tolist() == [5, 3, 3]


def test_the_longest_caption_is_shown_as_long_as_it_is() -> None:
    lengths = Lengths()
    for tokens in ([3, 20_001], [4], [30_000, 5]):
        lengths.add(np.array(tokens, dtype=np.int64))
    assert lengths.quantiles() == {"5%": 3, "25%": 4, "50%": 5, "75%": 20_001, "95%": 30_000, "99%": 30_000} | {
        "maximum": 30_000
    }
    assert lengths.beyond_limits() == {"75": 2, "150": 2, "225": 2}
    assert Lengths().quantiles()["maximum"] == 0


def test_tokenizer_folder_is_found_one_level_down(tokenizer: Path) -> None:
    assert find_tokenizer(tokenizer.parent) == tokenizer
    with pytest.raises(NoTokenizer, match=r"no tokenizer\.json"):
        find_tokenizer(tokenizer.parent / "nothing")


def test_a_cache_of_the_hub_that_cannot_be_read_holds_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / ("x" * 300)))  # too long a name for any disk
    assert find_tokenizer(None) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_damaged_tokenizer_is_named_and_one_that_was_only_found_is_left(
    database: Database, selection: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tokenizer / name).write_text("no tokenizer")
    with pytest.raises(NoTokenizer, match="a damaged tokenizer: "):
        measure(database, selection, CaptionRecipe(), tokenizer)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    snapshots = tmp_path / "home/hub/models--openai--clip-vit-large-patch14/snapshots"
    snapshots.mkdir(parents=True)
    tokenizer.rename(snapshots / "one")
    assert measure(database, selection, CaptionRecipe(), None).tokens_by == "estimate"


def test_command(database: Database, selection: Path, tokenizer: Path) -> None:
    arguments = [str(selection), "--db", str(database.path), "--stats", "--tokenizer", str(tokenizer)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0 and "cut at max_token_length 75" in result.stdout
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert json.loads(result.stdout)["posts"] == 200
