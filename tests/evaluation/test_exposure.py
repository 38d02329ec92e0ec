"""How often tags were trained: against captions drawn one by one, and against a run's own ledger."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from plain_runs import make_run, misbehave, train
from written_ledgers import hold_out

from kohaku_wrap.cli import program, run_program
from kohaku_wrap.evaluation.caption_blocks import split_tags
from kohaku_wrap.evaluation.caption_loops import WORDS, begin_words, draw_below, draw_share, seed_words
from kohaku_wrap.evaluation.counting import COLUMNS, IMAGES, TRAINED, Pass, Sums, count_passes, list_later_passes
from kohaku_wrap.evaluation.exposure import exposure_file, measure_exposure
from kohaku_wrap.evaluation.trained_line import NotTrained, find_line
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import Subset
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.streams import seed_of, seeds_of
from kohaku_wrap.training.data.captions import keep_whole
from kohaku_wrap.training.data.items import ItemOptions, Items
from kohaku_wrap.training.data.run_items import open_items
from kohaku_wrap.training.records.ancestry import Until
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import list_ledger_files, read_ledger_file

BUCKETS = {
    "resolution": [64, 64],
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
}
PUBLISHED = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.15, "keep_tokens_separator": "|||"}
WORDS_OF_CAPTIONS = (
    "1girl",
    "long hair",
    " smile ",
    "",
    "hat",
    "a (b)",
    "ß",
    "{x|y}",
    "{{z}}",
    "\u3000wide\u3000",
    "q;r",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    PUBLISHED,
    {**PUBLISHED, "flip_aug": True, "random_crop": True},
    {**PUBLISHED, "caption_dropout_rate": 0.4},
    {**PUBLISHED, "caption_dropout_every_n_epochs": 2},
    {**PUBLISHED, "caption_prefix": "pre,", "caption_suffix": ", post"},
    {**PUBLISHED, "enable_wildcard": True, "secondary_separator": ";"},
    {"shuffle_caption": True, "keep_tokens": 2},
    {"caption_tag_dropout_rate": 0.9, "keep_tokens": 1},
    {**PUBLISHED, "caption_separator": " "},
    {**PUBLISHED, "keep_tokens_separator": "&&", "num_repeats": 3},
)


def make_caption(draw: random.Random) -> str:
    """Tags of all kinds, with none to three separators, now and then a line break."""
    parts = [
        ", ".join(draw.choices(WORDS_OF_CAPTIONS, k=draw.randint(0, 6))) for _ in range(draw.choice([1, 2, 3, 3, 3, 4]))
    ]
    return draw.choice([" ||| ", "|||", " && "]).join(parts) + draw.choice(["", "", "", "\nsecond, line", ","])


def write_captions(images: Path, has_texts: bool, subsets: tuple[Subset, ...] = ()) -> Columns:
    draw, rows = random.Random(3), 150
    ids = np.arange(rows, dtype=np.int64) * 11 + 5
    sides = np.array([(64, 64), (200, 96), (90, 301)], dtype=np.int32)[ids % 3]
    captions = [make_caption(draw) for _ in range(rows)]
    others: list[Any] = []
    if has_texts:
        places = [draw.choice([0, len(caption.encode())]) for caption in captions]
        others = [pa.array([draw.choice(["", "A hat, red; {x|y}."]) for _ in range(rows)]), np.array(places, np.int32)]
    if subsets:
        place = (ids % len(subsets)).astype(np.int32)
        others = [np.array([each.repeats for each in subsets], np.int32)[place], place]
    shares = {"tags": 0.3, "text": 0.3, "both": 0.4} if has_texts else None
    images.mkdir()
    with (images / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {}, subsets, shares) as writer:
        files = pa.array([f"{each}.png" for each in ids])
        writer.write(ids, files, sides[:, 0], sides[:, 1], pa.array(captions), *others)
    return Columns.open(images)


def count_slowly(items: Items, passes: list[Pass]) -> dict[str, list[int]]:
    """The same counts from captions drawn one by one; of a caption with a text its tags alone."""
    counts: dict[str, list[int]] = {}
    for each in passes:
        for row in np.flatnonzero(each.weights).tolist():
            item, text = items.draw_item(row, each.epoch, each.repeat), ""
            if items.columns.texts:
                text = items.columns.texts[row]
            caption = item.caption.replace(text, ",") if text else item.caption
            for tag in split_tags(caption, items.options_of(row).captions):
                counts.setdefault(tag, [0] * len(COLUMNS))[each.column] += int(each.weights[row])
    return counts


def count_quickly(items: Items, passes: list[Pass]) -> dict[str, list[int]]:
    sums = Sums()
    count_passes(items, passes, sums, 2, None)
    rows = sums.table().to_pylist()
    found = {row["tag"]: [0, *(row[name] for name in COLUMNS[1:])] for row in rows}
    return {tag: counts for tag, counts in found.items() if any(counts)}


def list_passes(items: Items) -> list[Pass]:
    weights = (items.columns.ids % 3).astype(np.uint8)
    return [Pass(0, 0, weights, TRAINED), Pass(1, 1, weights, TRAINED), *list_later_passes(items, 3)]


def test_the_compiled_generator_is_pythons_own() -> None:
    words, place, first = np.empty(WORDS, np.uint32), np.zeros(1, np.int64), begin_words()
    for seed in (0, 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1):
        theirs = random.Random(seed)
        seed_words(words, first, np.uint64(seed))
        place[0] = 0
        assert [draw_share(words, place) for _ in range(700)] == [theirs.random() for _ in range(700)]
        assert [draw_below(words, place, n) for n in range(2, 300)] == [theirs.randint(0, n - 1) for n in range(2, 300)]


def test_many_seeds_are_those_of_single_items() -> None:
    numbers = [0, 7, -3, 1 << 40]
    assert seeds_of(numbers, "item", 5, 2, None, 1).tolist() == [seed_of("item", 5, 2, each, 1) for each in numbers]
    assert seeds_of(numbers, "item", 5, 2, None).tolist() == [seed_of("item", 5, 2, each) for each in numbers]


@pytest.mark.parametrize("has_texts", [False, True], ids=["tags", "texts"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(reversed(options), "none"))
def test_counts_are_those_of_captions_drawn_one_by_one(
    options: dict[str, Any], has_texts: bool, tmp_path: Path
) -> None:
    columns = write_captions(tmp_path / "images", has_texts)
    items = Items(columns, ItemOptions.from_dataset_options({**BUCKETS, **options}), 4, 99, 2)
    passes = list_passes(items)
    assert count_quickly(items, passes) == count_slowly(items, passes)


def test_subsets_have_options_and_repeats_of_their_own(tmp_path: Path) -> None:
    subsets = (Subset("a", 1), Subset("b", 3))
    columns = write_captions(tmp_path / "images", False, subsets)
    options = {**BUCKETS, **PUBLISHED, "later_subsets": [{**BUCKETS, "num_repeats": 3, "caption_prefix": "b,"}]}
    items = Items(columns, ItemOptions.from_dataset_options(options), 4, 99, 2)
    passes = list_passes(items)
    counts = count_quickly(items, passes)
    assert counts == count_slowly(items, passes)
    assert counts["b"][COLUMNS.index("next_epoch")] == 3 * counts["b"][COLUMNS.index("one_more_repeat")] == 3 * 75


@pytest.mark.parametrize("affixes", [{}, {"caption_prefix": "pre,", "caption_suffix": ", post"}], ids=["", "affixes"])
def test_images_are_counted_by_their_captions_as_written(tmp_path: Path, affixes: dict[str, Any]) -> None:
    options = ItemOptions.from_dataset_options({**BUCKETS, **affixes})
    items = Items(write_captions(tmp_path / "images", False), options, 4, 9, 2)
    sums = Sums()
    count_passes(items, list(list_later_passes(items, 0)), sums, 1, None)
    written = Counter(
        tag
        for row in range(len(items.columns))
        for tag in split_tags(keep_whole(items.columns.caption_of(row), options.captions), options.captions)
    )
    assert not any("\n" in tag for tag in written)
    assert {row["tag"]: row[COLUMNS[IMAGES]] for row in sums.table().to_pylist()} == written


def count_ledger(run: Run, until: int) -> Counter[str]:
    """Tags over the ledger's last record of each position, from captions drawn one by one."""
    items, found = open_items(run), {}
    for _, _, path in list_ledger_files(run.ledger):
        for record in read_ledger_file(path).records:
            if record["optimizer_step"] <= until:
                found[int(record["epoch"]), int(record["position"])] = record
    counts: Counter[str] = Counter()
    for epoch, position in found:
        for entry in items.order.epoch(epoch).images_at(position):
            repeat, row = items.entries.place_of(int(entry))
            counts.update(split_tags(items.draw_item(row, epoch, repeat).caption, items.options_of(row).captions))
    return counts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of shuffled captions with dropout that was killed once and went on from its state before."""
    run = make_run(tmp_path_factory.mktemp("world") / "runs" / "r", dataset=PUBLISHED)
    subset = "".join(f"{name} = {json.dumps(value)}\n" for name, value in PUBLISHED.items())
    with run.dataset_config.open("a", encoding="utf-8") as stream:
        stream.write(subset)
    misbehave(run, attempt_1={"die": "step", "at": 5})
    train(run, restarts=2)
    assert run.networks
    assert len({attempt for attempt, _, _ in list_ledger_files(run.ledger)}) == 2
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of it to change."""
    return Run(Path(shutil.copytree(trained.folder, tmp_path / "r")))


