"""`kwrap merge` and `kwrap inspect` as a person calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kohaku_wrap.cli import program, run_program
from kohaku_wrap.merging.arithmetic import kernels

from .conftest import WriteModel

GAMMA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(program, list(arguments))


def bind(paths: dict[str, Path]) -> list[str]:
    return [word for name, path in paths.items() for word in ("-m", f"{name}={path}")]


def test_a_dry_run_reads_headers_only_and_needs_no_torch(four_models: dict[str, Path]) -> None:
    script = (
        "import sys\nfrom kohaku_wrap.cli import run_program\n"
        "code = run_program(sys.argv[1:])\n"
        "heavy = {'torch', 'lycoris', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, "merge", "gamma-rev1", *bind(four_models), "--dry-run", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert document["coefficients"][0]["models"] == {"beta7": "1/2", "anxl3": "4/5", "anxl2": "-4/5", "base7": "1/2"}
    assert document["data_bytes"] == sum(entry["end"] - entry["begin"] for entry in document["layout"])
    assert document["dry_run"] is True


@pytest.mark.slow
def test_a_merge_ends_with_the_next_command(tmp_path: Path, four_models: dict[str, Path]) -> None:
    output = tmp_path / "gamma.safetensors"
    merged = call("merge", GAMMA, *bind(four_models), "-o", str(output), "--verify", "--threads", "2")
    assert merged.exit_code == 0, merged.output
    assert "random numbers equal rational arithmetic" in merged.output and "kwrap inspect" in merged.output
    inspected = call("inspect", str(output))
    assert inspected.exit_code == 0
    assert "AutoV2" in inspected.output and "1/2 beta7 + 4/5 anxl3 - 4/5 anxl2 + 1/2 base7" in inspected.output
    document = json.loads(call("inspect", str(output), "--json").stdout)
    assert document["kind"] == "SDXL checkpoint" and document["replay"].startswith("kwrap merge")
    assert document["schema_version"] == 1 and len(document["keys"]) == document["tensors"]


def test_errors_are_messages_with_exit_codes(
    tmp_path: Path, four_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"beta7={four_models['beta7']}"
    output = str(tmp_path / "o.safetensors")
    cases = [
        (["merge", "base + 0.5 * (a - )", "-o", output], 2, "^"),
        (["merge", "beta7", "-m", base], 2, "no output is named"),
        (["merge", "beta7", "-m", "beta7", "-o", output], 2, "expected NAME=PATH"),
        (["merge", "beta7", "-m", base, "-m", base, "-o", output], 2, "is given twice"),
        (["merge", "beta7", "-m", f"beta7={tmp_path}/none", "-o", output], 2, "none: no such file"),
        (
            ["merge", "beta7", "-m", "beta7=~no.such.user/x", "-o", output],
            2,
            "~no.such.user is no user of this machine",
        ),
        (["merge", "beta7 + x", "-m", base, "-o", output], 2, "no file is given for x"),
        (["merge", "beta7", "-m", base, "-o", str(four_models["beta7"])], 1, "is the input beta7"),
    ]
    for arguments, code, text in cases:
        assert run_program(arguments) == code, arguments
        assert text in capsys.readouterr().err


def test_a_file_name_that_is_no_text(tmp_path: Path, write_model: WriteModel) -> None:
    odd = write_model("a", 1).rename(tmp_path / os.fsdecode(b"a\xff.safetensors"))
    output = tmp_path / os.fsdecode(b"o\xff.safetensors")
    inspect = ["inspect", "--no-hash", str(output)]
    for words in (["merge", "a", "-m", f"a={odd}", "-o", str(output)], inspect, [*inspect, "--json"]):
        shown = subprocess.run(
            [sys.executable, "-m", "kohaku_wrap", *words],
            capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        ).stdout.decode()  # fmt: skip
        assert "o\\udcff" in shown and ("a\ufffd.safetensors" in shown or words[0] == "merge")


def test_hostile_metadata_is_shown(tmp_path: Path, write_model: WriteModel) -> None:
    for recipe in ({"type": "kwrap", "coefficients": 5, "decisions": None, "models": ["x"]}, {"coefficients": None}):
        path = write_model("a", 1, metadata={"sd_merge_recipe": json.dumps(recipe)})
        shown = call("inspect", str(path), "--no-hash")
        assert shown.exit_code == 0 and "merge formula" in shown.output, shown.output


def test_the_first_merge_says_that_it_compiles(
    tmp_path: Path, four_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", "beta7", "-m", f"beta7={four_models['beta7']}", "-o", str(tmp_path / "o.safetensors")]
    for known in (True, False):
        monkeypatch.setattr(kernels, "loops_are_compiled", lambda known=known: known)
        assert ("compiles its loops first" not in call(*words).stderr) == known


def test_compiled_loops_are_found(four_models: dict[str, Path], tmp_path: Path) -> None:
    assert call("merge", GAMMA, *bind(four_models), "-o", str(tmp_path / "o.safetensors")).exit_code == 0
    assert kernels.loops_are_compiled()


def test_values_are_shown_with_their_brackets(tmp_path: Path, write_model: WriteModel) -> None:
    model = write_model("a", 1, metadata={"modelspec.title": "x [bold] y"})
    shown = call("inspect", str(model), "--no-hash")
    assert "x [bold] y" in shown.output


def test_inspect_of_a_database(tmp_path: Path) -> None:
    made = call("demo", str(tmp_path / "world"), "--posts", "40")
    assert made.exit_code == 0, made.output
    document = json.loads(call("inspect", str(tmp_path / "world" / "danbooru.db"), "--json").stdout)
    assert document["kind"] == "metadata database" and document["posts"] >= 40
    assert "metadata database" in call("inspect", str(tmp_path / "world" / "danbooru.db")).output
