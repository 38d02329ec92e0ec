"""What a merge is marked to predict: by the models that have weight in its UNet, or as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from kohaku_wrap.cli import program
from kohaku_wrap.formats.predictions import MARKS
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge

from .conftest import Tensors, WriteModel
from .networks.test_foreign_keys import LORA

EPSILON, V, STATED_V = "epsilon", "v", "v by modelspec"


def write_kinds(write_model: WriteModel, **kinds: str) -> list[str]:
    """`-m NAME=PATH` of models of these kinds; an empty kind says nothing."""

    def mark(tensors: Tensors) -> None:
        tensors.update({name: torch.tensor([]) for name in MARKS})

    def unmark(tensors: Tensors) -> None:
        tensors.pop("v_pred", None)

    words = []
    for seed, (name, kind) in enumerate(kinds.items()):
        stated = {EPSILON: "epsilon", STATED_V: "v"}.get(kind)
        metadata = {"modelspec.prediction_type": stated} if stated else {}
        path = write_model(name, seed, change=mark if kind == V else unmark, metadata=metadata)
        words += ["-m", f"{name}={path}"]
    return words


def merge(folder: Path, formula: str, *words: str) -> tuple[list[str], str | None, str]:
    """The marks of the output, its modelspec.prediction_type, and what the command said of predictions."""
    output = folder / "out.safetensors"
    finished = CliRunner().invoke(program, ["merge", formula, *words, "-o", str(output), "--json"])
    assert finished.exit_code == 0, finished.output
    decisions = json.loads(finished.stdout)["decisions"]
    with safe_open(output, "np") as file:
        marks = [mark for mark in MARKS if mark in file.keys() and not file.get_tensor(mark).size]  # noqa: SIM118
        return marks, file.metadata().get("modelspec.prediction_type"), "\n".join(decisions)


@pytest.mark.parametrize(
    ("formula", "marks", "stated"),
    [
        ("v + 0.5 * (w - v)", list(MARKS), "v"),
        ("e + (v - e)", list(MARKS), "v"),
        ("unet(v) + te(e) + vae(e)", list(MARKS), "v"),
        ("unet(e) + te(v) + vae(v)", [], "epsilon"),
        ("v + 0.4 * (e - f)", list(MARKS), "v"),
        ("e + 0.4 * (v - w)", [], "epsilon"),
        ("s + 0.5 * (t - s)", [], None),
        ("m + 0.5 * (m - m)", [], "v"),
    ],
)
def test_a_merge_of_one_kind_is_marked_as_that(
    tmp_path: Path, write_model: WriteModel, formula: str, marks: list[str], stated: str | None
) -> None:
    kinds = {"v": V, "w": V, "e": EPSILON, "f": EPSILON, "s": "", "t": "", "m": STATED_V}
    words = write_kinds(write_model, **{name: kinds[name] for name in kinds if name in names_in(formula)})
    found = merge(tmp_path, formula, *words)
    assert found[:2] == (marks, stated)
    assert "warning" not in found[2] and "empty marker:" not in found[2]


def names_in(formula: str) -> set[str]:
    """The models of a formula whose names are one letter."""
    return {word for word in formula.replace("(", "( ").replace(")", " )").split() if len(word) == 1 and word.isalpha()}


@pytest.mark.parametrize(
    ("asked", "marks", "stated"), [("", [], "epsilon"), ("v", list(MARKS), "v"), ("eps", [], "epsilon")]
)
@pytest.mark.parametrize("formula", ["e + 0.5 * (v - e)", "e + blocks(MID=1, else=0) * (v - e)"])
def test_a_mix_of_kinds_is_a_warning_that_names_the_models(
    tmp_path: Path, write_model: WriteModel, formula: str, asked: str, marks: list[str], stated: str
) -> None:
    words = write_kinds(write_model, e=EPSILON, v=V)
    found = merge(tmp_path, formula, *words, *(["--prediction", asked] if asked else []))
    assert found[:2] == (marks, stated)
    warning = next(line for line in found[2].splitlines() if line.startswith("warning: "))
    assert "e predicts epsilon (modelspec.prediction_type)" in warning
    assert "v predicts v (its key v_pred and ztsnr)" in warning
    assert ("--prediction eps or --prediction v decides" in warning) == (not asked)


def test_a_mix_whose_first_model_is_v_keeps_its_marks(tmp_path: Path, write_model: WriteModel) -> None:
    marks, stated, said = merge(tmp_path, "v + 0.5 * (s - v)", *write_kinds(write_model, v=V, s=""))
    assert (marks, stated) == (list(MARKS), "v")
    assert "s predicts epsilon (nothing says it; epsilon is assumed)" in said


def test_prediction_v_marks_a_file_that_no_input_marks(tmp_path: Path, write_model: WriteModel) -> None:
    words = write_kinds(write_model, s="")
    assert merge(tmp_path, "0.5 * s + 0.5 * s", *words, "--prediction", "v")[:2] == (["v_pred"], "v")


def test_a_network_that_says_v_on_a_model_that_says_epsilon(tmp_path: Path, write_model: WriteModel) -> None:
    network = tmp_path / "n.safetensors"
    save_file(LORA, network, metadata={"modelspec.prediction_type": "v"})
    words = [*write_kinds(write_model, e=EPSILON), "-m", f"n={network}"]
    marks, stated, said = merge(tmp_path, "e + 1.0 * net(n)", *words)
    assert (marks, stated) == ([], "epsilon")
    assert "warning: prediction types are mixed" in said and "n predicts v" in said


@pytest.mark.parametrize(
    ("formula", "kinds", "asked", "stated", "warned"),
    [
        ("net(a) + 0.5 * net(b)", "vv", "", "v", False),
        ("net(a) + 0.5 * net(b)", "-v", "", "v", False),
        ("net(a) + 0.5 * net(b)", "--", "", "", False),
        ("net(a) + 0.5 * net(b)", "--", "v", "v", False),
        ("net(a) + 0.5 * net(b)", "ev", "", "epsilon", True),
        ("net(a) + 0.5 * net(b)", "ev", "v", "v", True),
        ("a - b", "-v", "", "v", False),
        ("a - b", "--", "", "", False),
        ("a - b", "ve", "", "v", True),
    ],
)
def test_a_network_of_a_change_says_what_its_files_say(
    tmp_path: Path, write_model: WriteModel, formula: str, kinds: str, asked: str, stated: str, warned: bool
) -> None:
    words = {"v": STATED_V, "e": EPSILON, "-": ""}
    paths = {}
    for place, (name, kind) in enumerate(zip("ab", kinds, strict=True)):
        said = write_kinds(write_model, **{name: words[kind]})[1].partition("=")[2]
        paths[name] = Path(said)
        if "net" in formula:
            metadata = {} if kind == "-" else {"modelspec.prediction_type": {"v": "v", "e": "epsilon"}[kind]}
            save_file({key: tensor + place for key, tensor in LORA.items()}, said, metadata=metadata)
    plan = plan_merge(formula, paths, MergeOptions(network="lora", prediction=asked))
    assert plan.prediction == stated
    assert any(line.startswith("warning: ") for line in plan.decisions) == warned
