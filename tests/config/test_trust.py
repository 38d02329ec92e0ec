"""What a template of a stranger can name, and that nothing of it runs, is unpickled or is sent away."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import program
from kohaku_wrap.config import code_names
from kohaku_wrap.config.base_model import UnpickledByName, require_weight_files
from kohaku_wrap.config.code_names import find_known, find_unknown, is_trusted, known_code
from kohaku_wrap.config.layers import load_layers
from kohaku_wrap.config.schema import SECRET_OPTIONS
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import ProblemsFound, UsageError
from kohaku_wrap.formats.safetensors import PickledFile
from kohaku_wrap.training.records.lock import Lock

SPY = """import pathlib
pathlib.Path({marker!r}).write_text("imported")
import torch
class Opt(torch.optim.SGD):
    def __init__(self, params, lr=0.1, momentum=0.0): super().__init__(params, lr=lr, momentum=momentum)
"""


def run(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One kwrap command in a folder, as one types it."""
    command = [str(Path(sys.executable).with_name("kwrap")), *words]
    environment = {**os.environ, "KWRAP_HOME": str(folder / "home"), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_check_imports_no_name_of_a_template(tmp_path: Path) -> None:
    """Neither from the current folder nor from where Python would find it, until the person trusts it."""
    marker = tmp_path / "marker"
    library = tmp_path / "library"
    library.mkdir()
    for folder in (tmp_path, library):
        (folder / "strangers.py").write_text(SPY.format(marker=str(marker)))
    (tmp_path / "mine.toml").write_text(
        'extends = "demo"\n[a]\noptimizer_type = "strangers.Opt"\nlr_scheduler_type = "strangers.Opt"\n'
        'network_module = "strangers"\n[optimizer_args]\nnestrov = true\n'
    )
    for words in (("template", "check", "mine.toml"), ("template", "show", "mine.toml"), ("doctor", "mine.toml")):
        done = run(*words, folder=tmp_path, PYTHONPATH=str(library))
        assert done.returncode == 1
        assert done.stdout.count("unknown") + done.stderr.count("unknown") >= 3
        assert "--trust strangers" in done.stdout + done.stderr
        assert not marker.exists()
    trusted = run(
        "template",
        "check",
        "mine.toml",
        "--trust",
        "strangers",
        "--no-modules",
        folder=tmp_path,
        PYTHONPATH=f"{library}:",
    )
    assert "nestrov" in trusted.stdout
    assert 'optimizer_type = "strangers.Opt" runs code of strangers' in trusted.stderr
    assert marker.exists(), "a trusted class is asked for its arguments"
    marker.unlink()
    run("template", "check", "mine.toml", "--trust", "strangers", "--no-modules", folder=tmp_path, PYTHONPATH=":.")
    assert not marker.exists(), "nor does trust bring the current folder in"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr_scheduler_type", "pydoc.pipepager"),
        ("lr_scheduler_type", "LambdaLR"),
        ("lr_scheduler_type", "warnings"),
        ("network_module", "os"),
        ("network_module", "networks.lora.os"),
        ("optimizer_type", "bitsandbytes.optim.os"),
        ("optimizer_type", "torch.optim.adamw"),
        ("optimizer_type", "os.8bit"),
        ("optimizer_type", "../evil.Opt"),
        ("optimizer_type", "DAdaptAnything"),
        ("dataset_class", "os.system"),
    ],
)
def test_code_that_is_not_on_the_list_is_unknown(option: str, value: str) -> None:
    [(named, what)] = find_unknown({option: value}, [])
    assert named == option
    assert "unknown" in what


def test_known_names_are_the_trainers_own_and_those_of_packages() -> None:
    assert find_known("optimizer_type", "lion8BIT") == "bitsandbytes.optim.Lion8bit"
    assert find_known("optimizer_type", "RMSprop") == "torch.optim.RMSprop"
    assert find_known("lr_scheduler_type", "CosineAnnealingLR") == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert find_known("network_module", "lycoris.kohya") == "lycoris.kohya"


def test_every_known_class_that_is_installed_is_there() -> None:
    """A misspelled entry of the list would be advice to trust torch."""
    import importlib
    import importlib.util

    missing, tried = [], 0
    for option in ("optimizer_type", "lr_scheduler_type"):
        for path in set(known_code()[option].values()):
            module, _, name = path.rpartition(".")
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                tried += 1
                missing += [] if hasattr(importlib.import_module(module), name) else [path]
    assert tried > 50
    assert not missing


def test_trust_is_of_whole_modules() -> None:
    assert is_trusted("mine.optimizers.Opt", ["mine"])
    assert is_trusted("mine.optimizers.Opt", ["mine.optimizers"])
    assert not is_trusted("mine_too.Opt", ["mine"])
    assert not is_trusted("mine.Opt", ["mine.optimizers"])
    assert not is_trusted("mine.; import os", ["mine"])
    with pytest.raises(UsageError, match="not the name"):
        code_names.check_trust(["a b"])


