"""Failures on their way between processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kohaku_wrap.errors import KwrapError, MissingExtra, Problem, ProblemsFound
from kohaku_wrap.training.data.images import UnreadableImage
from kohaku_wrap.training.data.latent_shards import DamagedLatents


@pytest.mark.parametrize(
    "error",
    [
        KwrapError("wrong", "Fix it."),
        MissingExtra("training", "train"),
        ProblemsFound("dataset options", [Problem("flip", "unknown")], "Leave it out."),
        UnreadableImage(Path("1.webp"), "it is cut"),
        DamagedLatents(Path("shard"), "a byte is another one"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_reaches_another_process_as_it_is(error: KwrapError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error) and vars(there) == vars(error) and str(there) == str(error)