def kwrap(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(program, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_exposure_is_what_the_ledger_and_the_captions_say_at_each_step(run: Run) -> None:
    last = run.lock.total_optimizer_steps
    for step in (1, 4, 5, last):
        exposure = measure_exposure(run, step)
        trained = {row["tag"]: row["trained"] for row in exposure.tags.to_pylist() if row["trained"]}
        assert trained == count_ledger(run, step)
        assert exposure.facts["unknown"] == dict.fromkeys(exposure.facts["unknown"], 0)
    document = kwrap("evaluate", "exposure", run.folder, "--all")
    assert document["optimizer_step"] == last
    assert {row["tag"]: row["trained"] for row in document["rows"]} == {
        row["tag"]: row["trained"] for row in measure_exposure(run).tags.to_pylist()
    }


def test_asking_again_reads_what_is_kept_unless_the_line_is_another(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = measure_exposure(run, 3)
    monkeypatch.setattr("kohaku_wrap.evaluation.counting.count_line", lambda *_: pytest.fail("counted again"))
    assert measure_exposure(run, 3).tags.equals(made.tags)
    monkeypatch.undo()
    path = exposure_file(run, 3)
    path.write_bytes(path.read_bytes()[:-20])
    assert measure_exposure(run, 3).tags.equals(made.tags)
    shutil.copy(path, exposure_file(run, 2))
    assert not measure_exposure(run, 2).tags.equals(made.tags)


def test_status_says_how_often_one_tag_was_trained(run: Run) -> None:
    counts = count_ledger(run, run.lock.total_optimizer_steps)
    tag = next(tag for tag in counts if tag.startswith("tag "))
    document = kwrap("status", run.folder, "--tag", tag.replace(" ", "_"), "--tag", "1girl")
    assert [(row["tag"], row["trained"]) for row in document["tags"]] == [
        (tag, counts[tag]),
        ("1girl", counts["1girl"]),
    ]
    shown = CliRunner().invoke(program, ["status", str(run.folder), "--tag", "1girl"])
    [line] = [line.split() for line in shown.stdout.splitlines() if line.startswith("1girl")]
    assert line[1] == f"{counts['1girl']:,}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tag", "2girls"], "2girls: no caption of run r has this tag"),
        (["--tag", "1GIR"], "Tags with these letters: 1girl."),
        (["--step", "999"], "has trained optimizer steps 1 to 12, not 999"),
    ],
)
def test_what_was_not_trained_is_said(
    run: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(["evaluate", "exposure", str(run.folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_ledger_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = list_ledger_files(run.ledger)[0][2]
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    assert run_program(["evaluate", "exposure", str(run.folder)]) == 1
    shown = capsys.readouterr().err
    assert "records differ" in shown and f"kwrap verify {run.folder}" in shown


def test_a_parent_without_the_ledger_of_its_first_attempts_is_not_counted(run: Run) -> None:
    for attempt, _, path in list_ledger_files(run.ledger):
        if attempt == 1:
            path.unlink()
    with pytest.raises(NotTrained, match="has no whole optimizer step yet"):
        find_line(run, until=Until(1, 3))


def test_other_captions_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = run.lock_file.read_text(encoding="utf-8")
    run.lock_file.write_text(text.replace(run.lock.dataset_digest, "0" * 64), encoding="utf-8")
    assert run_program(["evaluate", "exposure", str(run.folder)]) == 1
    assert "other captions than those that run r was made with" in capsys.readouterr().err


def test_captions_of_the_trainers_own_data_are_not_known(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = run.lock_file.read_text(encoding="utf-8")
    run.lock_file.write_text(text.replace('data = "kwrap"', 'data = "sd-scripts"'), encoding="utf-8")
    assert run_program(["evaluate", "exposure", str(run.folder)]) == 1
    assert "are not in its records" in capsys.readouterr().err


def test_posts_that_are_held_out_count_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "r", images=9)
    hold_out(run, 3, 10)
    train(run)
    tags = {row["tag"]: row for row in measure_exposure(run).tags.to_pylist()}
    assert "tag 3" not in tags and "tag 10" not in tags
    assert tags["tag 17"]["next_epoch"] == 1 and tags["1girl"]["images"] == tags["1girl"]["next_epoch"] == 7