def test_the_sites_trust_holds_and_is_checked(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('trust = ["mine"]\n[machine]\ngpus = 0\n')
    template = tmp_path / "t.toml"
    template.write_text('extends = "demo"\noptimizer_type = "mine.Opt"\n')
    effective, problems = load_layers(template, load_site(site))
    assert (effective.trust, problems) == (("mine",), [])
    site.write_text('trust = "mine"\n')
    with pytest.raises(ProblemsFound, match="must be a list"):
        load_site(site)


def test_a_runs_trust_is_that_of_its_lock_and_an_old_run_goes_on() -> None:
    new = Lock({"format": 2, "run": {"trust": ["mine"]}, "values": {"optimizer_type": "other.Opt"}}, Path())
    assert new.trust == ("mine",)
    assert not list(find_unknown({"optimizer_type": "mine.Opt"}, new.trust))
    assert list(find_unknown({"optimizer_type": "other.Opt"}, new.trust))
    old = Lock({"run": {}, "values": {"optimizer_type": "other.Opt"}}, Path())
    assert not list(find_unknown({"optimizer_type": "other.Opt"}, old.trust))
    assert list(find_unknown({"optimizer_type": "another.Opt"}, old.trust))


@pytest.mark.parametrize("option", [*SECRET_OPTIONS, "log_with"])
def test_tokens_and_uploads_of_a_template_are_named_and_not_shown(option: str, tmp_path: Path) -> None:
    value: Any = "wandb" if option == "log_with" else True if SECRET_OPTIONS[option] is bool else "SECRET-VALUE"
    path = tmp_path / "t.toml"
    path.write_text(f'extends = "demo"\n{option} = {json.dumps(value)}\n')
    result = CliRunner().invoke(program, ["template", "show", str(path)])
    assert isinstance(result.exception, ProblemsFound)
    [problem] = result.exception.problems
    assert problem.where == option
    assert "site.toml" in problem.what
    assert "SECRET-VALUE" not in result.output + str(result.exception)
    if option != "log_with":
        site = tmp_path / "site.toml"
        site.write_text(f"[trainer]\n{option} = {json.dumps(value)}\n")
        _, problems = load_layers("demo", load_site(site), [f"{option}={value}"])
        assert [each.where for each in problems] == [f"trainer.{option}", option]
        site.write_text(f"[secrets]\n{option} = {json.dumps(value)}\n")
        effective, problems = load_layers("demo", load_site(site))
        assert not problems
        assert option not in effective.entries
        assert "SECRET-VALUE" not in repr(effective.site)


def test_a_file_of_a_user_that_is_not_there_is_named_in_the_site(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[secrets]\nlog_tracker_config = "~nobody-here/t.toml"\n')
    with pytest.raises(ProblemsFound, match="log_tracker_config  begins with no user of this machine"):
        load_site(site)
    site.write_text('[secrets]\nlog_tracker_config = "~/t.toml"\n')
    assert load_site(site).secrets


def test_weights_that_would_be_unpickled_are_refused_wherever_they_are_named(tmp_path: Path) -> None:
    for name in ("net.safetensors", "net.ckpt", "net.pt", "net.bin", "net"):
        (tmp_path / name).write_bytes(pickle.dumps({}, protocol=2) + bytes(40))
        for option in ("vae", "network_weights", "pretrained_model_name_or_path"):
            with pytest.raises(PickledFile):
                require_weight_files({option: name}, tmp_path)
        with pytest.raises(PickledFile):
            require_weight_files({"base_weights": [name]}, tmp_path)
    with pytest.raises(UnpickledByName):
        require_weight_files({"base_weights": ["absent.safetensors", "absent.CKPT"]}, tmp_path)
    with pytest.raises(UnpickledByName):
        require_weight_files({"vae": "."}, tmp_path)
    require_weight_files({"network_weights": None, "base_weights": ["absent.safetensors"]}, tmp_path)


def test_nothing_of_a_template_steers_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(
        'title = "\\u001b[31m\\u009b5m \\u202e"\nnotes = ["\\u001b]0;x\\u0007\\r"]\nextends = "demo"\n'
        '"\\u001b[2J\\nerror: x" = 1\ncaption_prefix = "\\u001b[7m\\u2066"\n'
    )
    for words in (["template", "show"], ["template", "check"], ["plan"]):
        for more in ([], ["--json"]):
            site = ["--site", "site.toml"] if words == ["plan"] else []
            (tmp_path / "site.toml").write_text("[machine]\ngpus = 0\n")
            done = run(*words, str(path), *site, *more, folder=tmp_path)
            assert done.returncode == 1
            printed = done.stdout + done.stderr
            assert "1b[2J" in printed
            assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066"} & set(printed)
            assert "\nerror: x" not in printed
    json.loads(run("template", "show", str(path), "--json", folder=tmp_path).stdout)
