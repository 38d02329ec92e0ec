"""Regular expressions of a preset are tried under a limit."""

from __future__ import annotations

import signal

import pytest

from kohaku_wrap.config.network import find_pattern_faults, module_names


@pytest.mark.parametrize("pattern", [r"(\w+)+X", r"(.*.*)*Y", r"([a-z_.0-9]+)*$!", r"(?:\w\w?|[.])+#"])
def test_a_pattern_without_end_is_named_and_ends_the_search(pattern: str) -> None:
    faults = dict(find_pattern_faults(["input_blocks.*", pattern, "(\\w+)+X"]))
    assert list(faults) == [pattern]
    assert "repeat inside a repeat" in faults[pattern]
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_what_is_no_expression_is_named_and_the_rest_is_tried() -> None:
    assert [pattern for pattern, _ in find_pattern_faults(["(", "ok", "["])] == ["(", "["]


def test_names_are_those_of_modules() -> None:
    assert "input_blocks.4.1.transformer_blocks.0.attn1.to_q" in module_names()
