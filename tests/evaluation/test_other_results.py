"""Results of other calls laid over one: what may not be compared, and that no two models have one name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.evaluation import ccip_run, held_out
from kohaku_wrap.evaluation.other_results import OtherResult, add_models


def ccip_result(threshold: float = 0.2) -> dict[str, Any]:
    judge = {"sha256": {"model_feat.onnx": "a"}, "threshold": threshold}
    return {
        "format": 1, "measure": "ccip", "judge": judge, "prompts": {"template": "{character}"},
        "characters": [{"tag": "alice", "references_sha256": "r"}],
        "models": [{"title": "last", "scores": {"alice": {"score": 0.5}, "bob": {"score": 0.1}}}], "pairs": [],
    }  # fmt: skip


def test_another_threshold_is_another_score(tmp_path: Path) -> None:
    path = tmp_path / "ccip.json"
    path.write_text(json.dumps(ccip_result(0.3)))
    with pytest.raises(OtherResult, match="made with another threshold"):
        ccip_run.lay_over(ccip_result(), path)


@pytest.mark.parametrize(
    "odd",
    [
        {"judge": "a judge"},
        {"models": [{"title": "last"}]},
        {"models": [{"title": ["last"], "scores": {}}]},
        {"models": [{"title": "last", "scores": {"alice": {}}}]},
        {"characters": [{"tag": "alice"}]},
        {"prompts": None},
    ],
)
def test_a_result_that_lacks_something_is_refused_before_the_work(tmp_path: Path, odd: dict[str, Any]) -> None:
    path = tmp_path / "ccip.json"
    path.write_text(json.dumps(ccip_result() | odd))
    with pytest.raises(OtherResult, match="no result of `kwrap evaluate ccip`"):
        ccip_run.read_other(path, ccip_result())


def test_losses_of_another_number_are_refused_before_the_work(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"timesteps": [1, 2], "dataset_options": {}, "tokenizers": "", "max_token_length": None}
    model = {"title": "a", "optimizer_step": None, "losses": [[0.1, None]]}
    posts = {"count": 2, "ids_sha256": "", "captions_digest": ""}
    result = {"format": 1, "measure": "loss", "posts": posts, "settings": settings, "models": [model]}
    path = tmp_path / "loss.json"
    path.write_text(json.dumps(result))
    with pytest.raises(OtherResult, match="no result of `kwrap evaluate loss`"):
        held_out.read_other(path, result)
    model["losses"] = [[0.1, None]] * 2
    path.write_text(json.dumps(result))
    assert held_out.read_other(path, result)["models"] == result["models"]


def test_models_of_one_name_in_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    result = ccip_result()
    for place in "abc":
        path = tmp_path / place / "out" / "ccip.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(ccip_result()))
        ccip_run.lay_over(result, path)
    titles = ["last", "out/last", "out/last (2)", "out/last (3)"]
    assert [each["title"] for each in result["models"]] == titles
    assert all(set(each["scores"]) == {"alice"} for each in result["models"][1:])
    assert len({(pair["from"], pair["to"]) for pair in result["pairs"]}) == 6


def test_a_result_named_without_its_folder_is_called_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    added = add_models(ccip_result(), [{"title": "last"}], Path("ccip.json"))
    assert added[0]["title"] == f"{tmp_path.name}/last"
