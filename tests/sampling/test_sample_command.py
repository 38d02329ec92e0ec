"""`kwrap sample` in real processes on the tiny world: killed, resumed, shared, alone, and read back."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.cli.drawing import choose_tokenizers
from kohaku_wrap.errors import UsageError
from kohaku_wrap.sampling.checkpoints import Model

SHEET = """
prompts = ["1girl, {style}, solo", "(smile:1.2), hat BREAK long hair", "2girls, masterpiece"]
styles = ["none", "kohaku-7"]
seeds = [1, 2]
sizes = ["64x64"]
negative = "lowres"
steps = 2
rows = ["prompt", "style"]
columns = ["model", "seed"]
"""


def words_of(world: Path, out: Path, *more: object) -> list[str]:
    words: list[object] = ["sample", world / "base" / "model.safetensors", world / "other" / "model.safetensors"]
    words += ["--tokenizers", world / "base" / "tokenizers", "--out", out, "--batch", 2, "--threads", 1, *more]
    return [str(word) for word in words]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "kohaku_wrap", *words], stdout=subprocess.DEVNULL)


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def sheet(world: Path) -> Path:
    path = world / "sheet.toml"
    path.write_text(SHEET)
    return path


@pytest.fixture(scope="module")
def undisturbed(world: Path, sheet: Path) -> Path:
    out = world / "undisturbed"
    assert start(words_of(world, out, "--prompts", sheet)).wait() == 0
    return out


def test_a_sheet_is_whole_and_has_a_contact_sheet(undisturbed: Path) -> None:
    names = set(pictures_in(undisturbed)) - {"contact-sheet.png"}
    assert len(names) == 24
    assert {path.name for path in undisturbed.iterdir()} == names | {"contact-sheet.png", "sheet.json"}
    with Image.open(undisturbed / "contact-sheet.png") as contact:
        # Three prompts with two styles each below each other, two models with two seeds each side by side.
        assert contact.width == 200 + 4 * (64 + 6) and contact.height > 6 * 64


@pytest.mark.slow
def test_killed_twice_and_shared_it_is_the_same(world: Path, sheet: Path, undisturbed: Path) -> None:
    out = world / "killed"
    for most in (3, 9):
        killed = start(words_of(world, out, "--prompts", sheet))
        while killed.poll() is None and len(list(out.glob("[!.]*.png"))) < most:
            time.sleep(0.01)
        assert killed.poll() is None, "it ended before it was killed"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not (out / "contact-sheet.png").exists()
    # The processes of the killed call may still draw for half a second; the rest is shared by two processes.
    assert start(words_of(world, out, "--prompts", sheet, "--jobs", 2)).wait() == 0
    assert pictures_in(out) == pictures_in(undisturbed)
    assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.iterdir()}


@pytest.mark.slow
def test_a_picture_alone_and_its_own_command_give_the_same_file(
    world: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = sorted(undisturbed.glob("*masterpiece_2_*.png"))[0]
    shown = CliRunner().invoke(program, ["inspect", str(picture), "--json"])
    found = json.loads(shown.output)
    assert found["pixels_as_drawn"] and found["unknown_files"] == []
    words = shlex.split(found["replay"])
    assert words[0] == "kwrap"
    done = subprocess.run([sys.executable, "-m", "kohaku_wrap", *words[1:]], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()


def run(*words: object, **settings: str) -> Result:
    return CliRunner().invoke(program, [str(word) for word in words], env=settings)


def message_of(result: Result) -> str:
    assert result.exit_code in (1, 2), result.output
    assert result.exception is not None
    return f"{result.exception}\n{result.output}"


@pytest.mark.parametrize(
    "words,said",
    [
        (["--prompt", "a", "--sampler", "euler-b"], r"--sampler'.* 'euler-b' is not one of 'euler-a', 'dpmpp-2m'"),
        (["--prompt", "a", "--schedule", "linear"], "'linear' is not one of 'exponential'"),
        (["--prompt", "a (b"], r"\( is never closed at character 3\n    a \(b\n      \^"),
        (["--prompt", "a", "--prompts", "x"], "cannot be combined"),
        ([], "no prompt is given"),
        (["--prompts", "missing.toml"], "no such file of prompts"),
        (["--prompt", "a", "--size", "65x64"], "multiples of 8"),
        (["--prompt", "a", "--seed", "-1"], "-1 is not in the range"),
        (["--prompt", "a", "--hires", "9"], "from 1 to 8"),
        (["--prompt", "a", "--network", "gone.safetensors:0.5"], "no such network file"),
        (["--prompt", "a", "--style", "kohaku-9"], "did you mean"),
        (["--prompt", "a", "--steps", "all"], "--run is missing"),
        (["--prompt", "a", "--run", "x"], "cannot be combined"),
    ],
)
def test_bad_input_is_one_message(world: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = run(*words_of(world, tmp_path / "out", *words))
    assert re.search(said, message_of(result))
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_model_of_this_kind_are_named(world: Path, network: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, tokenizers = world / "base" / "model.safetensors", world / "base" / "tokenizers"
    rest = ["--prompt", "a", "--out", tmp_path / "out", "--tokenizers", tokenizers]
    assert "is a network, not a checkpoint" in message_of(run("sample", network, *rest))
    save_file({"lora_unet_nothing_here.diff": torch.ones(3)}, tmp_path / "foreign.safetensors")
    said = message_of(run("sample", base, "--network", tmp_path / "foreign.safetensors", *rest))
    assert "does not fit the checkpoint" in said and "lora_unet_nothing_here" in said
    assert "kwrap merge --unmatched skip" in said
    weight = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    size = load_file(base)[weight].shape[0]
    save_file(
        {"lora_te1_text_model_final_layer_norm.w_norm": torch.full((size,), torch.nan)}, tmp_path / "nan.safetensors"
    )
    said = message_of(run("sample", base, "--network", tmp_path / "nan.safetensors", *rest))
    assert "model.safetensors + nan.safetensors is not finite" in said and "--overflow" not in said
    save_file({"a": torch.ones(3)}, tmp_path / "none.safetensors")
    assert "not a whole SDXL" in message_of(run("sample", tmp_path / "none.safetensors", *rest))
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02" + b"x" * 50)
    assert "never unpickles" in message_of(run("sample", tmp_path / "model.ckpt", *rest))


@pytest.mark.parametrize(
    "text,said",
    [
        ("prompts = 3", "must be a list"),
        ("prompts = ['a']\nseeds = [-1]\nsamplers = 'x'\nsampler = 'ddim'", "3 problems"),
        ("prompts = ['a (b']", "prompts 1"),
        ("prompts = [", "sheet.toml"),
        ("prompts = ['a']\nrows = ['seeds']", "rows"),
        ("[[prompts]]\nprompt = 'a'\nnegativ = 'b'", "did you mean negative"),
        ("prompts = ['a']\nhires = 'big'", "not a scale"),
        ("prompts = ['a']\nhires = ['1.5', '2']", "no axis of the sheet; here are 2"),
    ],
)
def test_an_unreadable_sheet_is_one_message(world: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sheet.toml").write_text(text)
    assert said in message_of(run(*words_of(world, tmp_path / "out", "--prompts", tmp_path / "sheet.toml")))


def test_a_file_of_prompts_takes_the_options_of_sd_scripts(world: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# notes\n1girl --n bad --w 72 --h 64 --s 3 --l 7.5 --d 9\n\nhat, smile\n")
    out = run(*words_of(world, tmp_path / "out", "--prompts", tmp_path / "p.txt", "--seed", "4", "--dry-run", "--json"))
    found = json.loads(out.stdout)["pictures"]
    assert len(found) == 4 and not (tmp_path / "out").exists()
    assert (found[0]["prompt"], found[0]["negative"], found[0]["seed"], found[0]["width"]) == ("1girl", "bad", 9, 72)
    assert (found[-1]["prompt"], found[-1]["seed"], found[-1]["guidance"], found[-1]["width"]) == (
        "hat, smile",
        4,
        5,
        128,
    )
    (tmp_path / "p.txt").write_text("1girl --x 3\nhat --w wide\n(open\nhat --d\n")
    said = message_of(run(*words_of(world, tmp_path / "out", "--prompts", tmp_path / "p.txt")))
    assert "4 problems" in said and "--x is none of" in said and "never closed" in said
    assert "--d with nothing: not a number" in said


def test_what_lies_deep_below_the_models_folder_is_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model = Model(tmp_path / "models" / "model.safetensors")
    deep = tmp_path / "models" / "another" / "program" / "vocab.json"
    deep.parent.mkdir(parents=True)
    deep.write_text("{}")
    with pytest.raises(UsageError, match="no tokenizers are known here"):
        choose_tokenizers(None, None, [model])
    (model.path.parent / "vocab.json").write_text("{}")
    (model.path.parent / "merges.txt").write_text("")
    assert choose_tokenizers(None, None, [model]) == (model.path.parent,) * 2


@pytest.mark.slow
def test_a_full_disk_and_too_little_memory_are_one_message(world: Path, tmp_path: Path) -> None:
    limit = 'ulimit -f 20; exec "$@"'
    words = [sys.executable, "-m", "kohaku_wrap", *words_of(world, tmp_path / "out", "--prompt", "a", "--size", "96x96",
                                                           "--sampler-steps", "1")]  # fmt: skip
    done = subprocess.run(["bash", "-c", limit, "x", *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and str(tmp_path / "out") in done.stderr
    assert list((tmp_path / "out").rglob("*.png*")) == []
    limit = 'ulimit -v 1500000; exec "$@"'
    done = subprocess.run(["bash", "-c", limit, "x", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "memory" in done.stderr


@pytest.mark.slow
def test_what_memory_runs_out_at_is_named_and_the_rest_of_the_sheet_is_drawn(world: Path, tmp_path: Path) -> None:
    (tmp_path / "sheet.toml").write_text("prompts = ['a', 'b']\nsizes = ['32768x32768', '64x64']\nsteps = 1\n")
    out = tmp_path / "out"
    words = [sys.executable, "-m", "kohaku_wrap", "sample", world / "base" / "model.safetensors", "--prompts",
             tmp_path / "sheet.toml", "--tokenizers", world / "base" / "tokenizers", "--threads", 1,
             "--out", out]  # fmt: skip
    limited = ["bash", "-c", 'ulimit -v 2500000; exec "$@"', "x", *map(str, words)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: \S+\.png: too little memory .*32768x32768.* 1 more of", done.stderr, re.MULTILINE)
    sizes = [Image.open(path).size for path in out.glob("*.png")]
    assert sizes == [(64, 64)] * 2 and not list(out.rglob("*.part"))
