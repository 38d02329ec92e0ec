"""What is written as TOML is what is read, also by the package that sd-scripts reads it with."""

from __future__ import annotations

import tomllib

import pytest
import toml
from hypothesis import given
from hypothesis import strategies as st

from kohaku_wrap.formats.toml_text import toml_text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_is_kept(text: str) -> None:
    document = {"section": {"text": text, "list": [text, "other"]}}
    assert tomllib.loads(toml_text(document)) == document


@pytest.mark.parametrize("text", [r"C:\xampp", r"lora\x41.*", r"blocks\.(\d+)", "it's", "one\ntwo\t\x1b", "日本"])
def test_the_trainer_reads_it_so(text: str) -> None:
    assert toml.loads(toml_text({"a": {"text": text}})) == {"a": {"text": text}}
