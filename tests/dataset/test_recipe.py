"""Dataset files: the shipped ones, and every fault of a wrong one at once."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.cli import caption
from kohaku_wrap.dataset.captions.recipe import STYLES
from kohaku_wrap.dataset.recipe import Stratum, UnknownDataset, dataset_names, load_dataset, read_dataset
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.toml_files import UnreadableToml


def faults(document: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ProblemsFound) as caught:
        read_dataset(document, "mine")
    return {problem.where: problem.what for problem in caught.value.problems}


def test_every_shipped_dataset_is_whole() -> None:
    assert {"delta", "demo", "epsilon"} <= set(dataset_names())
    for name in dataset_names():
        dataset = load_dataset(name)
        assert dataset.selection.seed and len(dataset.sha256) == 64


def test_epsilon_is_the_page() -> None:
    selection = load_dataset("epsilon").selection
    assert selection.strata == (
        Stratum(0, 1_999_999, 1_000_000),
        Stratum(2_000_000, 4_999_999, 2_000_000),
        Stratum(5_000_000, None, None),
    )
    assert selection.before_sample == ()
    assert selection.after_sample == ("deleted", "gold", "no_still_image")


def test_epsilon_states_the_defaults() -> None:
    """The file explains every key with its default, so leaving all out must change nothing."""
    assert load_dataset("epsilon").caption == read_dataset({}, "empty").caption


def test_delta_is_the_page() -> None:
    delta = load_dataset("delta")
    assert [stratum.sample for stratum in delta.selection.strata] == [1_000_000, 1_000_000, None]
    assert delta.selection.strata[1].first_id == 3_000_000
    assert delta.caption.quality.percentiles == (95, 85, 75, 50, 25, 10)


def test_demo_is_epsilon_in_small() -> None:
    demo, epsilon = load_dataset("demo"), load_dataset("epsilon")
    assert demo.caption == epsilon.caption
    assert demo.selection.after_sample == epsilon.selection.after_sample
    ends = [(one.first_id, one.last_id) for one in demo.selection.strata]
    assert ends == [(0, 1_999), (2_000, 4_999), (5_000, None)]


def test_shipped_files_name_no_unknown_key() -> None:
    for path in shipped_folder("datasets").glob("*.toml"):
        assert tomllib.loads(path.read_text("utf-8"))["title"]


def test_without_anything_all_posts_are_taken() -> None:
    selection = read_dataset({}, "empty").selection
    assert selection.strata == (Stratum(None, None, None),)
    assert selection.before_sample == selection.after_sample == ()


def test_unknown_name_and_path(tmp_path: Path) -> None:
    with pytest.raises(UnknownDataset, match=r"epsilom: no such dataset; did you mean epsilon\?"):
        load_dataset("epsilom")
    with pytest.raises(UnknownDataset, match="no such file"):
        load_dataset(str(tmp_path / "mine.toml"))
    (tmp_path / "bad.toml").write_text("[selection\n")
    with pytest.raises(UnreadableToml, match="line"):
        load_dataset(str(tmp_path / "bad.toml"))


def test_all_faults_are_told_at_once() -> None:
    told = faults(
        {
            "selecton": {},
            "selection": {
                "seed": "x",
                "strata": [{"first_id": 5, "last_id": 2, "sample": 0}, {"first": 3}],
                "drop": {
                    "after_sample": ["deleted", "golden", "score"],
                    "unless": {"ratings": ["safe"], "pixels": {"min": 9, "max": 2}, "date": {"first": "May"}},
                },
            },
            "caption": {
                "style": "danbooru",
                "prefix": ["people", "tags"],
                "suffix": ["people"],
                "quality": {"percentiles": [10, 90], "words": ["good"]},
                "years": [
                    {"word": "old", "first": 2005, "last": 2010},
                    {"word": "x", "first": 2010, "last": 2012},
                    {"word": "bc", "first": -9, "last": -2},
                ],
                "ratings": {"safe": ["safe"]},
                "aliases": {"a": "b,c"},
            },
        }
    )
    assert told == {
        "selecton": "unknown; did you mean selection?",
        "selection.seed": "'x' is not a whole number",
        "selection.strata 1.sample": '0 is neither a count of at least 1 nor "all"',
        "selection.strata 1": "first_id 5 is above last_id 2",
        "selection.strata 2.first": "unknown; did you mean first_id?",
        "selection.strata": told["selection.strata"],
        "selection.drop.after_sample": "'score' has no value in [selection.drop.unless]",
        "selection.drop.unless.ratings": "'safe' is not one of general, sensitive, questionable, explicit",
        "selection.drop.unless.pixels": "min 9 is above max 2",
        "selection.drop.unless.date.first": "'May' is not a date such as 2015-01-31",
        "caption.style": "'danbooru' is not one of kohaku, hakubooru",
        "caption.prefix": told["caption.prefix"],
        "caption.suffix": "the group 'people' stands twice",
        "caption.quality.percentiles": "not descending numbers between 0 and 100",
        "caption.quality.words": "2 percentiles need 3 words, not 1",
        "caption.years 2": "2010 to 2012 overlaps an earlier range",
        "caption.years 3": "needs a word, a first year from 1 on and a last year that is not before it",
        "caption.ratings.safe": told["caption.ratings.safe"],
        "caption.aliases.a": "'b,c' cannot stand in a caption",
    }


def test_overlapping_strata_would_take_posts_twice() -> None:
    told = faults({"selection": {"seed": 1, "strata": [{"last_id": 10, "sample": 2}, {"first_id": 10}]}})
    assert told == {
        "selection.strata": "ids the first to 10 and ids 10 to the last overlap: their posts would come twice"
    }


def test_a_sample_needs_a_seed() -> None:
    told = faults({"selection": {"strata": [{"sample": 2}]}})
    assert told == {"selection.seed": "missing: a sample needs one to be the same tomorrow"}


def test_conditions_apply_before_the_sample_unless_named() -> None:
    drop = {
        "before_sample": ["deleted"],
        "after_sample": ["score"],
        "unless": {
            "score": {"min": 3},
            "tags_all": ["solo"],
            "date": {"first": "2015-01-02", "last": datetime.date(2016, 1, 1)},
        },
    }
    selection = read_dataset({"selection": {"seed": 1, "drop": drop}}, "mine").selection
    assert selection.before_sample == ("deleted", "tags_all", "date")
    assert selection.after_sample == ("score",)
    assert selection.conditions["date"] == (datetime.date(2015, 1, 2), datetime.date(2016, 1, 1))
    assert selection.conditions["score"] == (3, None)


def test_published_cutoffs_have_their_own_percentiles() -> None:
    told = faults({"caption": {"quality": {"cutoffs": "published", "percentiles": [91, 50], "words": ["a", "b", "c"]}}})
    assert told["caption.quality.percentiles"].startswith("no published cut-off for 91; there are 5, 10, 15")


def test_the_command_offers_the_styles_that_there_are() -> None:
    assert caption.STYLES == STYLES
