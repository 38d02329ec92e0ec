"""CCIP scores against a reference written with numpy alone, and whole evaluations with the small judge."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kohaku_wrap.cli import run_program
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.posts import make_posts
from kohaku_wrap.demo.vocabulary import SERIES
from kohaku_wrap.evaluation.ccip import compare_models, correlate_ranks, score_differences, score_pictures
from kohaku_wrap.evaluation.ccip_run import choose_characters, look_at_references
from kohaku_wrap.evaluation.characters import (
    NONE,
    Character,
    add_counts,
    find_characters,
    merge_counts,
    read_index,
    write_prompt,
)
from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.evaluation.judge_folders import open_judge
from kohaku_wrap.evaluation.looking import Looker
from kohaku_wrap.metadata.columns import DANBOORU
from kohaku_wrap.metadata.opening import open_metadata


def differences_by_numpy(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What the small metric says: half of 1 less the cosine."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.clip((1 - unit @ unit.T) / 2, 0, 1)


def score_by_numpy(differences: npt.NDArray[Any], references: int, limit: float, ties: bool) -> tuple[float, float]:
    """Share of references near each picture, mean over pictures; and the references' own, each against the others."""
    near = differences <= np.float32(limit) if ties else differences < np.float32(limit)
    pictures = near[references:, :references]
    own = [near[one, other] for one in range(references) for other in range(references) if one != other]
    return float(np.mean([row.sum() / references for row in pictures])), float(np.mean(own))


