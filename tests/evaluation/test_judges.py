"""Judges are read as published, or by a judge.toml; what is wrong with a folder is one message."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.evaluation.judge_folders import open_judge
from kohaku_wrap.evaluation.judges import KINDS, BadJudge, UnreadablePicture, prepare_picture
from kohaku_wrap.evaluation.looking import Looker

FLOAT16, UINT8 = onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8


def make_picture(path: Path, size: tuple[int, int] = (80, 50), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_looks_at_a_picture(kind: str, judges: Path, tmp_path: Path) -> None:
    judge = open_judge(judges / kind)
    row = judge.look_at(make_picture(tmp_path / "a.png"))
    assert judge.kind.name == kind and "built for tests" in judge.title
    assert len(row) == (len(judge.labels) or 768)
    if kind in ("aesthetic", "corruption"):
        assert row.sum() == pytest.approx(1, abs=1e-5)


def test_the_published_layout_needs_no_judge_toml(judges: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / f"my-{kind}"
        shutil.copytree(judges / kind, folder, ignore=shutil.ignore_patterns("judge.toml"))
        judge = open_judge(folder)
        assert (judge.kind.name, judge.title) == (kind, f"my-{kind}")
    assert open_judge(tmp_path / "my-ccip").kind.threshold == 0.5
    assert open_judge(tmp_path / "my-tagger").labels == ("1girl", "smile", "long_hair")


def test_a_picture_is_prepared_as_the_source_says(tmp_path: Path) -> None:
    path = make_picture(tmp_path / "a.png")
    stretched = np.asarray(Image.open(path).resize((384, 384), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    wanted = (stretched - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.allclose(prepare_picture(path, KINDS["ccip"]), wanted.transpose(2, 0, 1), atol=1e-5)
    padded = prepare_picture(path, KINDS["tagger"])
    assert padded.shape == (448, 448, 3) and (padded[0] == 255).all() and not (padded[224] == 255).all()
    square = Image.new("RGB", (80, 80), "white")
    square.paste(Image.open(path), (0, 15))
    bgr = np.asarray(square.resize((448, 448), Image.Resampling.BICUBIC), dtype=np.float32)[:, :, ::-1]
    assert np.array_equal(padded, bgr)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (prepare_picture(tmp_path / "a.png", KINDS["tagger"]) == 255).all()


def test_each_picture_is_looked_at_once(judges: Path, tmp_path: Path) -> None:
    path, judge = make_picture(tmp_path / "a.png"), open_judge(judges / "ccip")
    row = Looker(judge, tmp_path / "kept").look_at(path)
    again = Looker(judge, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").rglob("*.npy")
    np.save(kept, row + 1)
    assert np.array_equal(again.look_at(path), row + 1), "what is kept is taken, not looked at anew"
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(Looker(judge, tmp_path / "kept").look_at(path), row)
    (tmp_path / "file").write_text("no folder")
    assert np.array_equal(Looker(judge, tmp_path / "file").look_at(path), row), "what cannot be kept is no failure"
    make_picture(path, (81, 50))
    assert not np.array_equal(again.look_at(path), row)


def write_model(folder: Path, shape: list[int | None], number: int = onnx.TensorProto.FLOAT) -> None:
    """A judge of seven outputs for an input of this shape and type, in place of the one that is there."""
    picture = onnx.helper.make_tensor_value_info("input", number, shape)
    row = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [None, 7])
    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3, 7], [1 / 21] * 21)
    nodes = [
        onnx.helper.make_node("Cast", ["input"], ["numbers"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["numbers"], ["means"], axes=[2, 3], keepdims=0),
        onnx.helper.make_node("MatMul", ["means", "w"], ["output"]),
    ]
    graph = onnx.helper.make_graph(nodes, "judge", [picture], [row], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_a_model_of_another_layout_that_fits_is_a_judge(judges: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(judges / "aesthetic", folder)
    write_model(folder, [1, 3, 448, 448])
    assert open_judge(folder).look_at(make_picture(tmp_path / "a.png")).shape == (7,)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("ccip", lambda folder: (folder / "model_metrics.onnx").unlink(), "without model_metrics.onnx"),
        ("tagger", lambda folder: (folder / "selected_tags.csv").unlink(), "without selected_tags.csv"),
        ("ccip", lambda folder: (folder / "model_feat.onnx").write_bytes(b"no"), "model_feat.onnx: not an ONNX model"),
        ("ccip", lambda folder: (folder / "metrics.json").write_text("{}"), "no threshold in it"),
        ("ccip", lambda folder: (folder / "judge.toml").write_text('kind = "ccip"\nsize = 224\n'), "[N, 3, 224, 224]"),
        ("ccip", lambda folder: (folder / "judge.toml").write_text('kind = "ccip"\noutput = "x"\n'), "no output 'x'"),
        ("ccip", lambda folder: (folder / "judge.toml").write_text('kind = "cip"\nsise = 2\n'), "did you mean size?"),
        ("aesthetic", lambda folder: (folder / "meta.json").write_text('{"labels": ["a"]}'), "7 outputs for 1 labels"),
        ("aesthetic", lambda folder: write_model(folder, [4, 3, 448, 448]), "the first of shape [4, 3, 448, 448]"),
        ("aesthetic", lambda folder: write_model(folder, [None, 3, 448, 448], FLOAT16), "takes tensor(float16)"),
        ("aesthetic", lambda folder: write_model(folder, [None, 3, None, 448], UINT8), "takes tensor(uint8)"),
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_message(kind: str, spoil: object, message: str, judges: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(judges / kind, folder)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(KwrapError) as caught:
        open_judge(folder).look_at(make_picture(tmp_path / "a.png"))
    assert message in caught.value.message
    assert caught.value.next_step


def test_another_kind_and_no_folder_are_said(judges: Path, tmp_path: Path) -> None:
    with pytest.raises(BadJudge, match="a judge of kind tagger; ccip is needed"):
        open_judge(judges / "tagger", ("ccip",))
    with pytest.raises(BadJudge, match="no such folder"):
        open_judge(tmp_path / "nowhere")
    (tmp_path / "cut.png").write_bytes(make_picture(tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UnreadablePicture, match=r"cut\.png: cannot be read"):
        open_judge(judges / "ccip").look_at(tmp_path / "cut.png")


def test_the_kinds_are_listed_with_their_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(program, ["evaluate", "judges"])
    for kind in KINDS.values():
        assert ", ".join(kind.files) in result.stdout and kind.published in result.stdout
    made = CliRunner().invoke(program, ["evaluate", "judges", "--small", str(tmp_path / "small")])
    assert made.exit_code == 0
    # One that says something of a picture alone.
    assert made.stdout.splitlines()[-1].endswith(f"--judge {tmp_path / 'small' / 'tagger'}")
    assert all(open_judge(tmp_path / "small" / kind).look_at(make_picture(tmp_path / "a.png")).size for kind in KINDS)


@pytest.mark.parametrize(
    ("kind", "name", "put", "said"),
    [
        ("tagger", "judge.toml", os.mkfifo, "judge.toml: not a regular file"),
        ("tagger", "selected_tags.csv", os.mkfifo, "selected_tags.csv is not a regular file"),
        ("ccip", "model_feat.onnx", lambda path: path.symlink_to("/dev/zero"), "model_feat.onnx is not a regular file"),
        ("ccip", "metrics.json", lambda path: path.write_bytes(b"\xff{}"), "no threshold in it (not UTF-8 text)"),
        ("ccip", "metrics.json", lambda path: path.write_text("{}"), "no threshold in it (it lacks threshold)"),
        (
            "ccip",
            "metrics.json",
            lambda path: path.write_text('{"threshold": NaN}'),
            "no threshold in it (nan is none)",
        ),
        (
            "ccip",
            "judge.toml",
            lambda path: path.write_text('kind = "ccip"\nmean = [0.1, nan, 0.3]'),
            "not three numbers",
        ),
        ("tagger", "selected_tags.csv", lambda path: path.write_text("[" * 200_000), "its tags cannot be read"),
        ("aesthetic", "meta.json", lambda path: path.write_text("[" * 200_000), "(nested too deeply)"),
    ],
)
def test_odd_files_of_a_judge_are_one_message(
    judges: Path, tmp_path: Path, kind: str, name: str, put: Callable[[Path], Any], said: str
) -> None:
    folder = tmp_path / kind
    shutil.copytree(judges / kind, folder)
    (folder / "judge.toml").unlink()
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    with pytest.raises(KwrapError) as caught:
        open_judge(folder)
    assert said in caught.value.message and caught.value.next_step
