"""What of a base model is known from its header alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.config.base_model import BadBaseModel, UnpickledByName, check_base_model, note_other_prediction
from kohaku_wrap.config.checks import describe_notes
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.demo.base_model import load_description
from kohaku_wrap.formats.safetensors import PickledFile
from kohaku_wrap.formats.sdxl import SDXL_SIZES, VAE_PREFIX, list_tensor_names

NAMES = [name for part in list_tensor_names(SDXL_SIZES).values() for name in part]


def write_header(path: Path, names: list[str], data: bytes = b"") -> Path:
    """A safetensors file whose tensors are empty, but for the first, which has all data."""
    header: dict[str, Any] = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names}
    header[names[0]] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": {}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_names_are_those_that_diffusers_converts() -> None:
    described = load_description()
    names = [name for part in list_tensor_names(described["config"]).values() for name in part]
    optional = {name for name in described["tensors"] if name.endswith(("position_ids", "logit_scale"))}
    assert len(names) == len(set(names))
    assert set(names) == described["tensors"].keys() - optional


def test_a_whole_model_passes_and_what_would_be_unpickled_does_not(tmp_path: Path) -> None:
    check_base_model(write_header(tmp_path / "whole.safetensors", NAMES, b"12345678"))
    with pytest.raises(UnpickledByName, match="name that ends in"):
        check_base_model(write_header(tmp_path / "whole.ckpt", NAMES, b"12345678"))
    for name in ("pickled.ckpt", "pickled.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": {}}, protocol=2) + bytes(64))
        with pytest.raises(PickledFile, match="never unpickles"):
            check_base_model(tmp_path / name)


def test_a_vae_is_needed_where_no_other_takes_its_place(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", [name for name in NAMES if not name.startswith(VAE_PREFIX)])
    check_base_model(path, with_vae=False)
    with pytest.raises(BadBaseModel, match="the VAE lacks 248 of 248 tensors"):
        check_base_model(path)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1], "conditioner.embedders.1.model.text_projection"])
def test_one_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = write_header(tmp_path / "m.safetensors", [each for each in NAMES if each != name])
    with pytest.raises(BadBaseModel, match=rf"not a whole SDXL: .* lacks 1 of [0-9,]+ tensors \({name}\)\n"):
        check_base_model(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-3], "the file holds 5 bytes"),
        (lambda data: data + b"x", "1 trailing bytes"),
        (lambda data: data[:100], "only 92 follow"),
        (lambda data: b"", "too few for a safetensors file"),
        (lambda data: b"a story of a cat\n" * 999, "not a safetensors file"),
        (lambda data: b"\x02" + bytes(7) + b"[]", "not a safetensors file"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    path = write_header(tmp_path / "m.safetensors", NAMES, b"12345678")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadBaseModel, match=words) as refused:
        check_base_model(path)
    assert str(path) in refused.value.message


def test_a_network_is_told_from_a_model(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.safetensors", ["lora_unet_conv_in.lokr_w1"])
    with pytest.raises(BadBaseModel, match="a network, not a base model"):
        check_base_model(path)


@pytest.mark.parametrize(
    ("marks", "options", "words"),
    [
        ([], ["v_parameterization=false"], ""),
        ([], ["v_parameterization=true"], "predicts noise (nothing in it says another)"),
        (["v_pred"], ["v_parameterization=true"], ""),
        (["v_pred"], ["v_parameterization=false"], "m.safetensors predicts velocity (its key v_pred)"),
        (["v_pred", "ztsnr"], ["v_parameterization=true"], "zero_terminal_snr = true goes on"),
        (["v_pred", "ztsnr"], ["v_parameterization=true", "zero_terminal_snr=true"], ""),
    ],
)
def test_a_base_that_predicts_something_else_is_noted(
    tmp_path: Path, marks: list[str], options: list[str], words: str
) -> None:
    base = write_header(tmp_path / "m.safetensors", [*NAMES, *marks])
    (tmp_path / "site.toml").write_text(f'[paths]\nbase_model = "{base}"\n', encoding="utf-8")
    effective = resolve_template("epsilon", load_site(tmp_path / "site.toml"), options)
    notes = note_other_prediction(effective)
    assert len(notes) == bool(words) and all(words in note for note in notes)
    assert set(notes) <= set(describe_notes(effective))