def test_the_arithmetic_is_that_of_the_facts_on_planted_features(judges: Path) -> None:
    draw, judge = np.random.default_rng(4), open_judge(judges / "ccip")
    centres = draw.normal(size=(5, 768))
    limit = judge.kind.threshold
    assert limit is not None
    for count in range(20):
        features = (centres[count % 5] * 0.05 * (count // 5) + draw.normal(size=(10, 768))).astype(np.float32)
        exact = differences_by_numpy(features)
        assert np.allclose(judge.compare(features), exact, atol=1e-6)
        exact[np.abs(exact - limit) < 1e-5] = 0  # too near to the limit for float32
        score = score_pictures(judge, features[:6], features[6:])
        below = score_by_numpy(judge.compare(features), 6, limit, False)
        assert (score.score, score.upper_bound) == pytest.approx(below, abs=1e-12)


@pytest.mark.parametrize("limit", [0.178475, 0.5, 0.213231])
def test_ties_count_in_one_of_the_two_scores(limit: float) -> None:
    draw = np.random.default_rng(7)
    for _ in range(50):
        differences = draw.uniform(0, 2 * limit, (14, 14)).astype(np.float32)
        ties = draw.random(differences.shape) < 0.3
        differences[ties] = np.float32(limit)
        differences = np.minimum(differences, differences.T)
        score = score_differences(differences, 10, limit)
        strict, loose = (score_by_numpy(differences, 10, limit, ties) for ties in (False, True))
        assert (score.score, score.upper_bound) == pytest.approx(strict, abs=1e-12)
        assert (score.score_or_equal, score.upper_bound_or_equal) == pytest.approx(loose, abs=1e-12)
        assert score.score < score.score_or_equal
        assert score.of_bound == pytest.approx(strict[0] / strict[1])


def test_a_single_reference_has_no_bound() -> None:
    score = score_differences(np.zeros((3, 3), dtype=np.float32), 1, 0.2)
    assert (score.score, score.upper_bound, score.of_bound) == (1.0, None, None)


def test_an_interval_without_a_shift_holds_0_nineteen_times_of_twenty() -> None:
    draw, held = np.random.default_rng(3), 0
    for _ in range(500):
        interval = bootstrap_mean(draw.gamma(2, 0.1, 150) - draw.gamma(2, 0.1, 150))
        assert interval is not None
        held += interval["low"] <= 0 <= interval["high"]
    assert 0.93 <= held / 500 <= 0.97
    shifted = bootstrap_mean(draw.normal(0.02, 0.05, 200))
    assert shifted is not None and shifted["low"] > 0


def test_models_are_compared_over_the_characters_that_both_have() -> None:
    scores = [{"a": {"score": 0.2}, "b": {"score": 0.5}, "c": {"score": 0.5}},
              {"a": {"score": 0.4}, "b": {"score": 0.1}, "d": {"score": 0.9}}]  # fmt: skip
    (pair,) = compare_models(["one", "two"], scores)
    assert (pair["characters"], pair["wins"], pair["losses"], pair["ties"]) == (2, 1, 1, 0)
    assert math.isclose(pair["difference"]["mean"], -0.1)
    assert correlate_ranks(np.array([1, 2, 3]), np.array([0.1, 0.5, 0.9])) == pytest.approx(1)
    assert correlate_ranks(np.array([1, 1, 1]), np.array([0.1, 0.5, 0.9])) is None


def test_an_index_is_read_and_one_without_features_is_not_scored(index: Path) -> None:
    characters = read_index(index)
    choice = choose_characters(characters, 20)
    assert [each.tag for each in choice.scored] == ["alice_(garden)", "bob", "carol"]
    assert list(choice.not_scored) == [{"tag": "dora", "why": "no feat.npy in the index"}]
    alice = choice.scored[0]
    assert (alice.series, alice.posts, alice.people, alice.core_tags) == ("garden", 100, "1girl", ("long_hair",))
    few = choose_characters([alice, Character("eve", posts=3, references=(Path("a.png"),))], 20)
    assert few.not_scored[0] == {"tag": "eve", "why": "3 solo posts, 20 are needed"}


def test_prompts_are_in_the_models_order() -> None:
    recipe = load_dataset("epsilon").caption
    character = Character("alice_(garden)", "garden", 30, "1girl", ("long_hair", "hat"))
    assert write_prompt(character, "safe", recipe) == (
        r"1girl, alice \(garden\), garden, solo, masterpiece, newest, safe"
    )
    assert "long hair" in write_prompt(character, "core", recipe)


def test_characters_of_a_database_stand_alone_in_their_posts(extracted: Path, tmp_path: Path) -> None:
    source = open_metadata(extracted / "danbooru.db", DANBOORU)
    found = find_characters(source, extracted / "images", None, tmp_path)
    series = {name: title for title, names in SERIES for name in names}
    ids = {int(path.stem) for path in (extracted / "images").glob("*/*.*")}
    solo: dict[str, list[int]] = {}
    for post in make_posts(60, 0):
        own = set(post.tags) & set(series)
        if post.id in ids and "solo" in post.tags and len(own) == 1:
            solo.setdefault(own.pop(), []).append(post.id)
    assert {each.tag: [int(path.stem) for path in each.references] for each in found} == {
        tag: sorted(posts) for tag, posts in solo.items()
    }
    assert all(each.series == series[each.tag] and each.posts == len(solo[each.tag]) for each in found)
    (one,) = find_characters(source, extracted / "images", [found[0].tag], tmp_path)
    assert one == found[0]


def test_pairs_are_counted_without_holding_all_of_them() -> None:
    draw = np.random.default_rng(5)
    parts = [draw.integers(0, 500, size) for size in (*([300] * 200), 1, 0, 40)]
    held = [(NONE, NONE)]
    for part in parts:
        add_counts(held, part)
        assert sum(len(keys) for keys, _ in held) <= 2 * 500
    found = functools.reduce(merge_counts, reversed(held))
    assert np.array_equal(found, np.unique(np.concatenate(parts), return_counts=True))


def test_an_unreadable_reference_is_counted_and_leaves_too_few(judges: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (30, 30), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG cut")
    paths = tuple(tmp_path / f"{number}.png" for number in range(3))
    looker = Looker(open_judge(judges / "ccip"), tmp_path / "kept")
    character = Character("a", posts=3, references=paths)
    features, left, unreadable = look_at_references(looker, [character], 2, lambda done, total: None)
    assert len(features["a"]) == 2 and not left and "1.png: cannot be read" in unreadable[0]
    _, left, _ = look_at_references(looker, [character], 3, lambda done, total: None)
    assert left == [{"tag": "a", "why": "2 references can be read, 3 are needed"}]


def start(*words: object) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "kohaku_wrap", "evaluate", "ccip", *map(str, words)]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "ccip.json").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_called_again_two_checkpoints_have_the_same_result(
    world: Path, judges: Path, index: Path, tmp_path: Path
) -> None:
    write_base_model(tmp_path, seed=7)
    models = [world / "base" / "model.safetensors", tmp_path / "model.safetensors"]
    words = [*models, "--characters", index, "--judge", judges / "ccip", "--tokenizers", world / "base" / "tokenizers",
             "--size", "64x64", "--sampler-steps", "2", "--images-per-character", "2"]  # fmt: skip
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(*words, "--out", undisturbed).wait() == 0
    process = start(*words, "--out", killed)
    while process.poll() is None and len(list(killed.glob("[!.]*.png"))) < 3:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "ccip.json").exists()
    assert start(*words, "--out", killed).wait() == 0
    result = read(killed)
    assert result == read(undisturbed)
    assert (killed / "ccip.svg").read_bytes() == (undisturbed / "ccip.svg").read_bytes()
    assert (killed / "ccip.svg").read_text().count('class="curve"') == 4
    assert len(result["models"]) == 2 and len(result["pairs"]) == 1
    assert all(len(model["scores"]) == 3 for model in result["models"])
    assert "built for tests" in result["judge"]["title"]
    # One of them alone, laid over by the other's result.
    again = tmp_path / "again"
    assert start(models[0], *words[2:], "--out", again, "--against", killed / "ccip.json").wait() == 0
    assert len(read(again)["models"]) == 3
    assert read(again)["models"][0]["scores"] == result["models"][0]["scores"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--characters", "{tmp}/none"], "no such file or folder"),
        (["--characters", "{tmp}"], "no characters.json in it"),
        (["--characters", "{index}", "--preset", "best"], "there is no best"),
        (["--characters", "{index}", "--judge", "{tmp}"], "without model_feat.onnx"),
        (["--characters", "{index}", "--against", "{index}/characters.json"], "no result of `kwrap evaluate ccip`"),
        (["--characters", "{index}", "--against", "{tmp}/ccip.json"], "ccip.json: made with another judge"),
        (["--characters", "{many}", "--images-per-character", "1000"], "101,000 pictures .*--min-posts"),
        (["--characters", "{empty}"], "none of 1 characters can be scored: dora"),
    ],
)
def test_what_cannot_be_scored_is_one_message(
    words: list[str], message: str, world: Path, judges: Path, index: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "characters.json").write_text('[{"tag": "dora"}]')
    (tmp_path / "model_metrics.onnx").write_bytes(b"")
    (tmp_path / "ccip.json").write_text(
        '{"format": 1, "measure": "ccip", "models": [{"title": ""}], "judge": {"sha256": {}}}'
    )
    many, (first, *_) = tmp_path / "many", json.loads((index / "characters.json").read_text())
    shutil.copytree(index / "a0", many / "a0")
    (many / "characters.json").write_text(json.dumps([{**first, "tag": f"alice_{each}"} for each in range(101)]))
    words = [word.format(tmp=tmp_path, index=index, empty=empty, many=many) for word in words]
    judge = [] if "--judge" in words else ["--judge", str(judges / "ccip")]
    model = str(world / "base" / "model.safetensors")
    assert run_program(["evaluate", "ccip", model, *words, *judge, "--out", str(tmp_path / "out"), "--dry-run"])
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
